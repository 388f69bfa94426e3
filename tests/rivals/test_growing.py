"RigL and IMP, weight by weight: who goes, who comes, what is rewound."
import math, random

import pytest
import torch

from hyperflux.rivals.imp import IMP, imp_levels
from hyperflux.rivals.rigl import RigL, erk
from tests.rivals.rig import Swift, mlp, last, sgd, adam, adamw, start, loss, train, mask, weights


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
        shapes = [tuple(r.choice([1, 2, 3, 5, 7, 16, 40, 64]) for _ in range(2))
                  + r.choice([(), (), (3, 3), (1, 1), (5,), (2, 3, 3)]) for _ in range(r.randint(1, 9))]
        sizes = [math.prod(s) for s in shapes]
        for keep in {1, sum(sizes), sum(sizes) - 1, r.randint(1, sum(sizes)), max(1, sum(sizes)//50)} - {0}:
            got = erk(shapes, keep)
            assert sum(got) == keep and all(isinstance(k, int) and 0 <= k <= n for k, n in zip(got, sizes))
            assert all(abs(k - w) < 1 + 1e-6 for k, w in zip(got, water(shapes, keep))), (shapes, keep, got,
                water(shapes, keep))


@pytest.mark.parametrize('optimizer', [sgd, adam, lambda m: adamw(m, amsgrad=True), lambda m: adam(m, fused=True)],
                         ids=['sgd', 'adam', 'amsgrad', 'fused'])
@pytest.mark.parametrize('build', [mlp, last])
def test_rigl_by_hand(build, optimizer):
    """Who goes, who comes and how many, from gradients and weights noted by a hook; constant counts; newcomers start at
    zero without a past; nothing after 75 %"""
    seen = {}
    def hear():
        seen.update(theta=[w.detach().clone() for w in p.params],
                    state=[{k: v.clone() for k, v in opt.state[w].items() if torch.is_tensor(v)} for w in p.params])
    model, opt, p = start(Swift, optimizer, build, hear=hear, steps=200, sparsity=.7)
    opt.register_step_pre_hook(lambda *_: None)
    counts, moves, end = [int(m.sum()) for m in p.masks], [], 150
    assert counts == erk([w.shape for w in p.params], p.keep) and p.plan.end == end and p.left == p.keep
    for t in range(1, 201):
        opt.zero_grad()
        loss(model, t - 1).backward()
        grads, before = [w.grad.clone() for w in p.params], [m.clone() for m in p.masks]
        opt.step()
        assert [int(m.sum()) for m in p.masks] == counts and p.present == p.keep
        if all(map(torch.equal, before, p.masks)): continue
        moves.append(t)
        share = .3*.5*(1 + math.cos(math.pi*t/end))
        for w, m, b, g, theta, past in zip(p.params, p.masks, before, grads, *seen.values()):
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
    assert (p.every, p.drop, p.plan.begin, p.plan.end) == (100, .3, 0, 300)


# IMP

@pytest.mark.parametrize('rewind', [0, 5])
@pytest.mark.parametrize('optimizer', [sgd, adam])
def test_imp_by_hand(optimizer, rewind):
    """Each restart: the smallest of those present as training left them go, the rest, biases and BN are those of step k
    to the bit, the optimiser knows nothing"""
    seen = {}
    model, opt, p = start(IMP, optimizer, last, hear=lambda: seen.update(theta=weights(p).abs()), steps=70, levels=4,
                          rewind=rewind, sparsity=.9)
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
        masks = dict(zip(p.names, p.masks))
        for k, v in model.state_dict().items():
            assert torch.equal(v, start_[k]*masks[k] if k in masks else start_[k]), k
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
