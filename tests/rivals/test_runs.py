"All rivals in runs: optimisers, files, errors in the middle, other processes."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperflux.rivals.scores import GMP, Progressive, Random
from hyperflux.rivals.imp import IMP
from hyperflux.rivals.gradients import GraSP, SNIP, Taylor
from hyperflux.rivals.rigl import RigL
from tests.helpers import LONG, together
from tests.rivals.rig import (
    g0, xs, ys, Swift, METHODS, every_method, mlp, conv, last, Heads, sgd, adam, adamw, make, start,
    loss, train, vector, mask, weights, refuses, through_a_file, everything)


# Absent means zero, whatever the optimiser

OPTIMIZERS = {
    'sgd': sgd, 'nesterov': lambda m: sgd(m, nesterov=True), 'sgd foreach': lambda m: sgd(m, foreach=True),
    'sgd fused': lambda m: sgd(m, fused=True),
    'adam': lambda m: adam(m, foreach=False), 'adam foreach': lambda m: adam(m, foreach=True),
    'adam fused': lambda m: adam(m, fused=True), 'amsgrad': lambda m: adam(m, amsgrad=True),
    'adamw': lambda m: adamw(m, foreach=False), 'adamw foreach': lambda m: adamw(m, foreach=True),
    'adamw fused': lambda m: adamw(m, fused=True),
    'rmsprop': lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=.9, weight_decay=1e-2)}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@every_method
def test_absent_is_zero(kind, optimizer):
    "After every step; present ones move, the count is exact at the end, and the report says so"
    model, opt, p = start(kind, OPTIMIZERS[optimizer], conv if optimizer in ('sgd', 'adamw fused') else mlp, steps=40)
    bias, ever, masks = model[-1].bias.clone(), torch.zeros(p.d), [mask(p)]
    def look(i):
        m, w = mask(p), weights(p)
        assert (w[m == 0] == 0).all() and w.isfinite().all() and ((m == 0) | (m == 1)).all()
        assert p.present == int(m.sum()) and p.left == int(w.count_nonzero())
        if kind is not Swift: assert (m <= masks[-1]).all()
        elif not torch.equal(m, masks[-1]): ever.add_(1)
        masks.append(m)
    train(model, opt, 0, 40, look)
    assert p.left == p.keep == round(.2*p.d) and p.stage == 'done' and p.births - p.deaths == p.left - p.d
    assert (weights(p)[mask(p) == 1] != 0).all() and not torch.equal(model[-1].bias, bias)
    if kind is Swift: assert ever[0] == 2 and p.births > 0           # moved at 10 and 20, and not at 30, the end
    head = f'{kind.__name__}: {p.keep:,} of {p.d:,} weights left, {p.keep:,} asked (sparsity 0.8); step 40 of 40, done'
    assert repr(p) == head
    head, columns, *rows, total = str(p).splitlines()
    assert head == repr(p) and columns.split() == ['layer', 'shape', 'weights', 'left', 'density']
    assert len(rows) == len(p.names)
    assert total.split() == ['total', f'{p.d:,}', f'{p.keep:,}', f'{p.density:.2%}'] and repr(p) in p._repr_markdown_()


# Going on from a file

@pytest.mark.parametrize('optimizer', [sgd, adam])
@every_method
def test_resume(kind, optimizer):
    "Stopped anywhere and loaded into a fresh network with other weights, the run ends as if it had been left in peace"
    how = dict(rewind=3) if kind is IMP else dict(span=(.1, .75), updates=7) if kind not in (Swift, SNIP, GraSP) else {}
    model, opt, p = start(kind, optimizer, last, **how)
    saved, stops = {}, (1, 12, 23, 36, 47, 59) if LONG else (1, 23, 47)
    def look(i):
        if i in stops: saved[i] = through_a_file(model, opt, p)
    train(model, opt, 0, 60, look)
    for i, states in saved.items():
        other = start(kind, optimizer, last, seed=i + 10, **how)
        for o, s in zip(other, states): o.load_state_dict(s)
        assert other[2].step == i and (weights(other[2])[mask(other[2]) == 0] == 0).all()
        train(*other[:2], i, 60)
        a, b = everything(model, opt, p), everything(*other)
        assert len(a) == len(b) and all(map(torch.equal, a, b)), i
        assert (other[2].births, other[2].deaths, str(other[2])) == (p.births, p.deaths, str(p))


@every_method
def test_resume_in_any_order(kind):
    "Pruner, optimiser, model, instead of the other way round"
    model, opt, p = start(kind)
    train(model, opt, 0, 31)
    states = through_a_file(model, opt, p)
    train(model, opt, 31, 60)
    other = start(kind, seed=9)
    for o, s in list(zip(other, states))[::-1]: o.load_state_dict(s)
    train(*other[:2], 31, 60)
    a, b = everything(model, opt, p), everything(*other)
    assert len(a) == len(b) and all(map(torch.equal, a, b))


def test_resume_refuses_another_goal():
    """A pruner that was asked for something else than the state's refuses it by both values, and is as it was; likewise
    one of another kind"""
    model, opt, p = start(GMP, span=(.2, .6), updates=4)
    train(model, opt, 0, 20)
    saved = through_a_file(p)[0]
    for asked, says in (dict(sparsity=.3), 'sparsity=0.8.*sparsity=0.3'), (dict(steps=99),
            'steps=60.*steps=99'), (dict(span=(0., .6)), 'begin=12.*begin=0'), (dict(updates=50),
                                                                                'updates=4.*updates=50'):
        _, _, q = start(GMP, **dict(span=(.2, .6), updates=4) | asked)
        before = mask(q)
        with refuses(says): q.load_state_dict(saved)
        assert q.step == 0 and torch.equal(mask(q), before)
    _, _, q = start(GMP, span=(.2, .6), updates=4)
    q.load_state_dict(saved)
    assert (q.plan.begin, q.plan.end, q.updates, q.keep, q.steps, q.step) == (12, 36, 4, p.keep, 60, 20)
    assert torch.equal(q.mask, p.mask)
    with refuses("its kind is 'GMP', here it is 'Progressive'"): start(Progressive)[2].load_state_dict(p.state_dict())


@pytest.fixture
def small():
    "200 training images and 50 to test on"
    from hyperflux.lab.data import Data, Split
    from hyperflux.lab.datasets import load_data
    full = load_data('fashion-small')
    yield Data(full.name, full.classes, *(Split(s.images[:n], s.labels[:n]) for s, n in ((full.train, 200),
        (full.test, 50))))
    torch.set_flush_denormal(False)                                  # `fit` switches it on for the whole process


def little(n_classes, in_shape):
    return nn.Sequential(nn.Flatten(), nn.AvgPool1d(8), nn.Linear(98, 20), nn.BatchNorm1d(20), nn.ReLU(),
                         nn.Linear(20, n_classes))


@pytest.mark.parametrize('name', ['gmp', 'taylor', 'imp', 'snip', 'grasp', 'rigl', 'magnitude'])
def test_fit_resumes(name, small, tmp_path, monkeypatch):
    "The training loop, stopped after two and four of six epochs: history, weights and masks as in one go"
    from hyperflux.study.config import Config
    from hyperflux.study.train import fit
    monkeypatch.setattr(RigL, 'every', 10)
    config = Config(model=f'{__name__}:little', method=name, sparsity=.8, dense_epochs=1, prune_epochs=3,
                    regrow_epochs=2, batch_size=20, crop=2, flip=True)
    whole = fit(config, data=small, progress=False)
    for until in (2, 4): fit(config, tmp_path/'run', data=small, progress=False, until=until, resume=until > 2)
    run = fit(config, tmp_path/'run', data=small, progress=False, resume=True)
    assert run.finished and run.history == whole.history and run.pruner.left == run.pruner.keep
    assert run.pruner.stage == 'done'
    a, b = everything(whole.model, whole.optimizer, whole.pruner), everything(run.model, run.optimizer, run.pruner)
    assert len(a) == len(b) and all(map(torch.equal, a, b))
    assert name != 'rigl' or run.pruner.births > 0


# What people do to models and optimisers

class Stumbling(torch.optim.SGD):
    "Writes weights, then fails, now and then"
    fail = False
    def step(self, closure=None):
        super().step(closure)
        if self.fail:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group['params']: p.add_(1.)
            raise OSError('power cut')


@every_method
def test_error_in_step(kind):
    "An exception inside step leaves the mask applied; afterwards the run goes on"
    model, opt, p = start(kind, lambda m: Stumbling(m.parameters(), lr=.1, momentum=.9), steps=60)
    train(model, opt, 0, 25)
    before = mask(p)
    opt.fail = True
    with refuses('power cut', OSError): train(model, opt, 25, 26)
    m = mask(p)
    assert (weights(p)[m == 0] == 0).all() and (weights(p)[m == 1] != 0).all()
    assert (kind is Swift or (m <= before).all())
    opt.fail = False
    train(model, opt, p.step, 60)
    assert p.left == p.keep and (weights(p)[mask(p) == 0] == 0).all()


@every_method
def test_weights_loaded_and_copied(kind):
    """Dense weights loaded in mid-run are masked with the next step; a copy of the model is a plain network that trains
    on its own"""
    model, opt, p = start(kind)
    dense = {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    train(model, opt, 0, 45)
    m, twin = mask(p), copy.deepcopy(model)
    assert 0 < m.mean() < 1
    zeros = [w for n, w in twin.named_parameters() if n in p.names]
    assert torch.equal(vector(zeros), weights(p))
    train(twin, sgd(twin), 0, 2)
    assert (vector(zeros) != 0).all() and torch.equal(mask(p), m) and (weights(p)[m == 0] == 0).all()

    model.load_state_dict(dense)
    assert (weights(p) == 1).all()
    p.apply_mask()
    assert torch.equal(weights(p), m)
    model.load_state_dict(dense)
    for group in opt.param_groups: group['lr'] = 0.
    train(model, opt, 45, 46)
    assert torch.equal(weights(p), m) and torch.equal(mask(p), m)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.tied, self.head = nn.Linear(13, 13), nn.Linear(13, 13), nn.Linear(13, 5)
        self.tied.weight = self.inner.weight
    def forward(self, x): return self.head(self.tied(self.inner(x).tanh()).tanh())


@every_method
def test_tied(kind):
    "A weight with two names is one weight"
    model, opt, p = start(kind, build=Tied)
    assert p.names == ['inner.weight', 'head.weight'] and p.d == 13*13 + 13*5
    train(model, opt, 0, 60)
    assert model.tied.weight is model.inner.weight and p.left == p.keep == round(.2*p.d)
    assert int((model.tied.weight != 0).sum() + (model.head.weight != 0).sum()) == p.keep


def test_closure_and_ignored_layers():
    "step(closure) prunes as step() does; ignored layers stay dense and out of the count"
    runs = []
    for closed in (False, True):
        model, opt, p = start(Taylor, ignore='4', updates=5)
        def evaluate(i):
            opt.zero_grad()
            l = loss(model, i)
            l.backward()
            return l
        for i in range(60):
            if closed: opt.step(lambda: evaluate(i))
            else: evaluate(i), opt.step()
        assert p.names == ['0.weight', '2.weight'] and (model[4].weight != 0).all()
        assert p.left == p.keep == round(.2*(13*11 + 11*7))
        runs.append(p)
    assert torch.equal(mask(runs[0]), mask(runs[1])) and torch.equal(weights(runs[0]), weights(runs[1]))


def test_rigl_leaves_alone_what_had_no_gradient():
    "As the optimiser does, and as gates do (design.md)"
    model, opt, p = start(Swift, build=Heads)                        # head b never computes
    before = [m.clone() for m in p.masks]
    train(model, opt, 0, 11)
    assert p.names[2] == 'b.weight' and not torch.equal(before[0], p.masks[0])
    assert torch.equal(before[2], p.masks[2])


def test_rigl_forgets_what_all_processes_grow(monkeypatch):
    "The mask of process 0 counts, also for whose momentum is cleared"
    model, opt, p = start(Swift, sgd)
    other = {}
    def broadcast(mask, src):                                        # process 0 grows others, as many in each layer
        other['mask'] = torch.cat([m[torch.randperm(len(m), generator=g0)] for m in mask.split(p.sizes)])
        mask.copy_(other['mask'])
    train(model, opt, 0, 9)
    before = mask(p)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'broadcast', broadcast)
    for w in p.params: opt.state[w]['momentum_buffer'].fill_(1.)
    train(model, opt, 9, 10)
    new = mask(p) > before
    assert other and torch.equal(mask(p), other['mask']) and new.any()
    assert (vector(opt.state[w]['momentum_buffer'] for w in p.params)[new] == 0).all()


# Two processes

def test_two_processes(): together(2, agree)


def agree(world):
    """Under DDP, each process on its half of each batch, all methods end with one mask and one network; what is sharded
    is refused"""
    from torch.nn.parallel import DistributedDataParallel as DDP
    half = slice(world.rank, None, 2)
    for kind in (Random, GMP, Swift, SNIP, GraSP, Taylor, IMP):
        torch.manual_seed(1)
        model = mlp()
        net, opt = DDP(model), sgd(model)
        more = dict(batch=(xs[half], ys[half])) if issubclass(kind, SNIP) else dict(levels=3) if kind is IMP else {}
        p = kind(model, opt, sparsity=.8, steps=60, **more)
        p.start()
        masks = []
        for i in range(60):
            opt.zero_grad()
            F.cross_entropy(net(xs[half]), ys[half]).backward()
            opt.step()
            masks.append(mask(p))
            assert (weights(p)[masks[-1] == 0] == 0).all()
        theirs = world.gather((torch.stack(masks), weights(p)))[1 - world.rank]
        assert torch.equal(theirs[0], torch.stack(masks)) and torch.equal(theirs[1], weights(p)), kind
        assert p.left == p.keep == round(.2*p.d), kind
        p.detach()

    net = DDP(mlp())                                                 # the wrapper itself is a model, too
    opt = sgd(net)
    p = SNIP(net, opt, sparsity=.8, steps=60, batch=(xs[half], ys[half]))
    p.start()
    assert p.names[0] == 'module.0.weight'
    for i in range(3):
        opt.zero_grad()
        F.cross_entropy(net(xs[half]), ys[half]).backward()
        opt.step()
    assert torch.equal(world.gather(weights(p))[1 - world.rank], weights(p)) and int((weights(p) != 0).sum()) == p.keep
    p.detach()

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model = fully_shard(mlp(), mesh=init_device_mesh('cpu', (2,)))
    for kind in METHODS:
        with refuses(f'{kind.__name__} works on whole weights, and these are cut by fully_shard: use DDP'):
            make(kind, model, sgd(model))
