"A toy task, a small network, a loop, and every method by name, for the tests of trust."
import warnings

import torch
from torch import nn

from hyperflux import Hyperflux, Settings
from hyperflux.rivals.scores import GMP, IMP, LayerMagnitude, Magnitude, Progressive, Random
from hyperflux.rivals.l0 import L0
from hyperflux.rivals.gradients import GraSP, RigL, SNIP, Taylor


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


class Often(RigL): every = 10                                                   # RigL's 100 steps between two moves are more than a test has


def _with(kind, **more): return lambda model, opt, sparsity, steps: kind(model, opt, sparsity=sparsity, steps=steps, **more)


def _hyperflux(model, opt, sparsity, steps):
    few = isinstance(steps, int) and steps < 100                                # which presences must make longer ones of
    return Hyperflux(model, opt, sparsity=sparsity, steps=steps, settings=Settings(lr=.1) if few else Settings())


METHODS = [('Hyperflux', _hyperflux)]                                           # 40 steps are enough for each but L0, and 120 for that
METHODS += [(k.__name__, _with(k)) for k in (GMP, Progressive, Magnitude, LayerMagnitude, Random, Taylor, IMP)]
METHODS += [('RigL', _with(Often)), ('L0', _with(L0, span=(0, .9)))] + [(k.__name__, _with(k, batch=(x, y))) for k in (SNIP, GraSP)]
