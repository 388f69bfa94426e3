"""The rivals against independent means: torch's own pruning, float64 autograd written the long way, formulas in fractions, books kept by hand."""
import copy, io, math, os, random, signal, subprocess, sys
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.func import functional_call

from hyperflux.rivals import baselines
from hyperflux.rivals.scores import GMP, IMP, Baseline, LayerMagnitude, Magnitude, Progressive, Random, apportion, imp_levels, top
from hyperflux.rivals.gradients import GraSP, RigL, SNIP, Taylor, erk

root = Path(__file__).parents[1]
g0 = torch.Generator().manual_seed(0)
xs, ys = torch.randn(96, 13, generator=g0), torch.randint(5, (96,), generator=g0)       # random labels: gradients never fade


class Swift(RigL):
    "RigL for short runs"
    every = 10


METHODS = Random, Magnitude, LayerMagnitude, GMP, Progressive, Taylor, SNIP, GraSP, Swift, IMP
every_method = pytest.mark.parametrize('kind', METHODS, ids=lambda k: k.__name__)


def mlp(): return nn.Sequential(nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 5))
def conv():
    "Plain and transposed convolutions, BN, biases; smooth"
    return nn.Sequential(nn.Unflatten(1, (1, 13, 1)), nn.Conv2d(1, 6, (3, 1)), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, (3, 1), groups=2, bias=False), nn.BatchNorm2d(4),
                         nn.Tanh(), nn.ConvTranspose2d(4, 3, (3, 1)), nn.Flatten(), nn.Linear(33, 5))
def last(): return conv().to(memory_format=torch.channels_last)
def wide():
    "13,000 weights of five kinds of layers, in float64, so that no two are equal; not to be run"
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 24, 3, bias=False), c=nn.Conv1d(5, 8, 2), d=nn.Linear(130, 70), e=nn.Linear(70, 1))).double()
    for w in model.parameters(): nn.init.normal_(w)
    return model


class Heads(nn.Module):
    "Two heads, of which `use` says the one that computes"
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b, self.use = nn.Linear(13, 11), nn.Linear(11, 5), nn.Linear(11, 5), 'a'
    def forward(self, x): return getattr(self, self.use)(self.body(x).tanh())


def sgd(model, **kw): return torch.optim.SGD(model.parameters(), **dict(dict(lr=.1, momentum=.9, weight_decay=5e-3), **kw))
def adam(model, **kw): return torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2, **kw)
def adamw(model, **kw): return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=.1, **kw)


def make(kind, model, opt, **how):
    "A pruner; SNIP and GraSP get the batch they look at"
    x = xs.to(next(model.parameters()).dtype)
    more = dict(batch=(x, ys)) if issubclass(kind, SNIP) else dict(levels=4) if kind is IMP else {}
    return kind(model, opt, **dict(sparsity=.8, steps=60) | more | how)


def start(kind, optimizer=sgd, build=mlp, seed=1, hear=None, **how):
    "A seeded model, its optimiser and a pruner of it; `hear` is called after the optimiser has moved and before the pruner acts"
    torch.manual_seed(seed)
    model = build()
    opt = optimizer(model)
    if hear: opt.register_step_post_hook(lambda *_: hear())
    return model, opt, make(kind, model, opt, **how)


def loss(model, i=0):
    part = slice(i % 3*32, i % 3*32 + 32)
    return F.cross_entropy(model(xs[part].to(next(model.parameters()).dtype)), ys[part])


def train(model, opt, begin, end, look=lambda i: None, loss=loss):
    for i in range(begin, end):
        opt.zero_grad()
        loss(model, i).backward()
        opt.step()
        look(i + 1)


def vector(tensors): return torch.cat([t.detach().reshape(-1) for t in tensors])          # in the logical order of the weights
def mask(p): return vector(p._masks)
def weights(p): return vector(p.params)
def refuses(match, error=ValueError): return pytest.raises(error, match=match)


# Magnitude equals torch.nn.utils.prune

@pytest.mark.parametrize('sparsity', [.1, .5, .9, .98])
@pytest.mark.parametrize('build', [mlp, conv, last, wide])
def test_magnitude_equals_torch(build, sparsity):
    "Global: one call of torch's; layerwise: one for each layer, and where round(s·n) is what we remove, the very same call a user would write"
    model, _, p = start(Magnitude, build=build, sparsity=sparsity)
    fresh = lambda: start(Random, build=conv if build is last else build, sparsity=0.)       # torch's own wants them contiguous
    twin = fresh()[0]
    layers = [twin.get_submodule(n.rpartition('.')[0]) for n in p.names]
    before = weights(fresh()[2])
    assert len(before.abs().unique()) == p.d                          # no ties, or the choice would be free
    torch_prune.global_unstructured([(m, 'weight') for m in layers], torch_prune.L1Unstructured, amount=p.d - p.keep)
    assert torch.equal(mask(p), vector(m.weight_mask for m in layers)) and p.left == p.keep == round((1 - sparsity)*p.d)
    assert torch.equal(weights(p), vector(m.weight for m in layers))

    p = start(LayerMagnitude, build=build, sparsity=sparsity)[2]
    twin, same = fresh()[0], 0
    for n, row, ours in zip(p.names, p.layers(), p._masks):
        m, gone = twin.get_submodule(n.rpartition('.')[0]), row['weights'] - row['left']
        same += gone == round(sparsity*row['weights'])
        assert abs(gone - sparsity*row['weights']) < 1
        torch_prune.l1_unstructured(m, 'weight', amount=sparsity if gone == round(sparsity*row['weights']) else gone)
        assert torch.equal(ours, m.weight_mask)
    assert p.left == p.keep and same >= len(p.names) - 2


def test_absent_have_no_gradient():
    "As with the mask in the graph: what is absent gathers no momentum, and what the optimiser is given is the masked gradient"
    model, opt, p = start(Magnitude, lambda m: sgd(m, weight_decay=0.))
    loss(model).backward()
    grads = vector(w.grad for w in p.params)
    opt.step()
    buffers = vector(opt.state[w]['momentum_buffer'] for w in p.params)
    assert torch.equal(buffers, grads*mask(p)) and (grads[mask(p) == 0] != 0).sum() > 50


def test_random_is_uniform_and_seeded():
    "Each weight goes equally often, whatever its layer; the same seed, the same mask; torch's generator is not touched"
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = wide()
    torch.set_rng_state(state)
    counts = sum(mask(Random(m := copy.deepcopy(model), sgd(m), sparsity=.75, steps=9, seed=s)) for s in range(200))
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(counts.mean() - 50) < .01 and abs(counts.var() - 200*.25*.75) < 2        # binomial: 37.5, of 13,000 weights
    a, b, c = (mask(start(Random, seed=k)[2]) for k in (1, 2, 3))
    model = mlp()
    other = mask(Random(model, sgd(model), sparsity=.8, steps=60, seed=1))
    assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a, other) and other.sum() == a.sum() == 51


# SNIP and GraSP equal derivatives written the long way

def dropped(): return nn.Sequential(nn.Linear(13, 9), nn.BatchNorm1d(9), nn.Dropout(.3), nn.Tanh(), nn.Linear(9, 5))


def unpruned(kind, build, **how):
    "The method with nothing to remove, and its score"
    torch.manual_seed(3)
    model = build().double()
    p = make(kind, model, sgd(model), sparsity=0., **how)
    p.batch = (xs.double(), ys)
    torch.manual_seed(7)                                             # dropout draws the same in the twin
    with torch.no_grad(): return model, p, vector(p._views(p.score()))


def with_weights(model, p, values): return lambda x: functional_call(model, dict(zip(p.names, values)), (x,))


@pytest.mark.parametrize('build', [mlp, conv, dropped])
def test_snip_equals_switches(build):
    "∂L/∂c at c = 1 with a switch on each weight, by autograd and by central differences"
    model, p, score = unpruned(SNIP, build)
    twin = copy.deepcopy(model).train()
    def value(switches):
        torch.manual_seed(7)
        return F.cross_entropy(with_weights(twin, p, [c*w.detach() for c, w in zip(switches, p.params)])(xs.double()), ys)
    switches = [torch.ones_like(w).requires_grad_() for w in p.params]
    reference = vector(torch.autograd.grad(value(switches), switches)).abs()
    torch.testing.assert_close(score, reference, rtol=1e-10, atol=1e-14)
    for i in range(0, p.d, 17):
        def at(e):
            c = torch.ones(p.d, dtype=torch.float64)
            c[i] += e
            return value([v.view_as(w) for v, w in zip(c.split(p.sizes), p.params)]).item()
        assert score[i] == pytest.approx(abs(at(1e-5) - at(-1e-5))/2e-5, rel=1e-4, abs=1e-9)

    p.detach()
    torch.manual_seed(7)
    q = SNIP(model, sgd(model), sparsity=.7, steps=60, batch=(xs.double(), ys))
    assert sorted(mask(q).nonzero().flatten().tolist()) == sorted(reference.argsort(descending=True)[:q.keep].tolist())


def tiny(): return nn.Sequential(nn.Linear(13, 3), nn.Tanh(), nn.Linear(3, 5))


@pytest.mark.parametrize('build', [tiny, dropped])
def test_grasp_equals_hessian(build):
    "θ·Hg with the whole Hessian, with a difference of gradients, and as what it means: the slope of |g|² as a weight fades. The highest −θ·Hg goes"
    model, p, score = unpruned(GraSP, build)
    twin, theta = copy.deepcopy(model).train(), weights(p)
    torch.manual_seed(7)
    keep = F.dropout(torch.ones(96, 9, dtype=torch.float64), .3)      # once: it is not functorch's to draw
    def value(v):
        parts = [u.view_as(w) for u, w in zip(v.split(p.sizes), p.params)]
        if build is dropped: return _dropped_by_hand(twin, parts, keep)
        return F.cross_entropy(with_weights(twin, p, parts)(xs.double())/200, ys)
    gradient = lambda v: torch.autograd.grad(value(v := v.clone().requires_grad_()), v)[0]
    g = gradient(theta)
    H = torch.func.hessian(value)(theta)
    assert torch.allclose(H, H.T, atol=1e-12)
    torch.testing.assert_close(score, theta*(H @ g), rtol=1e-8, atol=1e-16)
    e = 1e-3/float(g.norm())
    torch.testing.assert_close(score, theta*(gradient(theta + e*g) - gradient(theta - e*g))/(2*e), rtol=1e-3, atol=float(score.abs().max())*1e-5)
    for i in range(0, p.d, 7):
        fade = torch.zeros_like(theta)
        fade[i] = -theta[i]                                          # towards the removal of weight i
        slope = (gradient(theta + 1e-4*fade).square().sum() - gradient(theta - 1e-4*fade).square().sum())/2e-4
        assert float(slope) == pytest.approx(-2*float(score[i]), rel=1e-3, abs=1e-5*float(score.abs().max()))

    p.detach()
    torch.manual_seed(7)
    q = GraSP(model, sgd(model), sparsity=.7, steps=60, batch=(xs.double(), ys))
    harm = -theta*(H @ g)                                            # the paper's score
    assert set((mask(q) == 0).nonzero().flatten().tolist()) == set(harm.argsort(descending=True)[:q.d - q.keep].tolist())
    assert harm.min() < 0 < harm.max() and not torch.equal(mask(q), top(score.abs(), q.keep))


def _dropped_by_hand(twin, parts, keep):
    "The same network in formulas: nothing of the module but its biases and BN's scale"
    h = xs.double() @ parts[0].T + twin[0].bias
    h = (h - h.mean(0))/(h.var(0, unbiased=False) + 1e-5).sqrt()*twin[1].weight + twin[1].bias
    out = (h*keep).tanh() @ parts[1].T + twin[4].bias
    return F.cross_entropy(out/200, ys)


@pytest.mark.parametrize('kind', [SNIP, GraSP])
@pytest.mark.parametrize('fails', [False, True], ids=['', 'loss fails'])
def test_a_look_leaves_no_trace(kind, fails):
    "Modes, running statistics, .grad, biases, the optimiser's state and the random state are as they were, also if the loss raises"
    torch.manual_seed(2)
    model = nn.Sequential(*dropped(), nn.BatchNorm1d(5))
    model.eval(), model[1].train(), model[2].train()
    opt = adam(model)
    loss(model).backward(), opt.step()
    model[0].weight.grad = None
    kept = lambda: [t.clone() for m in model.modules() for t in (*m._buffers.values(), m.bias if hasattr(m, 'bias') else torch.zeros(1))]
    grads, modes, others = {n: p.grad for n, p in model.named_parameters()}, [m.training for m in model.modules()], kept()
    copies, inner = {n: g.clone() for n, g in grads.items() if g is not None}, copy.deepcopy(opt.state_dict())
    random_state, calls = torch.get_rng_state(), []
    def value(out, y):
        calls.append(model.training)
        if fails: raise OSError('no loss')
        return F.cross_entropy(out, y)
    how = dict(sparsity=.5, steps=60, batch=(xs, ys), loss=value)
    if fails:
        with refuses('no loss', OSError): kind(model, opt, **how)
    else: kind(model, opt, **how)
    assert calls == [True] and torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes and all(map(torch.equal, kept(), others))
    assert all(p.grad is grads[n] and (p.grad is None or torch.equal(p.grad, copies[n])) for n, p in model.named_parameters())
    assert all(torch.equal(a, b) for s, t in zip(opt.state_dict()['state'].values(), inner['state'].values()) for a, b in zip(s.values(), t.values()))
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())


# Taylor equals a book kept by hand

def due(step, begin, end, updates):
    "Whether masks are renewed after this step: the progress in whole updates has grown, or the span ends"
    return begin < step <= end and (step == end or math.floor(Fraction((step - begin)*updates, end - begin)) > math.floor(Fraction((step - 1 - begin)*updates, end - begin)))


class Heard(Taylor):
    def score(self):
        self.heard = vector(self._views(s := super().score())).double()
        return s


@pytest.mark.parametrize('case', ['plain', 'accumulated', 'scaler', 'fused scaler', 'no gradient', 'channels_last', 'late'])
def test_taylor_by_hand(case):
    "Each score is the mean of (g·θ)² over the steps since the last; skipped steps do not count, missing gradients count as zero"
    build = dict(channels_last=last).get(case, Heads if case == 'no gradient' else mlp)
    model, opt, p = start(Heard, lambda m: sgd(m, fused=case == 'fused scaler'), build, span=(.25, .75) if case == 'late' else (0., .5), updates=6)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, enabled='scaler' in case)
    total, seen, scores, present, i = torch.zeros(p.d, dtype=torch.float64), 0, 0, mask(p), 0
    while p.step < p.steps:
        if case == 'no gradient': model.use = 'b' if i % 4 == 3 else 'a'
        opt.zero_grad()
        for part in range(2 if case == 'accumulated' else 1): scaler.scale(loss(model, i + part)).backward()
        overflow = 'scaler' in case and i in (2, 7, 8)
        if overflow: p.params[0].grad[0, 0] = torch.inf
        scale, before = scaler.get_scale(), p.step
        if not overflow and before < p.end:
            g = vector(torch.zeros_like(w) if w.grad is None else w.grad for w in p.params).double()/scale
            total, seen = total + (g*weights(p).double())**2, seen + 1
        p.heard = None
        scaler.step(opt), scaler.update()
        i += 1
        if p.step == before:                                         # a plain optimiser's step was not even called
            assert overflow and case == 'scaler'
            continue
        assert (p.heard is not None) == due(p.step, p.begin, p.end, 6)
        if p.heard is None: continue
        torch.testing.assert_close(p.heard, total/seen, rtol=1e-4, atol=1e-12)
        order = torch.where(present > 0, p.heard, -1.).argsort(descending=True, stable=True)
        assert set(order[:p.left].tolist()) == set(mask(p).nonzero().flatten().tolist())
        total, seen, scores, present = torch.zeros_like(total), 0, scores + 1, mask(p)
    assert scores == 6 and p.left == p.keep and p.births == 0 and p.deaths == p.d - p.keep


def test_taylor_skipped_from_the_start():
    "A GradScaler starts high, and its first steps overflow: the fused optimiser skips them, and nothing has been seen when masks are to be renewed"
    model, opt, p = start(Taylor, lambda m: sgd(m, fused=True, momentum=0.), updates=100)      # with momentum, torch's fused SGD takes up what lay in memory
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    for i in range(3):
        opt.zero_grad()
        scaler.scale(loss(model, i)).backward()
        if i == 0: model[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt), scaler.update()


# Gradual schedules equal the formula

spans = pytest.mark.parametrize('steps, span, updates, sparsity', [
    (60, (0., .5), 100, .9), (60, (0., .5), 7, .8), (100, (.2, .8), 10, .98), (97, (.31, .77), 13, .5), (50, (0., 1.), 1, .9), (40, (.5, .55), 3, .95), (64, (.25, .75), 32, 0.)])


@pytest.mark.parametrize('kind, power', [(GMP, 3), (Progressive, 1)])
@spans
def test_schedule_to_the_weight(kind, power, steps, span, updates, sparsity):
    "s = s_f·(1 − (1 − (t − t0)/(t1 − t0))^k) with k = 3 (Zhu & Gupta) or 1, in fractions, after every step; masks nest; the end is exact and stays"
    model, opt, p = start(kind, adam, steps=steps, span=span, updates=updates, sparsity=sparsity)
    t0, t1, masks = round(span[0]*steps), round(span[1]*steps), [mask(p)]
    assert p.left == p.d and p.stage == 'prune'
    wanted, renewals = p.d, 0
    for t in range(1, steps + 1):
        train(model, opt, t - 1, t)
        if due(t, t0, t1, updates):
            exact = p.d - (p.d - p.keep)*(1 - (1 - Fraction(t - t0, t1 - t0))**power)
            assert abs(p.left - exact) <= Fraction(1, 2) + Fraction(1, 10**9)                # the whole number next to it
            wanted, renewals = p.left, renewals + 1
        assert p.left == wanted                                      # and nothing between two renewals
        masks.append(mask(p))
        assert (masks[-1] <= masks[-2]).all() and (t < t1 or p.left == p.keep)
        assert p.stage == ('prune' if t < t1 else 'finetune' if t < steps else 'done')
    assert renewals == min(updates, t1 - t0) and p.deaths == p.d - p.keep and p.births == 0
    assert p.planned == p.keep/p.d


def test_gradual_magnitude_takes_the_smallest():
    "At every renewal, of those present the smallest |θ| as the optimiser left them"
    seen = {}
    model, opt, p = start(GMP, sgd, conv, hear=lambda: seen.update(theta=weights(p).abs()), updates=9)
    for t in range(60):
        before, n = mask(p), p.left
        train(model, opt, t, t + 1)
        if p.left < n:
            rank = torch.where(before > 0, seen['theta'], -1.).argsort(descending=True)
            assert set(rank[:p.left].tolist()) == set(mask(p).nonzero().flatten().tolist())
    assert p.left == p.keep


# Absent means zero, whatever the optimiser

OPTIMIZERS = {
    'sgd': sgd, 'nesterov': lambda m: sgd(m, nesterov=True), 'sgd foreach': lambda m: sgd(m, foreach=True), 'sgd fused': lambda m: sgd(m, fused=True),
    'adam': lambda m: adam(m, foreach=False), 'adam foreach': lambda m: adam(m, foreach=True), 'adam fused': lambda m: adam(m, fused=True), 'amsgrad': lambda m: adam(m, amsgrad=True),
    'adamw': lambda m: adamw(m, foreach=False), 'adamw foreach': lambda m: adamw(m, foreach=True), 'adamw fused': lambda m: adamw(m, fused=True),
    'rmsprop': lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3, momentum=.9, weight_decay=1e-2)}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@every_method
def test_absent_is_zero(kind, optimizer):
    "After every step; present ones move, the count is exact at the end, and the report says so"
    model, opt, p = start(kind, OPTIMIZERS[optimizer], conv if optimizer in ('sgd', 'adamw fused') else mlp, steps=40)
    bias, ever, masks = model[-1].bias.clone(), torch.zeros(p.d), [mask(p)]
    def look(i):
        m, w = mask(p), weights(p)
        assert (w[m == 0] == 0).all() and w.isfinite().all() and ((m == 0) | (m == 1)).all() and p.present == int(m.sum()) and p.left == int(w.count_nonzero())
        if kind is not Swift: assert (m <= masks[-1]).all()
        elif not torch.equal(m, masks[-1]): ever.add_(1)
        masks.append(m)
    train(model, opt, 0, 40, look)
    assert p.left == p.keep == round(.2*p.d) and p.stage == 'done' and p.births - p.deaths == p.left - p.d
    assert (weights(p)[mask(p) == 1] != 0).all() and not torch.equal(model[-1].bias, bias)
    if kind is Swift: assert ever[0] == 2 and p.births > 0           # moved at 10 and 20, and not at 30, the end
    assert repr(p) == f'{kind.__name__}: {p.keep:,} of {p.d:,} weights left, {p.keep:,} asked (sparsity 0.8); step 40 of 40, done'
    head, columns, *rows, total = str(p).splitlines()
    assert head == repr(p) and columns.split() == ['layer', 'shape', 'weights', 'left', 'density'] and len(rows) == len(p.names)
    assert total.split() == ['total', f'{p.d:,}', f'{p.keep:,}', f'{p.density:.2%}'] and repr(p) in p._repr_markdown_()


# RigL

def water(shapes, keep):
    "Densities min(1, ε·Σshape/Πshape) with the ε that fills the budget, by bisection: no rounds of dense layers"
    sizes, raw = [math.prod(s) for s in shapes], [sum(s)/math.prod(s) for s in shapes]
    lo, hi = 0., max(1/r for r in raw)
    for _ in range(200):
        mid = (lo + hi)/2
        lo, hi = (mid, hi) if sum(n*min(1., mid*r) for n, r in zip(sizes, raw)) < keep else (lo, mid)
    return [n*min(1., hi*r) for n, r in zip(sizes, raw)]


def test_erk():
    "Budgets add up, fit, and are the rule's to one weight, for any shapes and any number to keep"
    r = random.Random(0)
    for _ in range(400):
        shapes = [tuple(r.choice([1, 2, 3, 5, 7, 16, 40, 64]) for _ in range(2)) + r.choice([(), (), (3, 3), (1, 1), (5,), (2, 3, 3)]) for _ in range(r.randint(1, 9))]
        sizes = [math.prod(s) for s in shapes]
        for keep in {1, sum(sizes), sum(sizes) - 1, r.randint(1, sum(sizes)), max(1, sum(sizes)//50)} - {0}:
            got = erk(shapes, keep)
            assert sum(got) == keep and all(isinstance(k, int) and 0 <= k <= n for k, n in zip(got, sizes))
            assert all(abs(k - w) < 1 + 1e-6 for k, w in zip(got, water(shapes, keep))), (shapes, keep, got, water(shapes, keep))


@pytest.mark.parametrize('optimizer', [sgd, adam, lambda m: adamw(m, amsgrad=True), lambda m: adam(m, fused=True)], ids=['sgd', 'adam', 'amsgrad', 'fused'])
@pytest.mark.parametrize('build', [mlp, last])
def test_rigl_by_hand(build, optimizer):
    "Who goes, who comes and how many, from gradients and weights noted by a hook; constant counts; newcomers start at zero without a past; nothing after 75 %"
    seen = {}
    def hear(): seen.update(theta=[w.detach().clone() for w in p.params], state=[{k: v.clone() for k, v in opt.state[w].items() if torch.is_tensor(v)} for w in p.params])
    model, opt, p = start(Swift, optimizer, build, hear=hear, steps=200, sparsity=.7)
    opt.register_step_pre_hook(lambda *_: None)
    counts, moves, end = [int(m.sum()) for m in p._masks], [], 150
    assert counts == erk([w.shape for w in p.params], p.keep) and p.end == end and p.left == p.keep
    for t in range(1, 201):
        opt.zero_grad()
        loss(model, t - 1).backward()
        grads, before = [w.grad.clone() for w in p.params], [m.clone() for m in p._masks]
        opt.step()
        assert [int(m.sum()) for m in p._masks] == counts and p.present == p.keep
        if all(map(torch.equal, before, p._masks)): continue
        moves.append(t)
        share = .3*.5*(1 + math.cos(math.pi*t/end))
        for w, m, b, g, theta, past in zip(p.params, p._masks, before, grads, *seen.values()):
            n = int(b.sum())
            k = min(math.floor(share*n), b.numel() - n)
            theta, b_, g_ = (theta*b).abs().flatten(), b.flatten(), g.abs().flatten()
            present = b_.nonzero().flatten()
            stay = set(present[theta[present].argsort(descending=True)[:n - k]].tolist())
            free = [i for i in range(len(b_)) if i not in stay]
            grown = set(sorted(free, key=lambda i: -g_[i])[:k])
            assert set(m.flatten().nonzero().flatten().tolist()) == stay | grown
            new = (m > b)
            assert int(new.sum()) <= k and (w[new] == 0).all()
            for name, v in opt.state[w].items():
                if not torch.is_tensor(v) or v.shape != w.shape: continue
                assert (v[new] == 0).all() and torch.equal(v[~new], past[name][~new]), name
    assert moves and max(moves) < end and set(moves) <= set(range(10, end, 10)) and len(moves) >= 10
    assert p.births == p.deaths - (p.d - p.keep)                     # the first deaths are those of the start


def test_rigl_default_stops_at_three_quarters():
    _, _, p = start(RigL, steps=400)
    assert (p.every, p.drop, p.begin, p.end) == (100, .3, 0, 300)


# IMP

@pytest.mark.parametrize('rewind', [0, 5])
@pytest.mark.parametrize('optimizer', [sgd, adam])
def test_imp_by_hand(optimizer, rewind):
    "Each restart: the smallest of those present as training left them go, the rest, biases and BN are those of step k to the bit, the optimiser knows nothing"
    seen = {}
    model, opt, p = start(IMP, optimizer, last, hear=lambda: seen.update(theta=weights(p).abs()), steps=70, levels=4, rewind=rewind, sparsity=.9)
    wanted = [14, 28, 42, 56]
    assert p.restarts == wanted and p.left == p.d and p.stage == 'prune'
    start_, levels = {k: v.clone() for k, v in model.state_dict().items()} if rewind == 0 else None, 0
    for t in range(1, 71):
        before, others = mask(p), {k: v.clone() for k, v in model.state_dict().items()}
        train(model, opt, t - 1, t)
        if t == rewind: start_ = {k: v.clone() for k, v in model.state_dict().items()}
        if t not in wanted:
            assert torch.equal(mask(p), before) and len(opt.state) == len(list(model.parameters()))
            continue
        levels += 1
        assert any(not torch.equal(v, others[k]) for k, v in start_.items() if k not in p.names) and not opt.state
        masks = dict(zip(p.names, p._masks))
        for k, v in model.state_dict().items(): assert torch.equal(v, start_[k]*masks[k] if k in masks else start_[k]), k
        assert p.left == round(p.d*(p.keep/p.d)**(levels/4)) and p.stage == ('finetune' if levels == 4 else 'prune')
        rank = torch.where(before > 0, seen['theta'], -1.).argsort(descending=True)
        assert set(rank[:p.left].tolist()) == set(mask(p).nonzero().flatten().tolist())
    assert levels == 4 and p.left == p.keep == round((1 - .9)*p.d) and p.stage == 'done'


def test_imp_levels():
    "A fifth at most at once"
    for s in (.01, .2, .21, .36, .5, .9, .98, .999):
        n = imp_levels(s)
        assert n >= 1 and 1 - (1 - s)**(1/n) <= .2 + 1e-9 and (n == 1 or 1 - (1 - s)**(1/(n - 1)) > .2)
    assert imp_levels(0.) == 1 and imp_levels(.2) == 1 and imp_levels(.36) == 2 and imp_levels(.9, .5) == 4
    model, opt, p = start(IMP, levels=None, sparsity=.5)
    assert p.levels == 4 and p.restarts == [12, 24, 36, 48]


# Ties and remainders

def test_top():
    "The first `keep` of a stable sort, with infinities, zeros of both signs, denormals and many ties"
    r = random.Random(0)
    values = [0., -0., 1., -1., .5, 1e-45, -1e-45, 1e-38, 3e38, -3e38, math.inf, -math.inf]
    for _ in range(500):
        n = r.randint(1, 30)
        v = [r.choice(values) if r.random() < .7 else r.gauss(0, 1) for _ in range(n)]
        for dtype in torch.float32, torch.float64:
            s = torch.tensor(v, dtype=dtype)
            most, before = torch.finfo(dtype).max, s.clone()
            order = sorted(range(n), key=lambda i: -min(max(float(s[i]), -most), most))        # Python's sort is stable
            for keep in {0, n, r.randint(0, n)}:
                m = top(s, keep)
                assert m.dtype == dtype and m.nonzero().flatten().tolist() == sorted(order[:keep]) and ((m == 0) | (m == 1)).all()
            assert torch.equal(s, before)                            # it looks, and changes nothing
    for keep in (-1, 4):
        with refuses(f'of 3 weights one can keep 0 to 3: got {keep}'): top(torch.zeros(3), keep)
    with refuses('NaN'): top(torch.tensor([1., math.nan]), 1)


def test_apportion():
    "Adds up exactly, never beyond a layer, and where no layer is full each is one of the two whole numbers next to what it wanted"
    r = random.Random(0)
    for _ in range(500):
        sizes = [r.randint(1, 10**r.randint(0, 6)) for _ in range(r.randint(1, 12))]
        keep = r.choice([0, 1, sum(sizes), sum(sizes) - 1, r.randint(0, sum(sizes))])
        even = apportion([n*keep/sum(sizes) for n in sizes], keep, sizes)
        assert sum(even) == keep and all(0 <= k <= n for k, n in zip(even, sizes))
        assert all(abs(Fraction(n*keep, sum(sizes)) - k) < 1 for k, n in zip(even, sizes))
        sizes = [min(n, 50) for n in sizes]
        keep, w = r.randint(0, sum(sizes)), [r.random() for _ in sizes]
        skewed = apportion([keep*x/sum(w) for x in w], keep, sizes)  # wants more than some layers have
        assert sum(skewed) == keep and all(0 <= k <= n for k, n in zip(skewed, sizes))
    assert apportion([1.5, 1.5], 3, [9, 9]) == [2, 1]                # of equal remainders, the first
    for keep in (-1, 19):
        with refuses(f'of 18 weights one can keep 0 to 18: got {keep}'): apportion([1., 1.], keep, [9, 9])


# Going on from a file

def through_a_file(*objects):
    f = io.BytesIO()
    torch.save([o.state_dict() for o in objects], f)
    f.seek(0)
    return torch.load(f, weights_only=True)


def everything(model, opt, p): return [mask(p), *model.state_dict().values(), *(v for s in opt.state.values() for v in s.values() if torch.is_tensor(v))]


@pytest.mark.parametrize('optimizer', [sgd, adam])
@every_method
def test_resume(kind, optimizer):
    "Stopped anywhere and loaded into a fresh network with other weights, the run ends as if it had been left in peace"
    how = dict(rewind=3) if kind is IMP else dict(span=(.1, .75), updates=7) if kind not in (Swift, SNIP, GraSP) else {}
    model, opt, p = start(kind, optimizer, last, **how)
    saved = {}
    def look(i):
        if i in (1, 12, 23, 36, 47, 59): saved[i] = through_a_file(model, opt, p)
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
    "A pruner that was asked for something else than the state's refuses it by both values, and is as it was; likewise one of another kind"
    model, opt, p = start(GMP, span=(.2, .6), updates=4)
    train(model, opt, 0, 20)
    saved = through_a_file(p)[0]
    for asked, says in (dict(sparsity=.3), 'sparsity=0.8.*sparsity=0.3'), (dict(steps=99), 'steps=60.*steps=99'), (dict(span=(0., .6)), 'begin=12.*begin=0'), (dict(updates=50), 'updates=4.*updates=50'):
        _, _, q = start(GMP, **dict(span=(.2, .6), updates=4) | asked)
        before = mask(q)
        with refuses(says): q.load_state_dict(saved)
        assert q.step == 0 and torch.equal(mask(q), before)
    _, _, q = start(GMP, span=(.2, .6), updates=4)
    q.load_state_dict(saved)
    assert (q.begin, q.end, q.updates, q.keep, q.steps, q.step) == (12, 36, 4, p.keep, 60, 20) and torch.equal(q.mask, p.mask)
    with refuses("its kind is 'GMP', here it is 'Progressive'"): start(Progressive)[2].load_state_dict(p.state_dict())


@pytest.fixture
def small():
    "200 training images and 50 to test on"
    from hyperflux.lab.data import Data, Split, load_data
    full = load_data('fashion-small')
    yield Data(full.name, full.classes, *(Split(s.images[:n], s.labels[:n]) for s, n in ((full.train, 200), (full.test, 50))))
    torch.set_flush_denormal(False)                                  # `fit` switches it on for the whole process


def little(n_classes, in_shape): return nn.Sequential(nn.Flatten(), nn.AvgPool1d(8), nn.Linear(98, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, n_classes))


@pytest.mark.parametrize('name', ['gmp', 'taylor', 'imp', 'snip', 'grasp', 'rigl', 'magnitude'])
def test_fit_resumes(name, small, tmp_path, monkeypatch):
    "The training loop, stopped after two and four of six epochs: history, weights and masks as in one go"
    from hyperflux.study.recipes import Config
    from hyperflux.study.train import fit
    monkeypatch.setattr(RigL, 'every', 10)
    config = Config(model=f'{__name__}:little', method=name, sparsity=.8, dense_epochs=1, prune_epochs=3, regrow_epochs=2, batch_size=20, crop=2, flip=True)
    whole = fit(config, data=small, progress=False)
    for until in (2, 4): fit(config, tmp_path/'run', data=small, progress=False, until=until, resume=until > 2)
    run = fit(config, tmp_path/'run', data=small, progress=False, resume=True)
    assert run.finished and run.history == whole.history and run.pruner.left == run.pruner.keep and run.pruner.stage == 'done'
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
    assert (weights(p)[m == 0] == 0).all() and (weights(p)[m == 1] != 0).all() and (kind is Swift or (m <= before).all())
    opt.fail = False
    train(model, opt, p.step, 60)
    assert p.left == p.keep and (weights(p)[mask(p) == 0] == 0).all()


@every_method
def test_weights_loaded_and_copied(kind):
    "Dense weights loaded in mid-run are masked with the next step; a copy of the model is a plain network that trains on its own"
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
        assert p.names == ['0.weight', '2.weight'] and (model[4].weight != 0).all() and p.left == p.keep == round(.2*(13*11 + 11*7))
        runs.append(p)
    assert torch.equal(mask(runs[0]), mask(runs[1])) and torch.equal(weights(runs[0]), weights(runs[1]))


def test_rigl_leaves_alone_what_had_no_gradient():
    "As the optimiser does, and as gates do (design.md)"
    model, opt, p = start(Swift, build=Heads)                        # head b never computes
    before = [m.clone() for m in p._masks]
    train(model, opt, 0, 11)
    assert p.names[2] == 'b.weight' and not torch.equal(before[0], p._masks[0])
    assert torch.equal(before[2], p._masks[2])


def test_rigl_forgets_what_all_processes_grow(monkeypatch):
    "The mask of process 0 counts, also for whose momentum is cleared"
    model, opt, p = start(Swift, sgd)
    other = {}
    def broadcast(mask, src):                                        # process 0 grows others, as many in each layer
        other['mask'] = torch.cat([m[torch.randperm(len(m), generator=g0)] for m in mask.split(p.sizes)])
        mask.copy_(other['mask'])
    train(model, opt, 0, 9)
    before = mask(p)
    monkeypatch.setattr(baselines.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(baselines.dist, 'broadcast', broadcast)
    for w in p.params: opt.state[w]['momentum_buffer'].fill_(1.)
    train(model, opt, 9, 10)
    new = mask(p) > before
    assert other and torch.equal(mask(p), other['mask']) and new.any()
    assert (vector(opt.state[w]['momentum_buffer'] for w in p.params)[new] == 0).all()


# What is refused

sparsities = pytest.mark.parametrize('sparsity, error, says', [
    (None, ValueError, 'a sparsity is needed: the fraction of weights to remove, such as 0.98'), (98, ValueError, r'fraction in \[0, 1\): got 98; did you mean 0.98'),
    (1., ValueError, 'leaves no weight at all'), ('0.9', TypeError, "got '0.9'")])


@sparsities
@pytest.mark.parametrize('kind', METHODS[:-1], ids=lambda k: k.__name__)
def test_sparsity(kind, sparsity, error, says):
    with refuses(says, error): start(kind, sparsity=sparsity)


@sparsities
def test_sparsity_imp(sparsity, error, says):
    with refuses(says, error): start(IMP, sparsity=sparsity, levels=None)


@every_method
def test_sparsity_too_high(kind):
    with refuses('got -0.1'): start(kind, sparsity=-.1)
    with refuses('leaves no weight of 255: ask for at most 0.996'): start(kind, sparsity=.999)


@every_method
@pytest.mark.parametrize('how, says', [
    (dict(steps=0), 'steps counts the optimiser steps to come'), (dict(steps=1.5), 'got 1.5'), (dict(updates=0), 'updates counts how often masks are renewed, 1 or more: got 0'),
    (dict(updates=2.5), 'got 2.5'), (dict(targets='9.weight'), "'9.weight' matches no weight")])
def test_arguments(kind, how, says):
    with refuses(says): start(kind, **how)


@pytest.mark.parametrize('span', [(-.1, .5), (.6, .5), (.5, 1.1), (float('nan'), .5)])
@pytest.mark.parametrize('kind', [k for k in METHODS if k is not IMP], ids=lambda k: k.__name__)
def test_span(kind, span):
    with refuses(r'span gives two shares of the run, 0 <= begin <= end <= 1: got \('): start(kind, span=span)


@pytest.mark.parametrize('kind', [GMP, Progressive, Taylor])
@pytest.mark.parametrize('how', [dict(span=(.5, .5)), dict(steps=1, span=(0., .4)), dict(steps=10, span=(.5, .51))])
def test_too_few_steps(kind, how):
    "A gradual method without a step to prune in; the model stays free for another"
    torch.manual_seed(0)
    model = mlp()
    opt = sgd(model)
    with refuses(f'{kind.__name__} prunes step by step, and was given none: .* train longer, or widen the span'): make(kind, model, opt, **how)
    assert (model[0].weight != 0).all() and make(kind, model, opt, steps=60).left == 255


def test_rigl_too_short():
    with refuses('RigL moves weights every 100 steps until step 75 of 100: it would never do so; train longer'): start(RigL, steps=100)


def test_rigl_that_would_never_move():
    with refuses('it would never do so'): start(RigL, steps=133)     # end = 100: the move at step 100 is not made


def test_rigl_refuses_before_it_prunes():
    torch.manual_seed(0)
    model = mlp()
    with refuses('it would never do so'): RigL(model, sgd(model), sparsity=.8, steps=100)
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize('fused', [False, True])
def test_rigl_under_a_grad_scaler(fused):
    "A step that is skipped moves no weight; the next move sees sound gradients"
    model, opt, p = start(Swift, lambda m: sgd(m, fused=fused))
    scaler, masks = torch.amp.GradScaler('cpu', init_scale=2.**10), [mask(p)]
    for i in range(25):
        opt.zero_grad()
        scaler.scale(loss(model, i)).backward()
        if i == 9: model[0].weight.grad[0, 0] = torch.inf
        before = p.step
        scaler.step(opt), scaler.update()
        masks.append(mask(p))
        assert (p.step == before) == (i == 9 and not fused)          # a plain optimiser's step is not even called
    moved = [i for i in range(25) if not torch.equal(masks[i], masks[i + 1])]
    assert moved == ([19] if fused else [10, 20]) and (weights(p)[mask(p) == 0] == 0).all() and weights(p).isfinite().all()


def test_rigl_resumes_with_its_own_pace():
    model, opt, p = start(RigL, steps=200)
    p.every = 10
    train(model, opt, 0, 15)
    other = start(RigL, steps=200)
    for o, s in zip(other, through_a_file(model, opt, p)): o.load_state_dict(s)
    assert other[2].every == 10


@pytest.mark.parametrize('kind', [Random, Magnitude, LayerMagnitude, SNIP, GraSP])
def test_one_shot_with_an_empty_span(kind):
    "What prunes at once does not care for the span: it is allowed (begin <= end), so it works"
    assert start(kind, span=(0., 0.))[2].left == 51                  # this does
    assert start(kind, span=(.5, .5))[2].left == 51


def test_a_failed_attempt_leaves_nothing_behind():
    "One corrects the batch and tries again"
    model = mlp()
    opt = sgd(model)
    with refuses('shapes cannot be multiplied', RuntimeError): SNIP(model, opt, sparsity=.8, steps=60, batch=(xs[:, :3], ys))
    assert SNIP(model, opt, sparsity=.8, steps=60, batch=(xs, ys)).left == 51


@pytest.mark.parametrize('kind', [SNIP, GraSP])
def test_a_layer_the_loss_does_not_reach(kind):
    "Its weights are worth nothing, or it is named"
    model = Heads()
    try: p = make(kind, model, sgd(model))
    except ValueError as e: assert 'b.weight' in str(e)
    else: assert p.left == p.keep and int(p._masks[2].sum()) == 0


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(1, 24), nn.Linear(8, 5)
    def forward(self, x): return self.head(F.scaled_dot_product_attention(*self.qkv(x[..., None]).view(-1, 1, 13, 24).chunk(3, -1)).mean((1, 2)))


def test_grasp_on_attention():
    model, opt, p = start(GraSP, build=Attentive)
    assert p.left == p.keep


@pytest.mark.parametrize('how', [dict(levels=-1), dict(levels=1.5), dict(rewind=1.5), dict(levels=0)])
def test_imp_arguments(how):
    with refuses('levels|rewind'): start(IMP, **how)


def test_imp_refuses():
    with refuses('IMP trains 5 times in 60 steps, and rewinds to step 12: it must be a whole number below 12'): start(IMP, rewind=12)
    with refuses('rewinds to step -1'): start(IMP, rewind=-1)
    with refuses('IMP trains 51 times in 20 steps'): start(IMP, steps=20, levels=50)
    assert start(IMP, rewind=11)[2].rewind == 11


class Missing(Baseline): "No score"
class Poisoned(Magnitude):
    def score(self): return super().score().index_fill_(0, torch.tensor([3]), math.nan)


def test_scores():
    "A score that is missing, or not a number: an error before any weight is touched"
    torch.manual_seed(0)
    model = mlp()
    with refuses(r'Missing has no score: define score\(self\), one number for each weight', NotImplementedError): make(Missing, model, sgd(model))
    model = mlp()
    with refuses('scores of Poisoned hold NaN or infinity at step 0: training has diverged; lower the learning rate, or clip gradients', FloatingPointError):
        make(Poisoned, model, sgd(model))
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize('kind', [GMP, Progressive, Taylor, IMP])
def test_divergence(kind):
    "Weights that are NaN in mid-run are named when masks are renewed"
    model, opt, p = start(kind)
    train(model, opt, 0, 8)
    with torch.no_grad(): model[2].weight[(model[2].weight != 0).nonzero(as_tuple=True)[0][0]] = math.nan
    with refuses(f'scores of {kind.__name__} hold NaN or infinity at step', FloatingPointError): train(model, opt, 8, 60)


def test_divergence_rigl():
    "Gradients that are NaN are refused when weights are to be grown by them"
    model, opt, p = start(Swift)
    train(model, opt, 0, 9)
    with torch.no_grad(): model[2].bias[0] = math.nan
    with refuses('NaN', (ValueError, FloatingPointError)): train(model, opt, 9, 10)


# Two processes

def launch(n, work, timeout=110):
    "Runs `work` of this file in n processes under torchrun; all are gone afterwards"
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    env |= dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), __file__, work]
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as run:
        try: out, _ = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            run.terminate()                                         # torchrun then ends its workers, which also have an alarm of their own
            try: run.communicate(timeout=20)
            except subprocess.TimeoutExpired: os.killpg(run.pid, signal.SIGKILL)
            pytest.fail(f'{work} did not end in {timeout} s')
    assert run.returncode == 0, out


def test_two_processes(): launch(2, 'together')


def together(world):
    "Under DDP, each process on its half of each batch, all methods end with one mask and one network; what is sharded is refused"
    from torch.nn.parallel import DistributedDataParallel as DDP
    half = slice(world.rank, None, 2)
    for kind in (Random, GMP, Swift, SNIP, GraSP, Taylor, IMP):
        torch.manual_seed(1)
        model = mlp()
        net, opt = DDP(model), sgd(model)
        more = dict(batch=(xs[half], ys[half])) if issubclass(kind, SNIP) else dict(levels=3) if kind is IMP else {}
        p = kind(model, opt, sparsity=.8, steps=60, **more)
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
        with refuses(f'{kind.__name__} works on whole weights, and these are cut by fully_shard: use DDP'): make(kind, model, sgd(model))


if __name__ == '__main__':
    import faulthandler
    from hyperflux.lab.processes import join, leave
    faulthandler.dump_traceback_later(100, exit=True)                # nobody survives the test
    torch.set_num_threads(1)
    world = join()
    globals()[sys.argv[1]](world)
    world.barrier()
    leave()
