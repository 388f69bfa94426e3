"The notebooks: each runs top to bottom, a second run changes no byte, the package is what they export."
import importlib, json, os, re, shutil, subprocess, sys, time, traceback
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

root = Path(__file__).parents[1]
paths = sorted(p.relative_to(root) for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
each_notebook = pytest.mark.parametrize('path', paths, ids=[str(p.relative_to('nbs').with_suffix('')) for p in paths])


def run(*args, cwd):
    "Run a command of this environment on the copy in `cwd`; its output is shown when it fails."
    env = os.environ | {'PYTHONPATH': str(cwd),
                        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    res = subprocess.run(args, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert res.returncode == 0, res.stdout
    return res.stdout


IMPORTS = ['torch', 'torch._dynamo', 'torchvision', 'matplotlib.pyplot', 'matplotlib.backends.backend_svg', 'seaborn',
           'pandas', 'fastcore.test', 'nbdev.test', 'nbdev.clean', 'execnb.shell', 'hyperflux.cli',
           'hyperflux.deploy.forms']


def commands(path, cwd, said):
    "What `nbdev-test` and `nbdev-clean` do; the exit code"
    with open(said, 'w') as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    from nbdev.clean import nbdev_clean
    from nbdev.test import nbdev_test
    try:
        nbdev_test(path, save=True, n_workers=0)
        nbdev_clean(path)
    except BaseException as e:
        if not isinstance(e, SystemExit): traceback.print_exc()
        return 1
    finally: sys.stdout.flush(), sys.stderr.flush()
    return 0


def serve():
    """Imports what most pages need, once, and runs each page it is told of in a fork: that saves ten seconds of
    processor time each"""
    for m in IMPORTS: importlib.import_module(m)
    for line in sys.stdin:
        if not (pid := os.fork()): os._exit(commands(*json.loads(line)))
        print(os.waitpid(pid, 0)[1], flush=True)


class Reruns:
    "Gives a notebook's text after a run from top to bottom, outputs saved and cleaned"
    def __init__(self, checkout): self.checkout, self.servers = checkout, {}

    def server(self, seed):
        "Started when first asked; what hashes sets and dictionaries otherwise is another one"
        # a main module without a file, as in a kernel
        code = f'import sys; sys.path.insert(0, {str(root)!r}); from tests.test_notebooks import serve; serve()'
        if seed not in self.servers:
            self.servers[seed] = subprocess.Popen([sys.executable, '-c', code], text=True, stdin=subprocess.PIPE,
                                                  stdout=subprocess.PIPE, env=os.environ | {'PYTHONHASHSEED': seed})
        return self.servers[seed]

    def __call__(self, path, seed='0'):
        server, said = self.server(seed), self.checkout/f'said{seed}.txt'
        print(json.dumps([str(path), str(self.checkout), str(said)]), file=server.stdin, flush=True)
        assert server.stdout.readline() == '0\n', said.read_text()
        return (self.checkout/path).read_text()

    def close(self):
        for s in self.servers.values(): s.stdin.close(), s.wait(), s.stdout.close()


@pytest.fixture(scope='session')
def rerun(checkout):
    runs = Reruns(checkout)
    yield runs
    runs.close()


@each_notebook
def test_runs_and_a_second_run_changes_nothing(path, rerun):
    began = time.monotonic()
    first = rerun(path)
    if first == (root/path).read_text(): return
    # Another processor or release of torch rounds otherwise. Then this machine is asked twice, and has to agree with
    # itself; but not for pages that take long, or the suite would take twice as long on every machine that did not
    # write them.
    assert not os.environ.get('HYPERFLUX_STRICT'), f'{path} changes when run: nbdev-test {path} --save; nbdev-clean'
    if time.monotonic() - began > 5 and not os.environ.get('HYPERFLUX_LONG'): return
    assert rerun(path, '1') == first, f'{path} is not repeatable: fix its seeds, and print no timings, paths or dates'


def code_cells(path): return [c for c in read_nb(root/path).cells if c.cell_type == 'code']


@each_notebook
def test_is_fit_to_read(path):
    cells, title = code_cells(path), read_nb(root/path).cells[0].source.strip()
    assert re.fullmatch(r'# .+\n\n> .+', title), 'what follows in this cell is not on the site'
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == 'error']
    if any(re.search(r'^import matplotlib|plt\.', c.source, re.M) for c in cells):
        assert any(k.startswith('image/') for o in outputs for k in o.get('data',
            {})), 'draws, but holds no picture: run it with --save'
    assert (root/path).stat().st_size < 1.5e6
    assert max([len(c.source.splitlines()) for c in cells], default=0) <= 80


def modules(root): return {str(p.relative_to(root)) for p in (root/'hyperflux').rglob('*.py')}


def test_modules_can_be_read_whole():
    "At most 250 lines of 120 characters; what nbdev writes itself may be longer"
    for path in sorted(modules(root) - {'hyperflux/_modidx.py'}):
        lines = (root/path).read_text().splitlines()
        wide = [i + 1 for i, line in enumerate(lines) if len(line) > 120 and i != 5]
        assert len(lines) <= 250 and not wide, f'{path} has {len(lines)} lines, and wide ones: {wide}'


def test_package_is_in_step_with_notebooks(tmp_path):
    for o in ('nbs', 'pyproject.toml', 'settings.ini'):
        (shutil.copytree if (root/o).is_dir() else shutil.copy2)(root/o, tmp_path/o)
    by_hand = {o for o in modules(root) if Path(o).name in ('__init__.py', '__main__.py')}
    for o in by_hand:
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root/o, tmp_path/o)
    run('nbdev-export', cwd=tmp_path)
    assert modules(tmp_path) == modules(root), 'hyperflux/ holds other modules than the notebooks export'
    differing = [o for o in modules(root) if (tmp_path/o).read_bytes() != (root/o).read_bytes()]
    assert not differing, f'{differing} differ from what the notebooks export: run nbdev-export'


def test_runs_in_a_jupyter_kernel(tmp_path):
    "The first page, as a reader runs it"
    page = shutil.copy2(root/'nbs/core/00_gates.ipynb', tmp_path)
    run('jupyter', 'execute', '--inplace', '--kernel_name=python3', page, cwd=root)
    assert any(c.get('execution_count') for c in read_nb(page).cells)


def test_readme_is_in_step_with_the_index():
    sys.path.insert(0, str(root/'tools'))
    from readme import readme
    assert readme() == (root/'README.md').read_text(), 'README.md is made from nbs/index.ipynb: python tools/readme.py'
