"Scores from gradients against derivatives written the long way, in float64, and a book kept by hand."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from hyperflux.rivals.scores import top
from hyperflux.rivals.gradients import GraSP, SNIP, Taylor
from tests.rivals.rig import (
    xs, ys, mlp, conv, last, Heads, sgd, adam, make, start, loss, vector, mask, weights, refuses, due)


# SNIP and GraSP equal derivatives written the long way

def dropped(): return nn.Sequential(nn.Linear(13, 9), nn.BatchNorm1d(9), nn.Dropout(.3), nn.Tanh(), nn.Linear(9, 5))


def unpruned(kind, build, **how):
    "The method with nothing to remove, and its score"
    torch.manual_seed(3)
    model = build().double()
    p = make(kind, model, sgd(model), sparsity=0., **how)
    p.batch = (xs.double(), ys)
    torch.manual_seed(7)                                             # dropout draws the same in the twin
    with torch.no_grad(): return model, p, vector(p.layout.views(p.score()))


def with_weights(model, p, values): return lambda x: functional_call(model, dict(zip(p.names, values)), (x,))


@pytest.mark.parametrize('build', [mlp, conv, dropped])
def test_snip_equals_switches(build):
    "∂L/∂c at c = 1 with a switch on each weight, by autograd and by central differences"
    model, p, score = unpruned(SNIP, build)
    twin = copy.deepcopy(model).train()
    def value(switches):
        torch.manual_seed(7)
        return F.cross_entropy(with_weights(twin, p, [c*w.detach() for c, w in zip(switches, p.params)])(xs.double()),
                               ys)
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
    q.start()
    assert sorted(mask(q).nonzero().flatten().tolist()) == sorted(reference.argsort(descending=True)[:q.keep].tolist())


def tiny(): return nn.Sequential(nn.Linear(13, 3), nn.Tanh(), nn.Linear(3, 5))


@pytest.mark.parametrize('build', [tiny, dropped])
def test_grasp_equals_hessian(build):
    """θ·Hg with the whole Hessian, with a difference of gradients, and as what it means: the slope of |g|² as a weight
    fades. The highest −θ·Hg goes"""
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
    torch.testing.assert_close(score, theta*(gradient(theta + e*g) - gradient(theta - e*g))/(2*e), rtol=1e-3,
                               atol=float(score.abs().max())*1e-5)
    for i in range(0, p.d, 7):
        fade = torch.zeros_like(theta)
        fade[i] = -theta[i]                                          # towards the removal of weight i
        slope = (gradient(theta + 1e-4*fade).square().sum() - gradient(theta - 1e-4*fade).square().sum())/2e-4
        assert float(slope) == pytest.approx(-2*float(score[i]), rel=1e-3, abs=1e-5*float(score.abs().max()))

    p.detach()
    torch.manual_seed(7)
    q = GraSP(model, sgd(model), sparsity=.7, steps=60, batch=(xs.double(), ys))
    q.start()
    harm = -theta*(H @ g)                                            # the paper's score
    gone = set(harm.argsort(descending=True)[:q.d - q.keep].tolist())
    assert set((mask(q) == 0).nonzero().flatten().tolist()) == gone
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
    """Modes, running statistics, .grad, biases, the optimiser's state and the random state are as they were, also if
    the loss raises"""
    torch.manual_seed(2)
    model = nn.Sequential(*dropped(), nn.BatchNorm1d(5))
    model.eval(), model[1].train(), model[2].train()
    opt = adam(model)
    loss(model).backward(), opt.step()
    model[0].weight.grad = None
    kept = lambda: [t.clone() for m in model.modules() for t in (*m._buffers.values(),
                                                                 m.bias if hasattr(m, 'bias') else torch.zeros(1))]
    grads, modes, others = {n: p.grad for n, p in model.named_parameters()}, [m.training
                                                                              for m in model.modules()], kept()
    copies, inner = {n: g.clone() for n, g in grads.items() if g is not None}, copy.deepcopy(opt.state_dict())
    random_state, calls = torch.get_rng_state(), []
    def value(out, y):
        calls.append(model.training)
        if fails: raise OSError('no loss')
        return F.cross_entropy(out, y)
    how = dict(sparsity=.5, steps=60, batch=(xs, ys), loss=value)
    p = kind(model, opt, **how)
    if fails:
        with refuses('no loss', OSError): p.start()
    else: p.start()
    assert calls == [True] and torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes and all(map(torch.equal, kept(), others))
    assert all(p.grad is grads[n] and (p.grad is None or torch.equal(p.grad, copies[n]))
               for n, p in model.named_parameters())
    assert all(torch.equal(a, b) for s, t in zip(opt.state_dict()['state'].values(), inner['state'].values())
               for a, b in zip(s.values(), t.values()))
    assert torch.is_grad_enabled() and all(p.requires_grad for p in model.parameters())


# Taylor equals a book kept by hand

class Heard(Taylor):
    def score(self):
        self.heard = vector(self.layout.views(s := super().score())).double()
        return s


@pytest.mark.parametrize('case', ['plain', 'accumulated', 'scaler', 'fused scaler', 'no gradient', 'channels_last',
                                  'late'])
def test_taylor_by_hand(case):
    """Each score is the mean of (g·θ)² over the steps since the last; skipped steps do not count, missing gradients
    count as zero"""
    build = dict(channels_last=last).get(case, Heads if case == 'no gradient' else mlp)
    model, opt, p = start(Heard, lambda m: sgd(m, fused=case == 'fused scaler'), build,
                          span=(.25, .75) if case == 'late' else (0., .5), updates=6)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, enabled='scaler' in case)
    total, seen, scores, present, i = torch.zeros(p.d, dtype=torch.float64), 0, 0, mask(p), 0
    while p.step < p.steps:
        if case == 'no gradient': model.use = 'b' if i % 4 == 3 else 'a'
        opt.zero_grad()
        for part in range(2 if case == 'accumulated' else 1): scaler.scale(loss(model, i + part)).backward()
        overflow = 'scaler' in case and i in (2, 7, 8)
        if overflow: p.params[0].grad[0, 0] = torch.inf
        scale, before = scaler.get_scale(), p.step
        if not overflow and before < p.plan.end:
            g = vector(torch.zeros_like(w) if w.grad is None else w.grad for w in p.params).double()/scale
            total, seen = total + (g*weights(p).double())**2, seen + 1
        p.heard = None
        scaler.step(opt), scaler.update()
        i += 1
        if p.step == before:                                         # a plain optimiser's step was not even called
            assert overflow and case == 'scaler'
            continue
        assert (p.heard is not None) == due(p.step, p.plan.begin, p.plan.end, 6)
        if p.heard is None: continue
        torch.testing.assert_close(p.heard, total/seen, rtol=1e-4, atol=1e-12)
        order = torch.where(present > 0, p.heard, -1.).argsort(descending=True, stable=True)
        assert set(order[:p.left].tolist()) == set(mask(p).nonzero().flatten().tolist())
        total, seen, scores, present = torch.zeros_like(total), 0, scores + 1, mask(p)
    assert scores == 6 and p.left == p.keep and p.births == 0 and p.deaths == p.d - p.keep


def test_taylor_skipped_from_the_start():
    """A GradScaler starts high, and its first steps overflow: the fused optimiser skips them, and nothing has been seen
    when masks are to be renewed"""
    # with momentum, torch's fused SGD takes up what lay in memory
    model, opt, p = start(Taylor, lambda m: sgd(m, fused=True, momentum=0.), updates=100)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    for i in range(3):
        opt.zero_grad()
        scaler.scale(loss(model, i)).backward()
        if i == 0: model[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt), scaler.update()
