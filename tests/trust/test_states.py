"""Kind 7: a state that contradicts what was asked is refused by both values, and nothing is half loaded. Kind 10:
norms, modes and rates that follow nothing."""
import copy, dataclasses, functools, io

import pytest, torch
from torch import nn

from hyperflux import Hyperflux, Settings, authors
from hyperflux.rivals.scores import GMP, Progressive
from hyperflux.rivals.imp import IMP
from hyperflux.rivals.l0 import L0
from hyperflux.core.control import LogController
from hyperflux.core.norms import renew_norms, stale_norms
from tests.helpers import METHODS, accuracy, loss, mlp, nnz, said, train, x, y

quiet = pytest.mark.filterwarnings('ignore')
methods = pytest.mark.parametrize('make', [m for _, m in METHODS], ids=[n for n, _ in METHODS])


def adam(model): return torch.optim.Adam(model.parameters(), lr=.01)


# 60 steps are too few for their 0.001
def theirs(task): return dataclasses.replace(authors(60, 60, task), lr=.05)


def through_a_file(state):
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return torch.load(f, weights_only=True)


def everything(model, opt, p): # Of all that can change, a copy
    return copy.deepcopy([model.state_dict(), opt.state_dict()['state'], p.mask, p.step, p.asked(), p.stage])


def equal(a, b):
    if torch.is_tensor(a): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refused(q, model, opt, state, says):
    "By a ValueError that matches, with nothing changed"
    before = everything(model, opt, q)
    with pytest.raises(ValueError, match=says): q.load_state_dict(state)
    assert equal(before, everything(model, opt, q))


@quiet
@methods
def test_another_goal(make):
    "Sparsity or steps other than the state's: both values are named"
    model = mlp()
    opt = adam(model)
    p = make(model, opt, .5, 120)
    train(model, opt, 40)
    state = through_a_file(p.state_dict())
    for sparsity, steps, says in (.9, 120, 'sparsity=0.5.*sparsity=0.9'), (.5, 240, 'steps=120.*steps=240'):
        other = mlp()
        o = adam(other)
        refused(make(other, o, sparsity, steps), other, o, state, says)


@quiet
@pytest.mark.parametrize('kind, mine, theirs, says', [
    (Hyperflux, {}, dict(settings=Settings(prune=.8, settle=.1)), 'prune=0.8.*prune=0.5'),
        (Hyperflux, {}, dict(settings=Settings(settle=.1)), 'settle=0.1'),
    (Hyperflux, {}, dict(settings=Settings(trajectory=lambda p, target: target)),
     'trajectory=.*<lambda>.*trajectory=.early'),
    (Hyperflux, {}, dict(settings=Settings(controller=functools.partial(LogController, start=3.))),
     'controller=.LogController.start=3.0.*controller=.LogController'),
    (Hyperflux, {}, dict(settings=theirs('lenet')), 'this pruner was asked for'), (Hyperflux, {}, dict(pressure=.5),
                                                                                   'pressure=0.5.*pressure=None'),
    (Hyperflux, dict(settings=theirs('lenet')), dict(settings=theirs('cifar')), 'dip=0.8.*dip=1.0'),
    (GMP, dict(span=(.1, .5)), dict(span=(0., .5)), 'begin=0.*begin=12'),
        (GMP, {}, dict(updates=7), 'updates=7.*updates=100'),
    (L0, dict(span=(0, .9)), dict(span=(0, .85)), 'end=102.*end=108'),
        (L0, dict(span=(0, .9)), dict(span=(0, .9), travel=50.), 'travel=50.0.*travel=120.0'),
    (IMP, dict(levels=2), dict(levels=3), 'levels=3.*levels=2'), (IMP, dict(levels=2, rewind=5), dict(levels=2),
                                                                  'rewind=0.*rewind=5')])
def test_other_settings(kind, mine, theirs, says):
    "Settings other than the state's: both values are named; with the same, the run goes on"
    def begin(how):
        model = mlp()
        opt = adam(model)
        return model, opt, kind(model, opt, sparsity=.5, steps=120, **how)
    model, opt, p = begin(theirs)
    train(model, opt, 30)
    state = through_a_file(p.state_dict())
    model, opt, q = begin(mine)
    refused(q, model, opt, state, says)
    model, opt, q = begin(theirs)
    q.load_state_dict(state)
    assert q.step == 30


@quiet
def test_other_kind_shape_or_part():
    "A state of another method or network, one with something missing, one with a wrong shape"
    model = mlp()
    opt = adam(model)
    p = Hyperflux(model, opt, sparsity=.5, steps=120)
    train(model, opt, 30)
    state = through_a_file(p.state_dict())
    def attempt(kind, net, state, says):
        o = adam(net)
        refused(kind(net, o, sparsity=.5, steps=120), net, o, state, says)
    attempt(GMP, mlp(), state, "kind is 'Hyperflux', here it is 'GMP'")
    attempt(Hyperflux, nn.Sequential(nn.Linear(20, 31), nn.Linear(31, 4)), state, 'names is|sizes is')
    for key in 'value', 'moments', 'presence', 'step', 'mask':
        attempt(Hyperflux, mlp(), {k: v for k, v in state.items() if k != key}, f'not whole: it lacks {key}')
    attempt(Hyperflux, mlp(), state | dict(value=torch.zeros(3)), 'its value has \\(3,\\), here it is \\(768,\\)')
    attempt(Hyperflux, mlp(), state | dict(moments=[torch.zeros(3), torch.zeros(768)]), 'its moments has')


@quiet
def test_state_of_version_0_1():
    "A state from before, which says less of what was asked, is still taken where sparsity and steps agree"
    model = mlp()
    opt = adam(model)
    p = Progressive(model, opt, sparsity=.5, steps=120)
    train(model, opt, 30)
    old = {k: v for k, v in p.state_dict().items() if k not in ('asked', 'rate')}
    q = Progressive(other := mlp(), adam(other), sparsity=.5, steps=120, updates=7)
    q.load_state_dict(old)
    assert q.step == 30
    refused(Progressive(other := mlp(), o := adam(other), sparsity=.6, steps=120), other, o, old,
            'sparsity=0.5.*sparsity=0.6')


@quiet
@methods
def test_goes_on_bit_for_bit(make):
    "And where all agrees, a run that is loaded in mid-run ends in the same bits"
    def begin():
        model = mlp()
        opt = adam(model)
        return model, opt, make(model, opt, .9, 120)
    model, opt, p = begin()
    train(model, opt, 50)
    states = through_a_file([o.state_dict() for o in (model, opt, p)])
    train(model, opt, 70)
    other = begin()
    for o, s in zip(other, states): o.load_state_dict(s)
    train(*other[:2], 70)
    assert equal([v for v in model.state_dict().values()], [v for v in other[0].state_dict().values()])
    assert torch.equal(p.mask, other[2].mask)


# Norms, modes and rates

def normed(momentum=.1):
    torch.manual_seed(0)
    block = lambda i, o: [nn.Linear(i, o), nn.BatchNorm1d(o, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*block(20, 32), *[l for _ in range(4) for l in block(32, 32)], nn.Linear(32, 4))


class FrozenBatchNorm1d(nn.Module):
    "As torchvision's for images: buffers that never change"
    def __init__(self, n): super().__init__(); self.register_buffer('running_mean', torch.zeros(n))
    def forward(self, x): return x - self.running_mean


def start(model, kind=GMP, steps=60, lr=.05, **kw):
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)
    return opt, kind(model, opt, sparsity=.8, steps=steps, **kw)


def still(model):
    for m in model: m.train(not isinstance(m, nn.BatchNorm1d))
    return model


@pytest.mark.parametrize('build, says', [
    (lambda: normed(momentum=0.), ['5 norms', '1 (momentum 0)', 'momentum=0.1', 'renew_norms']),
        (lambda: still(normed()), ['1 (evaluation mode)', 'model.train()']),
    (lambda: nn.Sequential(nn.Linear(20, 32), FrozenBatchNorm1d(32), nn.Linear(32, 4)),
     ['1 (frozen statistics)', 'BatchNorm'])])
def test_norms_that_will_not_follow(build, says):
    "One line at construction names the norms and the way out"
    model, keep = build(), []
    texts = [t for t in said(lambda: keep.append(start(model))) if 'norm' in t]
    assert len(texts) == 1 and all(s in texts[0] for s in says), texts
    opt, p = keep[0]
    assert [t for t in said(train, model, opt, 20) if 'norm' in t] == []               # once


def test_model_left_in_eval_mode():
    "Made in evaluation mode is no fault; trained in it is, and is said at the first step, or where it begins"
    model, keep = normed().eval(), []
    assert said(lambda: keep.append(start(model))) == []
    assert sum('evaluation mode' in t for t in said(train, model, keep[0][0], 1)) == 1
    model = normed()
    opt, p = start(model)
    assert said(train, model, opt, 20) == []
    model.eval()
    assert sum('evaluation mode' in t for t in said(train, model, opt, 20)) == 1


def test_nothing_to_say_of_norms():
    "Ordinary norms, and those that keep no statistics, in either mode"
    for model in normed(), nn.Sequential(nn.Linear(20, 32), nn.LayerNorm(32),
                                         nn.BatchNorm1d(32, track_running_stats=False), nn.Linear(32, 4)).eval():
        keep = []
        assert said(lambda: keep.append(start(model))) == [] and said(train, model, keep[0][0], 30) == []


@quiet
def test_statistics_set_anew():
    """The advice works: a network pruned with frozen statistics computes with those of its data afterwards, and all
    else is as it was"""
    model = normed(momentum=0.)
    opt, p = start(model, steps=200)
    train(model, opt, 200)
    model.eval()
    before, weights = loss(model).item(), [w.clone() for w in model.parameters()]
    assert renew_norms(model, [(x, y)]*3) == 3
    assert loss(model).item() < before/2 and accuracy(model) > .9
    assert not model.training and all(m.momentum == 0 for m in model if isinstance(m, nn.BatchNorm1d))
    assert all(map(torch.equal, weights, model.parameters())) and nnz(p) == p.keep
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))


@pytest.mark.parametrize('model, loader, says', [(mlp(), [x], 'no batch norm'), (normed(), [], 'gives no batch'),
                                                (nn.Sequential(FrozenBatchNorm1d(20)), [x],
                                                 'frozen statistics that cannot be set')])
def test_statistics_that_cannot_be_set(model, loader, says):
    "Nothing to set, or nothing to set it from: an error, and nothing changed"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says): renew_norms(model, loader)
    assert equal(before, model.state_dict())


def test_stale_norms_by_name():
    model = normed()
    # None: a plain mean, which follows
    model[1].momentum, model[4].momentum = 0, None
    model[7].eval()
    assert stale_norms(model) == {'1': 'momentum 0', '7': 'evaluation mode'}


@pytest.mark.parametrize('kind, steps', [(GMP, 100), (Hyperflux, 120)])
def test_learning_rate_that_never_falls(kind, steps):
    """Said once, at the last step of a run of a hundred or more; not with a schedule, nor with warm-up and a schedule,
    nor after a reload in the tail of one"""
    def run(schedule=None, reload=False):
        model = mlp()
        opt, p = start(model, kind, steps, lr=.01)
        def texts(n, scheduler):
            def step(_): scheduler and scheduler.step()
            return [t for t in said(train, model, opt, n, step) if 'learning rate' in t and 'density' not in t]
        scheduler = schedule and schedule(opt)
        if not reload: return texts(steps, scheduler)
        texts(steps - 10, scheduler)
        state = p.state_dict()
        p.detach()
        p = kind(model, opt, sparsity=.8, steps=steps)
        p.load_state_dict(state)
        return texts(10, None)                                                      # constant from here on, and low
    text, = run()
    assert '0.01 at the last step' in text and 'CosineAnnealingLR' in text
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    assert run(cosine) == run(cosine, reload=True) == []
    assert run(lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(i/10, 1 - i/steps) + .1)) == []
