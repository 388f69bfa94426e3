"The shipped images, CIFAR and ImageNet in their real formats, and that reading loads nothing heavy."
import hashlib, importlib.util, os, pickle, subprocess, sys, tarfile, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperflux.lab.augment import Augment
from hyperflux.lab.datasets import find_idx, load_data, read_idx, system_root
from hyperflux.lab.data import pixel_stats

root = Path(__file__).parents[2]


def test_shipped_images_are_reproducible():
    places = os.environ.get('FASHION_MNIST', ''), system_root/'fashion-mnist', root/'data/FashionMNIST/raw'
    full = next((o for o in map(Path, places) if (o/'train-images-idx3-ubyte.gz').exists()), None)
    if full is None:
        pytest.skip('no full Fashion-MNIST: apt install dataset-fashion-mnist, or name its folder in FASHION_MNIST')
    spec = importlib.util.spec_from_file_location('make_small', root/'tools/make_small_fashion_mnist.py')
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for name, expected in make.subset(full).items():
        assert np.array_equal(read_idx(find_idx('fashion-small')/name), expected), name


def test_shipped_images_are_small():
    assert sum(o.stat().st_size for o in find_idx('fashion-small').iterdir()) < 6e6
    assert (find_idx('fashion-small')/'LICENSE').exists()


@pytest.mark.parametrize('module', ['augment', 'data', 'folders', 'datasets'])
def test_import_is_light(module):
    code = f"import sys, hyperflux.lab.{module}; print(*[m for m in ('matplotlib', 'nbdev', 'torchvision', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''


# CIFAR: small files in the real format; their checksums take the place of the real ones, all else is the real path

def make_cifar(name, folder, monkeypatch):
    "Writes the set's files with 20 images each, and returns them: file name → (rows of 3072 bytes, labels)"
    from torchvision import datasets
    cls = getattr(datasets, name)
    key, classes = ('labels', [f'class {i}' for i in range(10)]) if name == 'CIFAR10' else ('fine_labels',
        [f'fine {i}' for i in range(100)])
    base, rng, made, md5 = folder/cls.base_folder, np.random.default_rng(0), {}, {}
    base.mkdir(parents=True)

    def write(file, content):
        (base/file).write_bytes(pickle.dumps(content, protocol=2))
        md5[file] = hashlib.md5((base/file).read_bytes()).hexdigest()
    for file, _ in cls.train_list + cls.test_list:
        rows, labels = rng.integers(0, 256, (20, 3072), dtype=np.uint8), rng.integers(0, len(classes), 20).tolist()
        write(file, {'data': rows, key: labels} | ({'coarse_labels': [0]*20} if key == 'fine_labels' else {}))
        made[file] = rows, labels
    write(cls.meta['filename'], {cls.meta['key']: classes})
    for k in 'train_list', 'test_list': monkeypatch.setattr(cls, k, [[f, md5[f]] for f, _ in getattr(cls, k)])
    monkeypatch.setattr(cls, 'meta', cls.meta | {'md5': md5[cls.meta['filename']]})
    return cls, made, tuple(classes)


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
def test_cifar_is_read_as_it_was_written(name, tmp_path, monkeypatch):
    cls, made, classes = make_cifar(name, tmp_path, monkeypatch)
    data = load_data(name.lower(), root=tmp_path)
    for split, files in (('train', cls.train_list), ('test', cls.test_list)):
        rows, labels = (np.concatenate([made[f][k] for f, _ in files]) for k in (0, 1))
        images = getattr(data, split).images
        assert images.dtype == torch.uint8 and images.shape == (20*len(files), 3, 32, 32) and images.is_contiguous()
        assert torch.equal(images.flatten(1), torch.from_numpy(rows))
        assert getattr(data, split).labels.tolist() == labels.tolist()
    assert (data.classes, data.n_classes, data.in_shape) == (classes, len(classes), (3, 32, 32))
    assert (data.mean, data.std) == pixel_stats(data.train.images) and len(data.mean) == 3
    x, y = next(iter(data.loader('train', 16, augment=Augment(crop=4, flip=True))))
    assert x.shape == (16, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64
    # the folder itself may be named too
    held = load_data(name.lower(), root=tmp_path/cls.base_folder, valid=.25, seed=1)
    assert len(held.valid.labels) == round(.25*len(data.train.labels)) == len(data.train.labels) - len(held.train.labels)


@pytest.mark.parametrize('name', ['CIFAR10', 'CIFAR100'])
def test_the_cifar_file_that_is_wrong_is_named(name, tmp_path, monkeypatch):
    cls, *_ = make_cifar(name, tmp_path, monkeypatch)
    base, key = tmp_path/cls.base_folder, name.lower()
    for file in (cls.train_list[-1][0], cls.test_list[0][0], cls.meta['filename']):
        good = (base/file).read_bytes()
        (base/file).unlink()
        with pytest.raises(FileNotFoundError, match=f'{key}: {base/file} is missing; unpack {cls.filename} again'):
            load_data(key, root=tmp_path)
        for bad in (good[:-7], good[:-1] + bytes([good[-1] ^ 1]), b''):
            (base/file).write_bytes(bad)
            with pytest.raises(ValueError, match=f'{key}: {base/file} is truncated or damaged'):
                load_data(key, root=tmp_path)
        (base/file).write_bytes(good)
    load_data(key, root=tmp_path)
    with pytest.raises(FileNotFoundError, match=f'no folder {cls.base_folder} in {tmp_path/"elsewhere"}; give root='):
        load_data(key, root=tmp_path/'elsewhere')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f'no folder {cls.base_folder} in data;'): load_data(key)


@pytest.fixture
def serve(monkeypatch):
    "Serves a folder by HTTP on this machine, and returns its address"
    servers = []

    def start(folder):
        class Quiet(SimpleHTTPRequestHandler):
            def __init__(self, *args): super().__init__(*args, directory=str(folder))
            def log_message(self, *args): pass
        servers.append(ThreadingHTTPServer(('127.0.0.1', 0), Quiet))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{servers[-1].server_port}'
    for k in 'no_proxy', 'NO_PROXY': monkeypatch.setenv(k, '127.0.0.1')
    yield start
    for o in servers: o.shutdown(), o.server_close()


def test_cifar_is_fetched_when_asked(tmp_path, monkeypatch, serve):
    cls, *_ = make_cifar('CIFAR10', tmp_path/'there', monkeypatch)
    archive = tmp_path/'there'/cls.filename
    with tarfile.open(archive, 'w:gz') as t: t.add(tmp_path/'there'/cls.base_folder, cls.base_folder)
    address = serve(tmp_path/'there')
    monkeypatch.setattr(cls, 'url', f'{address}/{cls.filename}')
    monkeypatch.setattr(cls, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    here = tmp_path/'here'
    load_data('cifar10', root=here, download=True)
    (here/cls.base_folder/cls.meta['filename']).write_bytes(b'')            # torchvision would not fetch this one again
    (here/cls.base_folder/'data_batch_3').unlink()
    data = load_data('cifar10', root=here, download=True)
    assert torch.equal(data.train.images, load_data('cifar10', root=tmp_path/'there').train.images)
    monkeypatch.setattr(cls, 'url', f'{address}/no.tar.gz')
    with pytest.raises(OSError, match='cifar10: the download of .*no.tar.gz into .* failed: HTTP Error 404'):
        load_data('cifar10', tmp_path/'new', download=True)


# ImageNet: small folders in its layout

@pytest.fixture
def folders(tmp_path):
    "root/train and root/val: three classes, photographs of noise in several sizes, formats and modes"
    from PIL import Image
    rng = np.random.default_rng(0)
    for split, n in (('train', 5), ('val', 2)):
        for c in 'n01', 'n02', 'n03':
            (tmp_path/split/c).mkdir(parents=True)
            for k in range(n):
                image = Image.fromarray(rng.integers(0, 256, (int(rng.integers(40, 300)), int(rng.integers(40, 300)),
                                                              3), dtype=np.uint8))
                ending, mode = [('JPEG', 'RGB'), ('png', 'RGB'), ('JPEG', 'L'), ('JPEG', 'CMYK'), ('png', 'RGBA')][k]
                image.convert(mode).save(tmp_path/split/c/f'{k}.{ending}')
    return tmp_path


def test_folders_without_chance_are_torchvisions(folders):
    "Evaluation: each image is what torchvision's reference transforms for ImageNet make of it"
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
    theirs = ImageFolder(folders/'val', v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToImage(),
                                                    v2.ToDtype(torch.float32, scale=True),
                                                    v2.Normalize((.485, .456, .406), (.229, .224, .225))]))
    data = load_data('imagenet', root=folders)
    ours = list(data.loader('test', 4, workers=0))
    assert data.classes == tuple(theirs.classes) and [len(y) for _, y in ours] == [4, 2]
    torch.testing.assert_close(torch.cat([x for x, _ in ours]), torch.stack([x for x, _ in theirs]), rtol=0, atol=1e-6)
    assert torch.cat([y for _, y in ours]).tolist() == theirs.targets


def test_folders_crop_as_torchvision_does(folders):
    "Training: the same as torchvision's random transforms under the same seed, and fair: mirrored half of the time"
    from PIL import Image
    from torchvision.transforms import v2
    from hyperflux.lab.folders import Pictures, sample_seed
    data = load_data('imagenet', root=folders)
    pictures = Pictures(data.train, train=True, seed=3)
    for i, name in enumerate(data.train.names):
        torch.manual_seed(sample_seed(3, 8, i))
        with Image.open(folders/'train'/name.decode()) as f:
            expected = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(),
                                   v2.PILToTensor()])(f.convert('RGB'))
        assert torch.equal(pictures[8, i][0], expected)
    ramp = Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(64, 0)).convert('RGB')
    ramp.save(folders/'train'/data.train.names[0].decode(), 'png')              # brighter to the right, unless mirrored
    pictures = Pictures(data.train, train=True, size=32)
    mirrored = sum(bool(x[0, 0, 0] > x[0, 0, -1]) for x in (pictures[e, 0][0] for e in range(400)))
    assert abs(mirrored - 200) < 4*10, mirrored


def test_folders_do_not_know_who_reads_them(folders):
    data = load_data('imagenet', root=folders, valid=.2, seed=1)
    make = lambda **kwargs: data.loader('train', 5, **dict(seed=2, workers=0) | kwargs)
    whole = make()
    passes = [list(whole) for _ in range(3)]
    assert [len(y) for _, y in passes[0]] == [5, 5, 2] and not torch.equal(passes[0][0][0], passes[1][0][0])
    same = lambda a, b: len(a) == len(b) and all(torch.equal(x, u) and torch.equal(y, v) for (x, y),
                                                 (u, v) in zip(a, b))
    for workers in 1, 2:
        loader = make(workers=workers)
        assert all(same(list(loader), o) for o in passes)
        loader.set_epoch(1, start=2)
        assert same(list(loader), passes[1][2:]) and same(list(loader), passes[2])
        shares = []
        for rank in 0, 1:
            shares.append(make(workers=workers, rank=rank, world=2))
            shares[-1].set_epoch(2, start=1)
        for k, (one, two) in enumerate(zip(*shares), start=1):
            for r, share in enumerate((one, two)):
                assert torch.equal(share[0], passes[2][k][0][r::2]) and torch.equal(share[1], passes[2][k][1][r::2])
            assert len(one[1]) + len(two[1]) == whole.total(k)
    seen, all_of_them = ({n for s in o for n in s} for o in ((data.train.names, data.valid.names),
                                                             (load_data('imagenet', root=folders).train.names,)))
    assert seen == all_of_them and len(data.valid.labels) == 3


def test_folders_name_the_unreadable_file(folders):
    data = load_data('imagenet', root=folders)
    for name, cut in ((b'n02/0.JPEG', .6), (b'n03/1.png', .6), (b'n01/2.JPEG', 0)):
        path = folders/'train'/name.decode()
        good = path.read_bytes()
        path.write_bytes(good[:int(cut*len(good))])
        for workers in 0, 2:
            loader = data.loader('train', 4, workers=workers)
            with pytest.raises(ValueError, match=f'^{path} cannot be read as an image'): list(loader)
            path.write_bytes(good)
            loader.set_epoch(0)
            assert len(list(loader)) == 4                                              # mended, the same loader goes on
            path.write_bytes(good[:int(cut*len(good))])
        path.write_bytes(good)


def test_workers_use_one_thread_and_leave_ctrl_c_alone(folders):
    code = f"""
import os, signal, torch
from hyperflux.lab.folders import Pictures, load_folders
torch.set_num_threads(2)
look = lambda self, key: (torch.tensor([torch.get_num_threads(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN, os.getpid()]), 0)
Pictures.__getitem__ = look
loader = load_folders({str(folders)!r}).loader('train', 3, workers=2, mean=0, std=1)
loader.normalize = lambda x: x
told = torch.cat([x for _ in range(2) for x, _ in loader])
assert told[:, 0].eq(1).all() and told[:, 1].all(), told
assert len(set(told[:, 2].tolist()) - {{os.getpid()}}) == 2, told                        # two workers, which stay for the second pass
assert torch.get_num_threads() == 2
"""
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
