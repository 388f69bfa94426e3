"Whatever happens in a step: closures, errors, other hooks, other pruners."
import copy, inspect, warnings

import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyperflux import Settings
from tests.core.rig import xs, mlp, sgd, loss, flat, start, train, state, assert_same, assert_sparse, standstill


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


@pytest.mark.parametrize('call', [lambda opt, closure: opt.step(closure),
                                  lambda opt, closure: opt.step(closure=closure)], ids=['positional', 'keyword'])
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
        # undo what the first half did to what is not pruned
        model[0].bias += .1*model[0].bias.grad
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
    """Hooks that a user registers later run after the pruner's: before the step they see ω and masked gradients, after
    it the sparse network"""
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
    """An average of weights over time becomes as sparse as the model with apply_mask, given as AveragedModel or as the
    module in it"""
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
            self.found += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                                  torch.ops.aten.masked_select)
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
    mine = [vars(p), p.gate_optimizer.state, [t.grad for t in p.gate_params], vars(p.meter) if meter else []]
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
