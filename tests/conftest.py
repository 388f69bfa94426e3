"Fixtures that several tests share."
import os, shutil, signal, sys
from pathlib import Path

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')       # files of tests run side by side: more threads than cores would wait for each other
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)     # started with & by a shell, tests inherit that Ctrl-C is ignored

import pytest

root = Path(__file__).parents[1]
sys.path.insert(0, str(root))                                                   # for benchmarks/


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Side by side, a file's tests stay together, for they share fixtures; notebooks, the longest, go one by one. What is marked long has to be asked for."
    items.sort(key=lambda item: 'tutorials/' not in item.nodeid)               # the longest pages first, or a core would wait for the last of them
    for item in items:
        if item.get_closest_marker('long') and not os.environ.get('HYPERFLUX_LONG'): item.add_marker(pytest.mark.skip(reason='takes long, and runs with HYPERFLUX_LONG=1'))
        if item.path.name != 'test_notebooks.py': item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(root))))


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    "A copy of what the notebooks and the docs need, to run them without touching the working tree."
    dest = tmp_path_factory.mktemp('checkout')
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for o in ('nbs', 'hyperflux', 'tools'): shutil.copytree(root/o, dest/o, ignore=skip)
    for o in ('pyproject.toml', 'settings.ini', 'setup.py', '_quarto.yml'): shutil.copy2(root/o, dest/o)
    return dest
