"""What several tests share: processes that are forked where their imports are done, and, for the tests of trust, a toy
task, a small network, a loop, and every method by name.

A program that imports torch costs five seconds of a processor, a fork a tenth of one. So nearly all processes of the
tests, the command `hyperflux` included, are forked from one server; `test_cli` and two others also start theirs as a
user does.
"""
import faulthandler, importlib, os, shlex, socket, sys, tempfile, time, warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.common import fresh_process
from hyperflux import Hyperflux, Settings
from hyperflux.lab.processes import join, leave
from hyperflux.rivals.gradients import GraSP, SNIP, Taylor
from hyperflux.rivals.rigl import RigL
from hyperflux.rivals.l0 import L0
from hyperflux.rivals.scores import GMP, LayerMagnitude, Magnitude, Progressive, Random
from hyperflux.rivals.imp import IMP

root = Path(__file__).parents[1]
LONG = bool(os.environ.get('HYPERFLUX_LONG'))                       # asked for all, however long it takes
TORCHRUN = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'         # what it sets in each process
PRELOAD = ['hyperflux.cli', 'hyperflux.study.train', 'torch._dynamo', 'torch.distributed.fsdp', 'seaborn',
           'matplotlib.backends.backend_agg', 'tests.helpers']


def environment(**more):
    "For a program: this one, with a single thread, the package of this checkout, wide lines, nothing of torchrun's"
    env = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    return env | dict(OMP_NUM_THREADS='1', COLUMNS='200', PYTHONPATH=str(root)) | more


def until(what, seconds=60, every=.005):
    "Waits until `what()` holds"
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(every)


# The command, forked

def command(args, cwd, said, picture=True):
    "What `hyperflux` does when it is called in `cwd`"
    from hyperflux.cli import main
    from hyperflux.study import results
    if not picture: results.plot_run = lambda *_: SimpleNamespace(savefig=lambda f, dpi: f.write(b'left out'))
    _says(said)
    os.chdir(cwd)
    sys.argv = ['hyperflux', *args]
    torch.set_num_threads(1)
    os.environ['COLUMNS'] = '200'
    main()


def _says(file):
    "From here on, what this process prints is added to a file"
    with open(file, 'a') as f: os.dup2(f.fileno(), 1), os.dup2(f.fileno(), 2)


class Runner:
    "Starts the command in processes forked from one that has everything imported"
    def __init__(self,
        cwd, # Where
        picture=True, # Draw run.png? It takes longer than all the rest of a small run
    ):
        self.cwd, self.picture, self.context = Path(cwd), picture, fresh_process(PRELOAD)

    def start(self, *args, target=command, more=()):
        """A running process: `target` gets the arguments, the folder, where to say what it says, whether to draw, and
        more"""
        said = self.cwd/'said.txt'
        said.write_text('')
        p = self.context.Process(target=target, args=([str(a) for a in args], self.cwd, said, self.picture, *more))
        p.start()
        return p

    def __call__(self, *args, code=0, timeout=100, **kwargs):
        "Runs the command to its end; what it said"
        p = self.start(*args, **kwargs)
        p.join(timeout)
        p.kill()
        p.join()
        said = (self.cwd/'said.txt').read_text()
        assert p.exitcode == code, f'{shlex.join(map(str, args))} ended with {p.exitcode}, expected {code}:\n{said}'
        return said


def program(module, *args, timeout=500):
    "Runs `python -m module` with arguments, in the checkout and forked: its exit code and what it printed"
    with tempfile.NamedTemporaryFile('r', suffix='.txt') as f:
        p = fresh_process(PRELOAD).Process(target=_program, args=(module, [str(a) for a in args], f.name))
        p.start()
        p.join(timeout)
        p.kill()
        p.join()
        return p.exitcode, f.read()


def _program(module, args, said):
    _says(said)
    os.chdir(root)
    sys.argv = [module, *args]
    torch.set_num_threads(1)
    importlib.import_module(module).main()


# Several processes that know each other

def _member(rank, n, port, said, work, args):
    "One of n processes: what torchrun would set, then `work`"
    _says(said)
    faulthandler.dump_traceback_later(100, exit=True)               # nobody survives the test
    os.environ.update(zip(TORCHRUN, map(str, (rank, n, rank, '127.0.0.1', port))))
    os.environ['LOCAL_WORLD_SIZE'] = str(n)
    torch.set_num_threads(1)
    work(*args)


def _joined(work, args):
    world = join()
    work(world, *args)
    world.barrier()
    leave()


class Group:
    "n processes, as torchrun starts them, that do `work(*args)`; all of them end with the block"
    def __init__(self, n, work, *args):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        self.file = tempfile.NamedTemporaryFile('r', suffix='.txt')
        context = fresh_process(PRELOAD)
        self.all = [context.Process(target=_member, args=(i, n, port, self.file.name, work, args)) for i in range(n)]
        for p in self.all: p.start()

    def said(self): return Path(self.file.name).read_text()
    def kill(self):
        for p in self.all: p.kill()
        for p in self.all: p.join(20)

    def wait(self, code=0, timeout=100):
        "Until all have ended; what they said. When one fails, the others get a little time to say so, too"
        end = time.monotonic() + timeout
        while any(p.exitcode is None for p in self.all) and time.monotonic() < end:
            if any(p.exitcode not in (None, code) for p in self.all): end = min(end, time.monotonic() + 3)
            time.sleep(.01)
        codes = [p.exitcode for p in self.all]
        assert codes == [code]*len(codes), f'ended with {codes} (None: not in time), expected {code}:\n{self.said()}'
        return self.said()

    def __enter__(self): return self
    def __exit__(self, *_):
        self.kill()
        self.file.close()


def together(n, work, *args, timeout=100):
    "Runs `work(world, *args)` in n processes that have joined; what they said"
    with Group(n, _joined, work, args) as g: return g.wait(timeout=timeout)


# For the tests of trust

def task(n_in=20, n_out=4, n=64, seed=0):
    "Inputs and labels that a linear map gives: a small network learns them by heart"
    g = torch.Generator('cpu').manual_seed(seed)
    x, w = (torch.randn(*s, generator=g, device='cpu', dtype=torch.float32) for s in ((n, n_in), (n_in, n_out)))
    return x, (x@w).argmax(1)


x, y = task()


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))       # 768 weights


def loss(model): return nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
def accuracy(model): return (model(x.to(next(model.parameters()).dtype)).argmax(1) == y).float().mean().item()


def train(model, optimizer, steps, each=None):
    "Everyone's loop; `each(i)` is called after step i"
    for i in range(steps):
        model.zero_grad()
        loss(model).backward()
        optimizer.step()
        if each: each(i)


def nnz(what): return sum(int(p.count_nonzero()) for p in getattr(what, 'params', what))
def negative_zeros(what): return sum(int(((p == 0) & p.signbit()).sum()) for p in getattr(what, 'params', what))


def said(f, *args, **kw): # Texts of the warnings
    "What `f` warns of"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        f(*args, **kw)
    return [str(w.message) for w in ws]


# RigL's 100 steps between two moves are more than a test has
class Often(RigL): every = 10


def _with(kind, **more):
    return lambda model, opt, sparsity, steps: kind(model, opt, sparsity=sparsity, steps=steps, **more)


def _hyperflux(model, opt, sparsity, steps):
    few = isinstance(steps, int) and steps < 100            # which presences must make longer ones of
    return Hyperflux(model, opt, sparsity=sparsity, steps=steps, settings=Settings(lr=.1) if few else Settings())


METHODS = [('Hyperflux', _hyperflux)]                       # 40 steps are enough for each but L0, and 120 for that
METHODS += [(k.__name__, _with(k)) for k in (GMP, Progressive, Magnitude, LayerMagnitude, Random, Taylor, IMP)]
METHODS += [('RigL', _with(Often)), ('L0', _with(L0, span=(0, .9)))]
METHODS += [(k.__name__, _with(k, batch=(x, y))) for k in (SNIP, GraSP)]
