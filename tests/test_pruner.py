"The pruner works around the optimiser's step: what it does equals gates in the graph, and nothing that people do to models and optimisers disturbs it."
import copy, inspect, io, warnings

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from hyperflux import Hyperflux, Settings, authors, prunable
from hyperflux.core.gates import Gated
from hyperflux.core.control import LogController

quick = Settings(prune=1., settle=0., lr=.01, low=0., high=.1)      # with pressure .03: 237 of 255 weights left after one step, 69 after ten
staged = Settings(prune=.5, settle=.25, lr=.01, low=0., high=.1)
torch.manual_seed(0)
xs, ys = torch.randn(96, 13), torch.randint(5, (96,))               # random labels: gradients never fade


def mlp(): return nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 5))
def sgd(model, **kw): return torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=5e-4, **kw)
def adam(model, **kw): return torch.optim.Adam(model.parameters(), lr=1e-3, **kw)
def adamw(model, **kw): return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=.1, **kw)
def groups(model):
    first, *rest = model.parameters()
    return torch.optim.SGD([dict(params=[first], lr=.2, weight_decay=.01), dict(params=rest)], lr=.05, momentum=.9)


def loss(model, i=0, part=slice(None)): return F.cross_entropy(model(xs[part].to(next(model.parameters()).dtype)), ys[part])
def flat(tensors): return torch.cat([t.detach().flatten() for t in tensors])


def start(optimizer=sgd, build=mlp, *, steps=100, pressure=.03, settings=quick, **kw):
    "A seeded model, its optimiser and a pruner of it"
    torch.manual_seed(1)
    model = build()
    opt = optimizer(model)
    return model, opt, Hyperflux(model, opt, steps=steps, pressure=pressure, settings=settings, **kw)


def train(model, opt, n=10, loss=loss):
    for i in range(n):
        opt.zero_grad()
        loss(model, i).backward()
        opt.step()


def state(p): # All that a step may change
    steps = torch.stack([p.gate_optimizer.state[t]['step'] for t in p._presences])
    logical = lambda v: flat(p._views(v))                                     # a vector itself follows the weights' order in memory
    return dict(theta=flat(p.params), presence=logical(p.presence), value=logical(p.value), mask=logical(p.mask),
                mean=logical(p._moments[0]), square=logical(p._moments[1]), steps=steps)


def assert_same(a, b, *keys):
    for k in keys or a: assert torch.equal(a[k], b[k]), k


def assert_sparse(p, low=.05, high=.95):
    "Model, values, presences and masks agree, with some weights absent"
    assert torch.equal(p.mask, (p.presence >= 0).to(p.dtype))
    assert torch.equal(flat(p.params), flat(p._values)*flat(p._masks)) and p.value.isfinite().all()
    assert low < p.density < high


# Equal to gates in the graph

def race(optimizer=sgd, build=mlp, dtype=torch.float32, *, loss=loss, steps=200, micro=1, at='gate', set_to_none=True, pressure=lambda q: .02 + .04*q, **kw):
    "Trains one network with a pruner, its twin with gates in the graph; returns the pruner and the twin's presences, values and weights"
    torch.manual_seed(1)
    model = build().to(dtype)
    twin, opt = copy.deepcopy(model), optimizer(model)
    p = Hyperflux(model, opt, pressure=pressure, steps=steps + 1, settings=Settings(prune=1., settle=0., travel=3.), **kw)
    g = Gated(twin, dict(zip(p.names, map(torch.clone, p._presences))))
    opts = optimizer(twin), torch.optim.Adam(g.gates.parameters(), lr=p.lr, eps=1e-8/p.d, fused=True)
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
    return p, dict(presence=flat(gate.presence for gate in g.gates), value=flat(own[n] for n in p.names), theta=flat(g.weights().values()))


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
    "Going through the gate layer in every micro-batch makes a sum of products of a product of sums: no more than rounding apart"
    assert_equal(*race(optimizer, dtype=torch.float64, micro=4), 1e-12)
    assert_equal(*race(optimizer, micro=4), 1e-5)


def test_equals_graph_compiled():
    "compile=True changes nothing but the last bits"
    p, twin = race(compile=True)
    assert p._count == 200
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
        self.embed, self.attention, self.head = nn.Linear(1, 6), nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 5)
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
    model = nn.Sequential(nn.Unflatten(1, (1, 13, 1)), nn.Conv2d(1, 5, (3, 1)), nn.ReLU(), nn.ConvTranspose2d(5, 3, (3, 1)), nn.Flatten(), nn.Linear(39, 5))
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
    assert_equal(*race(build=conv, dtype=torch.float64), 1e-12)          # some processors' kernels sum a convolution in another order when its weight was just made, so not bit for bit


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
    assert [int(p.gate_optimizer.state[t]['step']) for t in p._presences] == [200, 150, 50]
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
        assert [not torch.equal(*o) for o in zip(flux.split(p.sizes), p.meter.total.split(p.sizes))] == [j != still for j in range(3)]
    assert_sparse(p)


def test_no_gradient_at_all():
    "step() before any backward() changes nothing"
    model, opt, p = start()
    train(model, opt)
    before = state(p)
    opt.zero_grad()
    opt.step()
    assert_same(before, state(p))


# Works untouched: compilers, precision, scaling, clipping

def test_compiled_model():
    "torch.compile(model) trains as the plain model does, and computes with zeros"
    plain, opt, p = start()
    train(plain, opt, 30)
    model, opt, q = start()
    train(torch.compile(model), opt, 30)
    assert_sparse(q)
    torch.testing.assert_close(p.value, q.value, rtol=0, atol=1e-3)
    assert (p.mask != q.mask).sum() <= 2


def test_autocast():
    "bf16 autocast: weights, values and presences stay float32, and the run goes as in float32"
    def loss16(model, i):
        with torch.autocast('cpu', torch.bfloat16): return loss(model)
    model, opt, p = start()
    train(model, opt, 30, loss16)
    full = start()
    train(*full[:2], 30)
    assert p.presence.dtype == p.params[0].dtype == torch.float32
    assert_sparse(p)
    assert not torch.equal(p.value, full[2].value) and (p.mask == full[2].mask).float().mean() > .8


def test_bfloat16_model():
    "A model in bf16 keeps its zeros; presences are kept in float32"
    model, opt, p = start(build=lambda: mlp().to(torch.bfloat16))
    train(model, opt)
    assert p.params[0].dtype == torch.bfloat16 and p.presence.dtype == torch.float32
    assert_sparse(p)


def fused_sgd(model): return sgd(model, fused=True)
def fused_adam(model): return adam(model, fused=True)
scaled = pytest.mark.parametrize('optimizer', [sgd, adam, fused_sgd, fused_adam])
clipped = pytest.mark.parametrize('clip', [False, True], ids=['', 'unscaled and clipped'])


def scaled_step(model, opt, scaler, clip, overflow=False):
    opt.zero_grad()
    scaler.scale(loss(model)).backward()
    if overflow: model[2].weight.grad[0, 0] = torch.inf
    if clip:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), .1)
    scaler.step(opt)
    scaler.update()


@scaled
@clipped
def test_grad_scaler(optimizer, clip):
    "With a GradScaler, gates see the true gradients, even if the optimiser unscales inside its step"
    model, opt, p = start(optimizer)
    other, opt2, q = start(optimizer)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    for _ in range(10):
        scaled_step(model, opt, scaler, clip)
        opt2.zero_grad()
        loss(other).backward()
        if clip: nn.utils.clip_grad_norm_(other.parameters(), .1)
        opt2.step()
    assert_sparse(p)
    for k in ('presence', 'value'): torch.testing.assert_close(state(p)[k], state(q)[k], rtol=1e-5, atol=1e-5)


@scaled
@clipped
def test_overflow(optimizer, clip):
    "A step that the GradScaler skips leaves weights and gates as they were, and no trace in the meter; the next one goes on"
    model, opt, p = start(optimizer, meter=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    for _ in range(8): scaled_step(model, opt, scaler, clip)
    before, step = state(p), p.step
    scaled_step(model, opt, scaler, clip, overflow=True)
    assert scaler.get_scale() == 2.**9
    assert_same(before, state(p))
    assert 'found_inf' not in vars(p.gate_optimizer)
    if not getattr(opt, '_step_supports_amp_scaling', False): assert p.step == step      # the hooks were not even called
    scaled_step(model, opt, scaler, clip)
    assert (state(p)['steps'] == 9).all()
    assert not torch.equal(before['presence'], p.presence) and p.meter.mean.isfinite().all()
    assert_sparse(p)


def test_clipping():
    "Gradients clipped before the step bound what the step changes"
    model, opt, p = start(lambda m: torch.optim.SGD(m.parameters(), lr=.1), pressure=.0003)
    for _ in range(10):
        before = p.value.clone()
        opt.zero_grad()
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), .01)
        opt.step()
        assert 0 < (p.value - before).norm() <= .1*.01*1.001
    assert_sparse(p)


# Works untouched: copies and files

def test_deepcopy():
    "A copy made in mid-run is a plain sparse network that trains on its own"
    model, opt, p = start()
    train(model, opt)
    twin, before = copy.deepcopy(model), state(p)
    assert type(twin) is nn.Sequential and twin.state_dict().keys() == mlp().state_dict().keys()
    assert sum((w == 0).sum() for w in (twin[0].weight, twin[2].weight, twin[4].weight)) == p.d - p.left
    train(twin, sgd(twin))
    assert not (twin[0].weight == 0).any()
    assert_same(before, state(p))
    train(model, opt)
    assert p.step == 20


def reload(obj, **kw):
    "Through a file and back"
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, **kw)


def test_save_and_load():
    "Saved in mid-run, whole or as a state_dict, the network comes back with its zeros, and the run goes on as if nothing was"
    model, opt, p = start()
    train(model, opt)
    whole, weights = reload(model, weights_only=False), reload(model.state_dict(), weights_only=True)
    for o in (whole.state_dict(), weights): assert torch.equal(flat(o[n] for n in p.names), p.value*p.mask)
    assert torch.equal(whole(xs), model(xs))
    train(model, opt)
    other = start()
    train(*other[:2], 20)
    assert_same(state(p), state(other[2]))


def test_optimizer_pickles():
    "The optimiser can be copied and saved with its pruner attached; the copy is free of it"
    model, opt, p = start()
    train(model, opt)
    before = state(p)
    for o in (copy.deepcopy(opt), reload(opt, weights_only=False)): o.step()
    assert_same(before, state(p))


def test_optimizer_state_loaded():
    "The optimiser's own state, loaded in mid-run, goes in, and the pruner stays"
    model, opt, p = start()
    train(model, opt)
    opt.load_state_dict(reload(opt.state_dict(), weights_only=True))
    train(model, opt)
    other = start()
    train(*other[:2], 20)
    assert p.step == 20
    assert_same(state(p), state(other[2]))


def standstill(model, opt, p):
    "One step in which nothing moves by itself"
    for g in (*opt.param_groups, *p.gate_optimizer.param_groups): g['lr'] = 0.
    train(model, opt, 1)


def test_dense_weights_loaded():
    "A dense checkpoint loaded in mid-run gives the values; the presences stay, and absent weights are zero after the next step"
    model, opt, p = start()
    train(model, opt)
    before, dense = state(p), mlp().state_dict()
    model.load_state_dict(dense)
    standstill(model, opt, p)
    assert torch.equal(p.value, flat(dense[n] for n in p.names))
    assert_same(before, state(p), 'presence', 'mask')
    assert_sparse(p)


def test_sparse_weights_loaded():
    "An earlier sparse checkpoint gives the values of what it held; what is absent in both keeps its value"
    model, opt, p = start()
    train(model, opt)
    early = copy.deepcopy(model.state_dict())
    train(model, opt, 20)
    before, theirs = state(p), flat(early[n] for n in p.names)
    assert ((theirs == 0) & (before['mask'] == 1)).any() and ((theirs != 0) & (before['mask'] == 0)).any()
    model.load_state_dict(early)
    standstill(model, opt, p)
    assert torch.equal(p.value, torch.where((before['mask'] == 0) & (theirs == 0), before['value'], theirs))
    assert_same(before, state(p), 'presence', 'mask')
    assert_sparse(p)


def test_weights_written_behind_the_version_counter():
    "Weights written through .data, as vector_to_parameters does, are kept as those of load_state_dict are"
    model, opt, p = start()
    train(model, opt)
    nn.utils.vector_to_parameters(torch.full((sum(w.numel() for w in model.parameters()),), .5), model.parameters())
    standstill(model, opt, p)
    assert (p.value[p.mask > 0] == .5).all()


@pytest.mark.parametrize('meter', [False, True], ids=['', 'meter'])
@pytest.mark.parametrize('stop, stage', [(23, 'prune'), (51, 'regrow'), (70, 'settle')])
def test_resume(stop, stage, meter):
    "A run stopped and continued in a new process equals the one that was not, bit for bit"
    fresh = lambda: start(steps=80, pressure=None, sparsity=.8, settings=staged, meter=meter)
    whole, first, second = fresh(), fresh(), fresh()
    train(*whole[:2], 80)
    train(*first[:2], stop)
    assert first[2].stage == stage
    for o, s in zip(second, reload([o.state_dict() for o in first], weights_only=True)): o.load_state_dict(s)
    assert_same(state(first[2]), state(second[2]))
    train(*second[:2], 80 - stop)
    p, q = whole[2], second[2]
    if stage != 'settle': assert_same(state(p), state(q))
    else: assert_same(state(p), state(q), 'theta', 'presence', 'mask')
    for a, b in zip(whole[0].parameters(), second[0].parameters()): assert torch.equal(a, b)
    assert (p.step, p.gamma, p.landed, p.history) == (q.step, q.gamma, q.landed, q.history) and q.left == q.keep
    if meter: assert torch.equal(p.meter.mean, q.meter.mean) and p.meter.layers() == q.meter.layers()


def test_looking_is_free():
    "Taking the pruner's state, printing it and reading its rows changes nothing, even between a loss and its backward"
    model, opt, p = start()
    other = start()
    for _ in range(10):
        opt.zero_grad()
        value = loss(model)
        p.state_dict(), str(p), p._repr_markdown_(), p.layers(), p.density
        value.backward()
        opt.step()
    train(*other[:2])
    assert not p.value.requires_grad
    assert_same(state(p), state(other[2]))


# Works untouched: what happens in a step

def test_frozen():
    "Frozen parameters stay dense and untouched"
    def build():
        model = mlp()
        model[2].weight.requires_grad_(False)
        return model
    model, opt, p = start(build=build)
    before = model[2].weight.clone()
    train(model, opt)
    assert torch.equal(before, model[2].weight) and p.names == ['0.weight', '4.weight']
    assert_sparse(p)


@pytest.mark.parametrize('call', [lambda opt, closure: opt.step(closure), lambda opt, closure: opt.step(closure=closure)], ids=['positional', 'keyword'])
def test_closure(call):
    "step(closure) evaluates the sparse network once, returns its loss and does what the plain loop does"
    model, opt, p = start()
    values = []
    def closure():
        assert torch.equal(flat(p.params), p.value*p.mask)
        opt.zero_grad()
        values.append(loss(model))
        values[-1].backward()
        return values[-1]
    for i in range(10): assert call(opt, closure) is values[i]
    assert len(values) == 10
    other = start()
    train(*other[:2])
    assert_same(state(p), state(other[2]))


def test_closure_called_twice():
    "An optimiser that calls its closure twice a step is refused, and the model is left sparse"
    class Eager(torch.optim.SGD):
        def step(self, closure): return closure() + closure()
    model, opt, p = start(lambda m: Eager(m.parameters(), lr=.1))
    with torch.no_grad(): p.presence[::2] = -1.
    p.mask.copy_(p.presence >= 0)
    with pytest.raises(RuntimeError, match='more than once a step.*such as SGD or Adam'): opt.step(lambda: loss(model))
    assert_sparse(p)


class Stumbling(torch.optim.Optimizer):
    "Gradient descent that raises `error` half way"
    error = None
    def __init__(self, params): super().__init__(params, {})
    @torch.no_grad()
    def step(self, closure=None):
        for i, p in enumerate(self.param_groups[0]['params']):
            if self.error and i == 3: raise self.error
            p -= .1*p.grad


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()], ids=['error', 'interrupt'])
def test_error_in_step(error):
    "An error or Ctrl-C inside step leaves the sparse network as it was, and training can go on"
    model, opt, p = start(lambda m: Stumbling(m.parameters()), pressure=.01)
    train(model, opt)
    assert_sparse(p)
    before, opt.error = state(p), error
    with pytest.raises(type(error)): train(model, opt, 1)
    assert_same(before, state(p))
    opt.error = None
    with torch.no_grad():
        model[0].bias += .1*model[0].bias.grad                            # undo what the first half did to what is not pruned
    train(model, opt)
    other = start(lambda m: Stumbling(m.parameters()), pressure=.01)
    train(*other[:2], 20)
    assert p.step == 20
    torch.testing.assert_close(p.value, other[2].value)
    assert_sparse(p)


def test_subclass_calls_super():
    "An optimiser whose step calls super().step(), for which torch runs the hooks twice, is pruned as any other"
    class Own(torch.optim.SGD):
        def step(self, closure=None): return super().step(closure)
    other = start()
    model, opt, p = start(lambda m: Own(m.parameters(), lr=.1, momentum=.9, weight_decay=5e-4))
    train(*other[:2])
    train(model, opt)
    assert p.step == 10
    assert_same(state(p), state(other[2]))


def test_signature_of_step():
    "Frameworks that look at the signature of step find what was there"
    model, opt, p = start()
    assert inspect.signature(opt.step) == inspect.signature(sgd(mlp()).step)


def test_lr_scheduler():
    "A learning-rate scheduler works, without a warning, whether made before or after the pruner"
    runs = []
    for first in (True, False):
        make = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 5, .5)
        made = []
        model, opt, p = start(lambda m: (made.append(sgd(m)), first and made.append(make(made[0])))[0] or made[0])
        scheduler = made[1] if first else make(opt)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            for _ in range(10):
                train(model, opt, 1)
                scheduler.step()
        assert opt.param_groups[0]['lr'] == .1/4 and p.step == 10
        runs.append(state(p))
        p.detach()
        train(model, opt, 1)
        assert p.step == 10
    assert_same(*runs)


def test_hook_order():
    "Hooks that a user registers later run after the pruner's: before the step they see ω and masked gradients, after it the sparse network"
    model, opt, p = start()
    train(model, opt)
    value, mask, seen = p.value.clone(), p.mask.clone(), []
    def before(*_):
        assert torch.equal(flat(p.params), value)
        assert (flat(w.grad for w in p.params)[mask == 0] == 0).all()
        seen.append('before')
    def after(*_):
        assert_sparse(p)
        seen.append('after')
    opt.register_step_pre_hook(before), opt.register_step_post_hook(after)
    train(model, opt, 1)
    assert seen == ['before', 'after']


def test_detach():
    "After detach() the optimiser goes on as if there had never been a pruner"
    model, opt, p = start()
    train(model, opt)
    p.detach()
    assert torch.equal(flat(p.params), p.value*p.mask) and opt.step.__func__ is type(opt).step
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    twin = copy.deepcopy(model)
    plain = sgd(twin)
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt), train(twin, plain)
    for a, b in zip(model.parameters(), twin.parameters()): assert torch.equal(a, b)
    assert p.step == 10


def test_attach_again():
    "What was learnt between detach() and attach() is kept"
    model, opt, p = start()
    train(model, opt)
    p.detach()
    train(model, opt)
    between = flat(p.params)
    p.attach()
    standstill(model, opt, p)
    assert torch.equal(p.value, between) and p.step == 11
    assert_sparse(p)


@pytest.mark.parametrize('wrapped', [True, False])
def test_average_is_masked(wrapped):
    "An average of weights over time becomes as sparse as the model with apply_mask, given as AveragedModel or as the module in it"
    model, opt, p = start()
    ema = torch.optim.swa_utils.AveragedModel(model)
    train(model, opt)
    p.apply_mask(ema if wrapped else ema.module)
    assert torch.equal(flat(dict(ema.module.named_parameters())[n] for n in p.names) != 0, p.mask > 0)


def test_no_waiting():
    "An ordinary step never makes the host wait for the device"
    class Waits(TorchDispatchMode):
        found = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
            return func(*args, **(kwargs or {}))
    model, opt, p = start(settings=Settings(prune=1., settle=0., lr=.01, low=0., high=.1, updates=1), meter=True)
    train(model, opt, 2)
    with Waits() as waits:
        train(model, opt, 8)
        assert waits.found == 0
        p.left
        assert waits.found == 1


@pytest.mark.parametrize('meter, expected', [(False, 24), (True, 37)])
def test_memory(meter, expected):
    "Besides the model a pruner keeps 24 bytes a weight, and 13 more with a meter"
    model, opt, p = start(meter=meter)
    train(model, opt)
    def tensors(o):
        if isinstance(o, torch.Tensor): yield o
        elif isinstance(o, dict): yield from (t for v in o.values() for t in tensors(v))
        elif isinstance(o, (list, tuple)): yield from (t for v in o for t in tensors(v))
    mine = [vars(p), p.gate_optimizer.state, [t.grad for t in p._presences], vars(p.meter) if meter else []]
    theirs = {t.untyped_storage().data_ptr() for t in model.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(mine)}
    assert expected*p.d <= sum(n for at, n in sizes.items() if at not in theirs) <= expected*p.d + 64


def test_many_compiled():
    "One process can compile the gates of any number of networks"
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (3, 4, 5, 6):
            model, opt, p = start(build=lambda: nn.Linear(13, width), compile=True)
            train(model, opt, 1, lambda m, i: m(xs).square().mean())
            assert p._count == 1


# Stages and landing

@pytest.mark.parametrize('sparsity', [.5, .9, .98, .995])
def test_lands_exactly(sparsity):
    "The network has exactly the weights asked for, from the landing to the end"
    model, opt, p = start(sparsity=sparsity, pressure=None, steps=120, settings=staged)
    nonzeros, stages = [], []
    for _ in range(120):
        stages.append(p.stage)
        train(model, opt, 1)
        nonzeros.append(int(flat(p.params).count_nonzero()))
    keep = round((1 - sparsity)*255)
    assert keep == p.keep and nonzeros[89:] == [keep]*31
    assert stages == ['prune']*60 + ['regrow']*30 + ['settle']*30 and p.stage == 'done'
    rows = p.history
    assert [s for s in dict.fromkeys(r['stage'] for r in rows) if s != 'refloated'] == ['prune', 'regrow', 'settle', 'landing']   # so few steps may need a lift
    assert [r['step'] for r in rows] == sorted(r['step'] for r in rows) and rows[-1]['step'] == 90
    assert all(r['pressure'] == 0 for r in rows if r['step'] > 60) and all(0 <= r['density'] <= 1 and r['planned'] <= 1 for r in rows)
    assert f'{keep:,} of 255 weights left, {keep:,} asked' in str(p) and 'total' in str(p)


def test_pressure_alone():
    "With a pressure and no sparsity there is nothing to land on"
    model, opt, p = start(steps=120, settings=staged)
    train(model, opt, 90)
    mask = p.mask.clone()
    train(model, opt, 30)
    assert torch.equal(mask, p.mask)                                      # the settle stage
    assert not p.landed and all(r['planned'] is None and r['stage'] != 'landing' for r in p.history)
    assert {r['pressure'] for r in p.history} == {.03, 0.} and p.stage == 'done' and p.density < .95
    assert 'asked' not in str(p)


def test_authors():
    "authors(...) runs the authors' plan: their controller once an epoch, regrowth, and no exact landing"
    model, opt, p = start(sparsity=.8, pressure=None, steps=1200, settings=authors(10, 10))
    train(model, opt, 1200)
    assert not p.landed and p.stage == 'done' and p.density < .8
    assert [r['step'] for r in p.history] == list(range(60, 1201, 60)) and {r['stage'] for r in p.history} == {'prune', 'regrow', 'done'}
    assert p.gate_optimizer.param_groups[0]['eps'] == 1e-8


@pytest.mark.parametrize('settings, kw', [(staged, dict(sparsity=.8, pressure=None)), (quick, dict(sparsity=.8, pressure=None)), (quick, dict())],
                         ids=['landed', 'landed on the last step', 'never landed'])
def test_past_the_end(settings, kw):
    "Steps past the announced end warn once, at the user's line, and leave the topology as it is"
    model, opt, p = start(steps=60, settings=settings, **kw)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.*under half of the planned')
        train(model, opt, 60)
    mask, theta = p.mask.clone(), flat(p.params)
    with pytest.warns(UserWarning, match='step 61 of 60 announced: the topology stays as it is') as caught: train(model, opt, 5)
    assert [w.filename for w in caught] == [__file__]
    now = flat(p.params)
    assert torch.equal(p.mask, mask) and torch.equal(now != 0, mask > 0) and not torch.equal(now, theta)


def test_refloats_before_the_network_is_empty():
    "A controller that presses far too hard empties no network: one warning, back to the plan, and the landing is exact"
    class Press(LogController):
        def __call__(self, density, planned, progress): return 1e6
    model, opt, p = start(pressure=None, sparsity=.9, steps=200, settings=Settings(controller=Press))
    with pytest.warns(UserWarning, match='under half of the planned'): train(model, opt, 200)
    assert sum(r['stage'] == 'refloated' for r in p.history) > 1
    assert p.left == p.keep and min(r['density'] for r in p.history if r['stage'] == 'regrow') > 0


def test_vectors_follow_the_weights_order_in_memory():
    "In channels_last: the same presence for the same weight, flat views without gaps, and a state that is not read in the wrong order"
    def make(layout):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten(), nn.Linear(2*4*4, 3)).to(memory_format=layout)
        opt = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9)
        return net, opt, Hyperflux(net, opt, sparsity=.5, steps=200, seed=3)
    (a, oa, pa), (b, ob, pb) = make(torch.contiguous_format), make(torch.channels_last)
    assert b[0].weight.stride() != a[0].weight.stride()
    assert [v.stride() for v in pb._presences] == [p.stride() for p in pb.params]
    assert all(s.equal(t) for s, t in zip(pa._presences, pb._presences)) and not pa.presence.equal(pb.presence)
    assert all(v.equal(p) for v, p in zip(pb._values, pb.params))
    state = pa.state_dict()
    with pytest.raises(ValueError, match='lie in memory in another order'): pb.load_state_dict(state)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = torch.randn(8, 4, 6, 6, generator=g)
        for net, opt in (a, oa), (b, ob): opt.zero_grad(); net(x).square().mean().backward(); opt.step()
    assert pa.left == pb.left == pa.keep
    same = sum(int((s == t).sum()) for s, t in zip(pa._masks, pb._masks))
    assert same > .95*pa.d, 'only rounding may tell the two runs apart'


def test_a_wrapped_optimizer_is_named_and_a_failed_attempt_leaves_nothing_behind():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer): self.optimizer = optimizer
    net = nn.Linear(20, 20)
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    with pytest.raises(TypeError, match='Wrapper wraps an optimiser and fires no hooks of its own: give the pruner the inner one'):
        Hyperflux(net, Wrapper(opt), sparsity=.5, steps=400)
    Hyperflux(net, opt, sparsity=.5, steps=400)


def test_an_average_on_another_device_is_masked():
    net = nn.Linear(20, 20)
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    pruner = Hyperflux(net, opt, sparsity=.5, steps=400)
    pruner.mask[:100] = 0
    average = nn.Linear(20, 20, device='meta')
    pruner.apply_mask(average)                                             # no CUDA is needed to see that masks move
    assert average.weight.device.type == 'meta'
