"Every optimiser there is, wrapped, scheduled, or called by another: is the pruner driven?"
import functools, warnings

import pytest, torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from hyperflux import Hyperflux, Settings
from hyperflux.rivals.scores import GMP

from tests.helpers import loss, mlp, nnz, said, train
from tests.trust.optimizers import (
    TORCH, make, small, both, with_methods, length, exact, holds, optimizer_of, Mine, lookahead)


def in_registries():
    "Every optimiser class of PyTorch, and every name that timm can make, alone and in a Lookahead"
    try: from timm.optim import list_optimizers
    except ImportError: return list(TORCH)
    names = list_optimizers()
    return [*TORCH, *(f'timm {n}' for n in names), *(f'timm lookahead_{n}' for n in names)]


def drive(name, method, steps):
    model = small()
    opt = optimizer_of(name, model)
    p = method and method(model, opt, steps)
    for _ in range(steps):
        model.zero_grad()
        loss(model).backward()
        opt.step() if name != 'LBFGS' else opt.step(lambda: loss(model))
        if p: assert holds(p)
    return p


@functools.cache
def unfit_here(name):
    """Why it does not train on this machine without any pruner: for want of a GPU or of a package, or of sparse or
    second gradients; None if it does"""
    try: drive(name, None, 2)
    except Exception as e: return f'{name}: {e}'


QUICK = dict(GMP=(5, lambda m, o, n: GMP(m, o, sparsity=.8, steps=n, span=(0, .8))),
             Hyperflux=(10, lambda m, o, n: Hyperflux(m, o, sparsity=.8, steps=n, settings=Settings(lr=.1))))


@both
def test_every_optimizer_there_is(method):
    """Whatever trains without a pruner on this machine trains with one, to exactly the target, or is refused at
    construction, by name"""
    done, refused, unfit = [], [], []
    steps, build = QUICK[method]
    # PSGD compiles its steps, which takes a minute
    with torch.compiler.set_stance('force_eager'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for i, name in enumerate(in_registries()):
            if method == 'Hyperflux' and 'lookahead_' in name and i % 9: continue
            if why := unfit_here(name): unfit.append(why); continue
            try: p = drive(name, build, steps)
            except (TypeError, ValueError) as e:
                assert name in str(e), f'{name} is refused without its name: {e}'
                refused.append(name)
                continue
            assert nnz(p) == p.keep == p.left and p.step == steps, f'{name}: {nnz(p)} of {p.keep}, {p!r}'
            done.append(name)
            p.detach()
    assert refused == ['LBFGS']
    assert set(TORCH) - set(done) == {'LBFGS', 'SparseAdam'} and len(unfit) < len(done), unfit


@with_methods('on', ['outer', 'inner, made before', 'inner, made after'])
def test_lookahead(on, name):
    """A pruner of Lookahead, fresh and never hooked, or of the optimiser inside: exact at every step, or one warning of
    the zeros and a report that tells the truth"""
    m, steps = mlp(), length(name)
    base = SGD(m.parameters(), lr=.1, momentum=.9)
    p = make[name](m, base, .8, steps) if on == 'inner, made before' else None
    # so that the last step is one of those that write slow weights
    o = lookahead(base, k=8)
    p = p or make[name](m, o if on == 'outer' else base, .8, steps)
    off = []
    texts = said(train, m, o, steps, lambda i: off.append(nnz(p) - p.left))
    assert p.step == steps and set(off) == {0} and p.present == p.keep
    if on == 'outer': assert exact(p) and not any('absent weights' in t for t in texts)
    else: assert exact(p) or 'not zero' in repr(p) and sum('absent weights were not zero' in t for t in texts) == 1


@both
def test_lookahead_synchronised_at_the_end(method):
    """timm's training script ends each epoch with sync_lookahead(), which writes slow weights: the zeros hold, or the
    report tells the truth"""
    m = mlp()
    o = lookahead(SGD(m.parameters(), lr=.1, momentum=.9), k=7)
    p = make[method](m, o, .8, 40)
    said(train, m, o, 40)
    o.sync_lookahead()
    assert p.left == nnz(p)
    assert nnz(p) == p.keep or 'not zero' in repr(p) and f'{nnz(p)} of' in repr(p)
    p.apply_mask()
    assert nnz(p) == p.keep


@both
@pytest.mark.parametrize('first', ['scheduler', 'pruner'])
@pytest.mark.parametrize('kind', ['SGD', 'Lookahead', 'Mine'])
def test_with_a_scheduler(kind, first, method):
    """A scheduler, which counts steps by a wrapper of its own, made before or after: it follows, it does not warn, and
    the target is met"""
    m = mlp()
    o = SGD(m.parameters(), lr=.1, momentum=.9)
    o = dict(SGD=lambda: o, Lookahead=lambda: lookahead(o), Mine=lambda: Mine(m.parameters(), lr=.1,
                                                                              momentum=.9))[kind]()
    def schedule(): return LambdaLR(o, lambda i: 1 - i/200)
    def prune(): return make[method](m, o, .8, 40)
    a, b = (schedule(), prune()) if first == 'scheduler' else reversed((prune(), schedule()))
    texts = said(train, m, o, 40, lambda i: a.step())
    assert a.last_epoch == 40 and b.step == 40 and exact(b)
    assert o.param_groups[0]['lr'] == pytest.approx(.1*.8) and not any('lr_scheduler' in t for t in texts)
    b.detach()
    said(train, m, o, 3, lambda i: a.step())
    assert a.last_epoch == 43
