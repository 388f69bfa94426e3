"Several optimisers, several pruners, averages, errors, and what is left behind."
import copy, gc

import pytest, torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hyperflux import Hyperflux, Settings
from hyperflux.rivals.scores import GMP
from hyperflux.rivals.imp import IMP

from tests.helpers import accuracy, loss, mlp, nnz, said, train
from tests.trust.optimizers import (
    make, both, with_methods, length, exact, holds, run, same, optimizer_of, Mine, lookahead, sam,
    train_sam, Wrapper)


@both
def test_another_optimizer_trains_instead(method):
    """The pruner stands around one optimiser, and another one of the same weights trains: one warning, and the report
    tells the truth"""
    m = mlp()
    forgotten, o = SGD(m.parameters(), lr=.1), SGD(m.parameters(), lr=.1)
    p = make[method](m, forgotten, .8, 120)
    texts = said(train, m, o, 20)
    assert sum('make the pruner with the optimiser that trains' in t for t in texts) == 1 and p.left == nnz(p)
    assert p.step == 0
    assert 'step 0 of 120' in repr(p)


@both
def test_another_optimizer_takes_over(method):
    """Half-way through another optimiser takes over, as where a schedule ends with SGD: the zeros that there are hold,
    and one warning says so"""
    m = mlp()
    p = make[method](m, o := Adam(m.parameters(), lr=.01), .8, 40)
    said(train, m, o, 20)
    zeros = p.mask == 0
    texts = said(train, m, SGD(m.parameters(), lr=.1), 20, lambda i: nnz(p) == p.left <= p.present
                 or pytest.fail(f'at step {i}'))
    assert sum('make the pruner with the optimiser that trains' in t for t in texts) == 1
    assert torch.equal(p.mask == 0, zeros) and 'step 20 of 40' in repr(p)


@with_methods('kind', ['SGD', 'timm lookahead_sgd'])
def test_a_shared_trunk(kind, name):
    "Two optimisers over a trunk that two tasks share take turns: the zeros hold at every step, and nobody warns"
    m = mlp()
    head = nn.Linear(32, 2)
    o = SGD(m.parameters(), lr=.05, momentum=.9)
    p = make[name](m, o, .8, length(name))
    if 'lookahead' in kind: pytest.importorskip('timm.optim')
    other = optimizer_of(kind, nn.ModuleList([m[0], head])) if 'timm' in kind else SGD([*m[0].parameters(),
        *head.parameters()], lr=.05, momentum=.9)
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))

    def second(i):
        other.zero_grad()
        head(m[0](x).relu()).pow(2).mean().backward()
        other.step()
        assert holds(p)
    texts = said(train, m, o, p.steps, second)
    assert p.step == p.steps and exact(p) and not any('absent' in t or 'trains' in t for t in texts)


class ScheduleFree(Optimizer):
    "SGD at y, with an average x that eval() puts into the model and train() takes out again"
    def __init__(self, params, lr, beta=.9):
        super().__init__(params, dict(lr=lr, beta=beta, k=0, training=True))
    def each(self): return ((p, self.state[p], g) for g in self.param_groups for p in g['params'])
    @torch.no_grad()
    def eval(self): self.swap(False, lambda p, z, beta: p.lerp_(z, 1 - 1/beta))         # y → x
    @torch.no_grad()
    def train(self): self.swap(True, lambda p, z, beta: p.lerp_(z, 1 - beta))           # x → y
    def swap(self, to, move):
        for p, s, g in self.each():
            if 'z' in s and g['training'] != to: move(p.data, s['z'], g['beta'])
        for g in self.param_groups: g['training'] = to
    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups: g['k'] += 1
        for p, s, g in self.each():
            if p.grad is None: continue
            z, c = s.setdefault('z', p.detach().clone()), 1/g['k']
            p.data.lerp_(z, c).add_(p.grad, alpha=g['lr']*(g['beta']*(1 - c) - 1))
            z.sub_(p.grad, alpha=g['lr'])


def schedule_free(kind, model):
    if kind == 'own': return ScheduleFree(model.parameters(), lr=.5)
    o = getattr(pytest.importorskip('schedulefree'), kind)(model.parameters(), lr=.5 if 'SGD' in kind else .01)
    o.train()
    return o


@with_methods('kind', ['own', 'SGDScheduleFree', 'AdamWScheduleFree'])
def test_an_optimizer_that_swaps_weights(kind, name):
    """eval() puts an average into the model, train() takes it out again, every now and then: the zeros hold in both,
    and the target is met in both"""
    m = mlp()
    o = schedule_free(kind, m)
    p = make[name](m, o, .8, length(name))

    def look(i):
        assert holds(p)
        if i % 13 and i != p.steps - 1: return
        was = [w.detach().clone() for w in m.parameters()]
        for mode in o.eval, o.train:
            mode()
            assert holds(p), (i, mode)
        for w, v in zip(m.parameters(), was): torch.testing.assert_close(w.detach(), v, rtol=1e-3, atol=1e-4)
    texts = said(train, m, o, p.steps, look)
    o.eval()
    assert exact(p) and not any('absent weights' in t for t in texts)


@with_methods('where', ['closure', 'step', 'after the step'])
def test_an_exception_in_a_step(where, name):
    """What raises in the closure, or in the step itself, is nobody's step: the zeros hold, training goes on and lands
    exactly"""
    class Fails(SGD):
        at = None
        def step(self, closure=None):
            if self.at == 'step': raise KeyError('step')
            value = super().step(closure)
            if self.at == 'after the step': raise KeyError('after the step')
            return value
    m = mlp()
    o = Fails(m.parameters(), lr=.1, momentum=.9)
    p = make[name](m, o, .8, length(name))

    def closure():
        m.zero_grad()
        l = loss(m)
        l.backward()
        if o.at == 'closure': raise KeyError('closure')
        return l

    def loop():
        for i in range(p.steps):
            if i % 15 == 14:
                o.at, left = where, p.left
                with pytest.raises(KeyError, match=where): o.step(closure)
                o.at = None
                assert holds(p) and p.step == i and (p.left == left or name == 'L0')
            o.step(closure)
            assert holds(p) and p.step == i + 1
    said(loop)
    assert exact(p)


def traces(o):
    "What could be left behind on an optimiser, and for all optimisers"
    methods = {k: id(v) for k, v in vars(o).items() if callable(v)}
    hooks = {k: list(v) for k, v in vars(o).items() if k.endswith('_hooks')}
    return sorted(vars(o)), methods, hooks, list(_global_optimizer_pre_hooks), list(_global_optimizer_post_hooks)


@with_methods('kind', ['SGD', 'Mine', 'Lookahead', 'SAM', 'ScheduleFree', 'with a scheduler'])
def test_detach_leaves_nothing_behind(kind, name):
    """An optimiser has the methods and hooks that it had, and there are none for all optimisers; then it trains dense
    again"""
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    o = dict(Mine=lambda: Mine(m.parameters(), lr=.1), Lookahead=lambda: lookahead(o), SAM=lambda: sam(m),
             ScheduleFree=lambda: schedule_free('own', m)).get(kind, lambda: o)()
    scheduler = LambdaLR(o, lambda i: 1.) if 'scheduler' in kind else None
    go = train_sam if kind == 'SAM' else train
    # after which PyTorch and schedulers leave marks of their own
    go(m, o, 1)
    before = traces(o)
    p = make[name](m, o, .8, length(name))
    said(go, m, o, 20)
    zeros = 768 - nnz(p)
    assert zeros and traces(o) != before
    p.detach()
    assert traces(o) == before
    p.detach()                                                                  # once more is no harm
    go(m, o, 5)
    assert nnz(p) > 768 - zeros
    if scheduler: scheduler.step()
    assert traces(o) == before


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
@both
def test_two_pruners_of_one_optimizer(method, order):
    "Two layers, two targets, one optimiser: each is exact, and whichever is detached first, nothing is left behind"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    train(m, o, 1)
    before = traces(o)
    how = dict(settings=Settings(lr=.1)) if method == 'Hyperflux' else {}
    ps = [(Hyperflux if how else GMP)(m, o, sparsity=s, steps=40, targets=t, **how) for t, s in (('0', .8), ('2', .5))]
    said(train, m, o, 40, lambda i: all(map(holds, ps)) or pytest.fail(f'at step {i}'))
    assert all(map(exact, ps)) and [p.keep for p in ps] == [128, 64] and [p.step for p in ps] == [40, 40]
    ps[order[0]].detach()
    said(train, m, o, 2)
    assert nnz(ps[order[1]]) == ps[order[1]].keep and nnz(ps[order[0]]) > ps[order[0]].keep
    ps[order[1]].detach()
    assert traces(o) == before


def test_no_hooks_for_all_optimizers():
    """However many pruners there are, they hear of the steps of all optimisers once; with the last of them that ends,
    and that is all"""
    def count(): return len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    def one(): m = mlp(); return GMP(m, SGD(m.parameters(), lr=.1), sparsity=.5, steps=10)
    gc.collect()
    before = count()                                                            # other tests may have left theirs
    for order in (0, 1, 2), (2, 0, 1):
        ps = [one() for _ in order]
        assert count() == (1, 1)
        for i in order: ps[i].detach()
        assert count() in (before, (0, 0))


@pytest.mark.parametrize('kind, method',
                         [('SGD', 'GMP'), *((k, 'Hyperflux') for k in ('SGD', 'Mine', 'Lookahead', 'Wrapper'))])
@pytest.mark.parametrize('how', ['in its place', 'by name', 'none in its place', 'none by name'])
def test_a_closure_given_in_any_way(how, kind, method):
    "A closure may come in its place or by name, or be None: the same steps, and the loss comes back"
    def go(how):
        m = mlp()
        o = dict(SGD=lambda: SGD(m.parameters(), lr=.1), Mine=lambda: Mine(m.parameters(), lr=.1),
                 Lookahead=lambda: lookahead(SGD(m.parameters(), lr=.1)),
                 Wrapper=lambda: Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.1)))[kind]()
        p = make[method](m, o, .8, 40)

        def closure():
            m.zero_grad()
            l = loss(m)
            l.backward()
            return l

        def loop():
            for _ in range(40):
                if how is None or 'none' in how: closure()
                if how is None: o.step()
                else:
                    given = None if 'none' in how else closure
                    value = o.step(given) if 'place' in how else o.step(closure=given)
                    assert value is None if given is None else value > 0
        said(loop)
        assert exact(p)
        return p, [w.detach().clone() for w in m.parameters()]
    assert same(go(how), go(None))


@both
def test_named_parameters(method):
    "An optimiser of named parameters is one of parameters"
    assert same(run(method, lambda m: SGD(m.named_parameters(), lr=.1)),
                run(method, lambda m: SGD(m.parameters(), lr=.1)))


@both
def test_pruners_that_are_dropped(method):
    "Sixty pruners made and detached, some in a failed construction: no hooks pile up, and the last one is exact"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    train(m, o, 1)
    before = traces(o)
    for i in range(20):
        make[method](m, o, .8, 40).detach()
        with pytest.raises((ValueError, TypeError)): make[method](m, o, 1.5, 40)
        with pytest.raises(ValueError): make[method](m, SGD(m[0].parameters(), lr=.1), .8, 40)
    assert traces(o) == before
    p = make[method](m, o, .8, 40)
    said(train, m, o, 40)
    assert exact(p)


@both
def test_a_copied_optimizer(method):
    "A deep copy of model and optimiser trains for itself: it is not the one that is pruned, which goes on exactly"
    m = mlp()
    o = SGD(m.parameters(), lr=.1, momentum=.9)
    p = make[method](m, o, .8, 40)
    said(train, m, o, 20)
    left = nnz(p)
    m2, o2 = copy.deepcopy((m, o))
    train(m2, o2, 5)
    assert nnz(p) == left and p.step == 20
    said(train, m, o, 20)
    assert exact(p) and p.step == 40


def test_imp_rewinds_an_inner_optimizer():
    "IMP trains anew with the state of a new optimiser, also where a wrapper drives the one that has it"
    def end(wrap):
        m = mlp()
        o = SGD(m.parameters(), lr=.1, momentum=.9)
        o = Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.1, momentum=.9)) if wrap else o
        p = IMP(m, o, sparsity=.8, steps=40)
        said(train, m, o, 40)
        return p, [w.detach().clone() for w in m.parameters()]
    assert same(end(False), end(True)) and accuracy(mlp()) < .6
