"What a pruner does around the optimiser's step equals gates in the graph, bit for bit."
import copy

import pytest, torch
from torch import nn
from torch.func import functional_call

from hyperflux import Hyperflux, Settings, prunable
from hyperflux.core.gates import Gated
from tests.core.rig import mlp, sgd, adam, adamw, groups, loss, flat, start, train, state, assert_same, assert_sparse


def race(optimizer=sgd, build=mlp, dtype=torch.float32, *, loss=loss, steps=80, micro=1, at='gate', set_to_none=True,
         pressure=lambda q: .02 + .04*q, **kw):
    """Trains one network with a pruner, its twin with gates in the graph; returns the pruner and the twin's presences,
    values and weights"""
    torch.manual_seed(1)
    model = build().to(dtype)
    twin, opt = copy.deepcopy(model), optimizer(model)
    p = Hyperflux(model, opt, pressure=pressure, steps=steps + 1, settings=Settings(prune=1., settle=0., travel=3.),
                  **kw)
    g = Gated(twin, dict(zip(p.names, map(torch.clone, p.gate_params))))
    opts = optimizer(twin), torch.optim.Adam(g.gates.parameters(), lr=p.plan.lr, eps=1e-8/p.d, fused=True)
    parts = [slice(k, None, micro) for k in range(micro)] if micro > 1 else [slice(None)]
    for i in range(steps):
        gamma = p.gamma
        for o in (opt, *opts): o.zero_grad(set_to_none)
        for part in parts: (loss(model, i, part)/micro).backward()
        opt.step()

        theta = g.weights()
        leaves = {n: w.detach().requires_grad_() for n, w in theta.items()}
        at_theta = lambda *inputs: functional_call(twin, leaves, inputs)
        at_theta.parameters = twin.parameters
        for part in parts: (loss(g if at == 'gate' else at_theta, i, part)/micro).backward()
        if at == 'theta':
            for n in p.names: theta[n].backward(leaves[n].grad)
        idle = [gate.presence for gate in g.gates if gate.presence.grad is None]
        g.pressure(gamma).backward()
        for t in idle: t.grad = None
        for o in opts: o.step()
    own = dict(twin.named_parameters())
    return p, dict(presence=flat(gate.presence for gate in g.gates), value=flat(own[n] for n in p.names),
                   theta=flat(g.weights().values()))


def assert_equal(p, twin, tolerance=0.):
    mine = state(p)
    for k in twin:
        if tolerance: torch.testing.assert_close(mine[k], twin[k], rtol=0, atol=tolerance, msg=lambda m: f'{k}: {m}')
        else: assert torch.equal(mine[k], twin[k]), k
    assert_sparse(p, .05, .6)


@pytest.mark.parametrize('optimizer', [sgd, adam, adamw])
def test_equals_graph(optimizer):
    "A user of the fast path gets bit for bit what autograd through a gate layer gives"
    assert_equal(*race(optimizer))
    assert_equal(*race(optimizer, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize('optimizer', [sgd, adam, adamw])
def test_equals_graph_accumulated(optimizer):
    "Four micro-batches give what the gate layer gives for the gradient of all four"
    assert_equal(*race(optimizer, micro=4, at='theta'))


@pytest.mark.parametrize('optimizer', [sgd, adam, adamw])
def test_equals_graph_per_micro_batch(optimizer):
    """Going through the gate layer in every micro-batch makes a sum of products of a product of sums: no more than
    rounding apart"""
    assert_equal(*race(optimizer, dtype=torch.float64, micro=4), 1e-12)
    assert_equal(*race(optimizer, micro=4), 1e-5)


def test_equals_graph_compiled():
    "compile=True changes nothing but the last bits"
    p, twin = race(compile=True)
    assert p._count == 80
    torch.testing.assert_close(p.presence, twin['presence'], rtol=0, atol=1e-5)
    torch.testing.assert_close(p.value, twin['value'], rtol=0, atol=1e-5)
    clear = twin['presence'].abs() >= 1e-5
    assert torch.equal(p.mask[clear], (twin['presence'] >= 0).float()[clear]) and clear.sum() > 200


class Twice(nn.Module):
    "One layer used twice, and another that shares its weight"
    def __init__(self):
        super().__init__()
        self.inner, self.tied, self.head = nn.Linear(13, 13), nn.Linear(13, 13), nn.Linear(13, 5)
        self.tied.weight = self.inner.weight
    def forward(self, x): return self.head(self.tied(self.inner(self.inner(x).tanh()).tanh()).tanh())


class Attention(nn.Module):
    "Reads the 13 numbers as 13 tokens"
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(1, 6), nn.MultiheadAttention(6, 2,
            batch_first=True), nn.Linear(6, 5)
    def forward(self, x):
        h = self.embed(x[..., None])
        return self.head(self.attention(h, h, h)[0].mean(1))


class Heads(nn.Module):
    "Two heads, of which `use` says the one that computes"
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b, self.use = nn.Linear(13, 11), nn.Linear(11, 5), nn.Linear(11, 5), 'a'
    def forward(self, x): return getattr(self, self.use)(self.body(x).relu())


def conv():
    model = nn.Sequential(nn.Unflatten(1, (1, 13, 1)), nn.Conv2d(1, 5, (3, 1)), nn.ReLU(),
                          nn.ConvTranspose2d(5, 3, (3, 1)), nn.Flatten(), nn.Linear(39, 5))
    return model.to(memory_format=torch.channels_last)


def test_tied_and_used_twice():
    "A weight with two names and three uses is one weight: counted once, masked in all its uses"
    p, twin = race(build=Twice)
    assert p.names == ['inner.weight', 'head.weight'] and p.d == 13*13 + 13*5
    assert_equal(p, twin)
    assert list(prunable(p.model)) == p.names
    assert p.model.tied.weight is p.model.inner.weight and (p.model.tied.weight == 0).any()


def test_tied_to_embedding():
    "A decoder that shares its weight with an embedding stays dense, as embeddings do"
    model = nn.ModuleDict(dict(embed=nn.Embedding(5, 7), inner=nn.Linear(7, 7), out=nn.Linear(7, 5)))
    model['out'].weight = model['embed'].weight
    assert Hyperflux(model, sgd(model), sparsity=.5, steps=200).names == ['inner.weight']


def test_attention():
    "nn.MultiheadAttention is pruned, input and output projections alike"
    p, twin = race(adam, Attention, pressure=.005)
    assert {'attention.in_proj_weight', 'attention.out_proj.weight'} < set(p.names)
    assert_equal(p, twin)


def test_convolutions():
    "Convolutions, plain and transposed, are gated as linear layers are, in any memory format"
    # some processors' kernels sum a convolution in another order when its weight was just made, so not bit for bit
    assert_equal(*race(build=conv, dtype=torch.float64), 1e-12)


def test_two_groups():
    "Parameter groups keep their own learning rates and decays"
    assert_equal(*race(groups))


def test_zeroed_gradients():
    "zero_grad(set_to_none=False) makes no difference"
    assert_equal(*race(set_to_none=False))


def heads_loss(model, i, part=slice(None)):
    "Three steps with head a, then one with head b"
    getattr(model, 'model', model).use = 'b' if i % 4 == 3 else 'a'
    return loss(model, i, part)


def test_no_gradient_equals_graph():
    "A layer that was not used in a step is left alone with its gates, as the optimiser leaves it"
    p, twin = race(build=Heads, loss=heads_loss, pressure=.1)
    assert [int(p.gate_optimizer.state[t]['step']) for t in p.gate_params] == [80, 60, 20]
    assert_equal(p, twin)


def test_no_gradient_in_a_step():
    "Without a gradient nothing of a layer moves; the others do, and with the next gradient it moves again"
    model, opt, p = start(build=Heads, pressure=.01, meter=True)
    train(model, opt, 8, heads_loss)
    for i, still in (0, 2), (3, 1):
        before, flux = state(p), p.meter.total.clone()
        opt.zero_grad()
        heads_loss(model, i).backward()
        opt.step()
        after = state(p)
        moved = lambda k: [not torch.equal(a, b) for a, b in zip(before[k].split(p.sizes), after[k].split(p.sizes))]
        for k in ('presence', 'value', 'mean', 'square'): assert moved(k) == [j != still for j in range(3)], k
        assert (after['steps'] - before['steps']).tolist() == [j != still for j in range(3)]
        assert [not torch.equal(*o) for o in zip(flux.split(p.sizes), p.meter.total.split(p.sizes))] == [j != still
            for j in range(3)]
    assert_sparse(p)


def test_no_gradient_at_all():
    "step() before any backward() changes nothing"
    model, opt, p = start()
    train(model, opt)
    before = state(p)
    opt.zero_grad()
    opt.step()
    assert_same(before, state(p))
