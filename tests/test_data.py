"The shipped images: regenerating them gives the same arrays, and reading them loads nothing heavy."
import importlib.util, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from hyperflux.data import find_idx, read_idx, system_root

root = Path(__file__).parents[1]


def test_shipped_images_are_reproducible():
    places = os.environ.get('FASHION_MNIST', ''), system_root/'fashion-mnist', root/'data/FashionMNIST/raw'
    full = next((o for o in map(Path, places) if (o/'train-images-idx3-ubyte.gz').exists()), None)
    if full is None: pytest.skip('no full Fashion-MNIST: apt install dataset-fashion-mnist, or name its folder in FASHION_MNIST')
    spec = importlib.util.spec_from_file_location('make_small', root/'tools/make_small_fashion_mnist.py')
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    for name, expected in make.subset(full).items(): assert np.array_equal(read_idx(find_idx('fashion-small')/name), expected), name


def test_shipped_images_are_small():
    assert sum(o.stat().st_size for o in find_idx('fashion-small').iterdir()) < 6e6
    assert (find_idx('fashion-small')/'LICENSE').exists()


def test_import_is_light():
    code = "import sys, hyperflux.data; print(*[m for m in ('matplotlib', 'nbdev', 'torchvision', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''
