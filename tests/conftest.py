"Fixtures that several tests share, and the order in which tests are handed out."
import os, shutil, signal
from pathlib import Path

# Files of tests run side by side: more threads than cores would wait for each other
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
# Started with & by a shell, tests inherit that Ctrl-C is ignored
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

root = Path(__file__).parents[1]


# What takes longest is handed out first, so that no core works alone at the end; then the other files; then the other
# pages, which are short. In seconds of a processor: 80 to 30
SLOWEST = ('test_survival', 'test_docs', 'tutorials/single_weights', 'test_processes', 'test_cli', 'test_files',
           'tutorials/pruning_law', 'rivals/08_registry', 'test_compare', 'test_recipes', 'test_benchmarks',
           'test_compact', 'tutorials/making_it_small', 'study/11_comparison', 'rivals/05_spectrum',
           'tutorials/extend', 'study/05_train', 'tutorials/semi_structured', 'tutorials/other_loops', 'rivals/04_l0')


def rank(item):
    "The place of a test's file, or of its page, among those to be handed out"
    page = item.path.name == 'test_notebooks.py'
    name = next((n for n in SLOWEST if f'[{n}]' in item.nodeid or n == item.path.stem), None)
    return SLOWEST.index(name) if name else len(SLOWEST) + page


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A file's tests stay together, for they share fixtures; pages go one by one. What is marked long has to be asked
    for"""
    items.sort(key=rank)
    for item in items:
        if item.get_closest_marker('long') and not os.environ.get('HYPERFLUX_LONG'):
            item.add_marker(pytest.mark.skip(reason='takes long, and runs with HYPERFLUX_LONG=1'))
        if item.path.name != 'test_notebooks.py':
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(root))))


def pytest_xdist_auto_num_workers():
    "One more than there are cores: tests wait for processes of their own, and for the disk, a fifth of the time"
    return len(os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count())) + 1


@pytest.fixture(scope='module')
def one_thread():
    "While a file's tests run, PyTorch has one thread"
    import torch
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    "A copy of what the notebooks and the docs need, to run them without touching the working tree."
    dest = tmp_path_factory.mktemp('checkout')
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for o in ('nbs', 'hyperflux', 'tools'): shutil.copytree(root/o, dest/o, ignore=skip)
    for o in ('pyproject.toml', 'settings.ini', 'setup.py', '_quarto.yml'): shutil.copy2(root/o, dest/o)
    return dest
