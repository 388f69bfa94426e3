"The simple scores against torch's own pruning and formulas in fractions: magnitudes, schedules, ties."
import copy, math, random
from fractions import Fraction

import pytest
import torch
import torch.nn.utils.prune as torch_prune

from hyperflux.rivals.scores import GMP, LayerMagnitude, Magnitude, Progressive, Random, apportion, top
from tests.rivals.rig import mlp, conv, last, wide, sgd, adam, start, loss, train, vector, mask, weights, refuses, due


# Magnitude equals torch.nn.utils.prune

@pytest.mark.parametrize('sparsity', [.1, .5, .9, .98])
@pytest.mark.parametrize('build', [mlp, conv, last, wide])
def test_magnitude_equals_torch(build, sparsity):
    """Global: one call of torch's; layerwise: one for each layer, and where round(s·n) is what we remove, the very same
    call a user would write"""
    model, _, p = start(Magnitude, build=build, sparsity=sparsity)
    # torch's own wants them contiguous
    fresh = lambda: start(Random, build=conv if build is last else build, sparsity=0.)
    twin = fresh()[0]
    layers = [twin.get_submodule(n.rpartition('.')[0]) for n in p.names]
    before = weights(fresh()[2])
    assert len(before.abs().unique()) == p.d                          # no ties, or the choice would be free
    torch_prune.global_unstructured([(m, 'weight') for m in layers], torch_prune.L1Unstructured, amount=p.d - p.keep)
    assert torch.equal(mask(p), vector(m.weight_mask for m in layers)) and p.left == p.keep == round((1 - sparsity)*p.d)
    assert torch.equal(weights(p), vector(m.weight for m in layers))

    p = start(LayerMagnitude, build=build, sparsity=sparsity)[2]
    twin, same = fresh()[0], 0
    for n, row, ours in zip(p.names, p.layers(), p.masks):
        m, gone = twin.get_submodule(n.rpartition('.')[0]), row['weights'] - row['left']
        same += gone == round(sparsity*row['weights'])
        assert abs(gone - sparsity*row['weights']) < 1
        torch_prune.l1_unstructured(m, 'weight', amount=sparsity if gone == round(sparsity*row['weights']) else gone)
        assert torch.equal(ours, m.weight_mask)
    assert p.left == p.keep and same >= len(p.names) - 2


def test_absent_have_no_gradient():
    """As with the mask in the graph: what is absent gathers no momentum, and what the optimiser is given is the masked
    gradient"""
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
    def masked(model, **how):
        p = Random(model, sgd(model), **how)
        p.start()
        return mask(p)
    counts = sum(masked(copy.deepcopy(model), sparsity=.75, steps=9, seed=s) for s in range(200))
    assert torch.equal(torch.get_rng_state(), state)
    # binomial: 37.5, of 13,000 weights
    assert abs(counts.mean() - 50) < .01 and abs(counts.var() - 200*.25*.75) < 2
    a, b, c = (mask(start(Random, seed=k)[2]) for k in (1, 2, 3))
    model = mlp()
    other = masked(model, sparsity=.8, steps=60, seed=1)
    assert torch.equal(a, b) and torch.equal(a, c) and not torch.equal(a, other) and other.sum() == a.sum() == 51


# Gradual schedules equal the formula

spans = pytest.mark.parametrize('steps, span, updates, sparsity', [
    (60, (0., .5), 100, .9), (60, (0., .5), 7, .8), (100, (.2, .8), 10, .98), (97, (.31, .77), 13, .5),
    (50, (0., 1.), 1, .9), (40, (.5, .55), 3, .95), (64, (.25, .75), 32, 0.)])


@pytest.mark.parametrize('kind, power', [(GMP, 3), (Progressive, 1)])
@spans
def test_schedule_to_the_weight(kind, power, steps, span, updates, sparsity):
    """s = s_f·(1 − (1 − (t − t0)/(t1 − t0))^k) with k = 3 (Zhu & Gupta) or 1, in fractions, after every step; masks
    nest; the end is exact and stays"""
    model, opt, p = start(kind, adam, steps=steps, span=span, updates=updates, sparsity=sparsity)
    t0, t1, masks = round(span[0]*steps), round(span[1]*steps), [mask(p)]
    assert p.left == p.d and p.stage == 'prune'
    wanted, renewals = p.d, 0
    for t in range(1, steps + 1):
        train(model, opt, t - 1, t)
        if due(t, t0, t1, updates):
            exact = p.d - (p.d - p.keep)*(1 - (1 - Fraction(t - t0, t1 - t0))**power)
            # the whole number next to it
            assert abs(p.left - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
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
                assert m.dtype == dtype and m.nonzero().flatten().tolist() == sorted(order[:keep])
                assert ((m == 0) | (m == 1)).all()
            assert torch.equal(s, before)                            # it looks, and changes nothing
    for keep in (-1, 4):
        with refuses(f'of 3 weights one can keep 0 to 3: got {keep}'): top(torch.zeros(3), keep)
    with refuses('NaN'): top(torch.tensor([1., math.nan]), 1)


def test_apportion():
    """Adds up exactly, never beyond a layer, and where no layer is full each is one of the two whole numbers next to
    what it wanted"""
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
