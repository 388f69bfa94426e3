"""Make the part of Fashion-MNIST that hyperflux ships: 1,000 training and 200 test images of each class.

    python tools/make_small_fashion_mnist.py /usr/share/datasets/fashion-mnist [hyperflux/assets/fashion-small]

The training images come from the official training set and the test images from the official test set, drawn without
replacement with numpy's PCG64 and a fixed seed, and kept in their original order. The files have the names and the
format (gzipped IDX) of the full set, so one reader serves both."""
import gzip, struct, sys
from pathlib import Path

import numpy as np

SEED, PER_CLASS = 2504, dict(train=1000, t10k=200)


def read(folder, name, header):
    "The bytes of one gzipped IDX file of the full set, after its header."
    return np.frombuffer(gzip.decompress((Path(folder)/name).read_bytes()), np.uint8, offset=header)


def choose(labels, n, rng):
    "The sorted indices of `n` examples of each class."
    return np.sort(np.concatenate([rng.choice(np.flatnonzero(labels == c), n, replace=False) for c in range(10)]))


def subset(folder):
    "The four arrays, by file name."
    rng, out = np.random.Generator(np.random.PCG64(SEED)), {}
    for part, n in PER_CLASS.items():
        images, labels = f'{part}-images-idx3-ubyte.gz', f'{part}-labels-idx1-ubyte.gz'
        y = read(folder, labels, 8)
        idx = choose(y, n, rng)
        out[images], out[labels] = read(folder, images, 16).reshape(-1, 28, 28)[idx], y[idx]
    return out


def main(src, dest=Path(__file__).parents[1]/'hyperflux/assets/fashion-small'):
    dest = Path(dest)
    dest.mkdir(parents=True, exist_ok=True)
    for name, a in subset(src).items():
        header = struct.pack(f'>I{a.ndim}I', 0x0800 + a.ndim, *a.shape)
        (dest/name).write_bytes(gzip.compress(header + a.tobytes(), 9, mtime=0))
        print(f'{name:30} {str(a.shape):15} {(dest/name).stat().st_size:>9,} bytes')


if __name__ == '__main__': main(*sys.argv[1:])
