"What a pruner refuses, and what it says then."
import gc

import pytest, torch
from torch import nn

from hyperflux import Hyperflux, Settings, authors


def mlp(): return nn.Sequential(nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 5))
def sgd(model): return torch.optim.SGD(model.parameters(), lr=.1)
def prune(model=None, optimizer=None, **kw):
    model = model or mlp()
    return Hyperflux(model, optimizer or sgd(model), **dict(dict(sparsity=.9, steps=200), **kw))
def refuses(match, error=ValueError): return pytest.raises(error, match=match)


@pytest.mark.parametrize('sparsity, error, says', [
    (98, ValueError, r'fraction in \[0, 1\): got 98; did you mean 0.98'), (-.1, ValueError, r'got -0.1'),
        (float('nan'), ValueError, 'got nan'),
    (1., ValueError, 'leaves no weight at all'), ('0.9', TypeError, "such as 0.98: got '0.9'"),
        (True, TypeError, 'got True')])
def test_sparsity(sparsity, error, says):
    "A sparsity that is no fraction"
    with refuses(says, error): prune(sparsity=sparsity)


def test_nothing_kept():
    "A sparsity that rounds to no weight at all is refused before the first step"
    with refuses('no weight|at least one'): prune(nn.Linear(3, 2), sparsity=.95)


def test_no_aim():
    "Neither a sparsity nor a pressure"
    with refuses(r'sparsity= \(a fraction\) or pressure='): prune(sparsity=None)


@pytest.mark.parametrize('build', [lambda: nn.Sequential(nn.LayerNorm(7)), lambda: nn.Embedding(5, 7),
                                   lambda: mlp().requires_grad_(False)],
                         ids=['norm', 'embedding', 'frozen'])
def test_nothing_to_prune(build):
    "No layer that is pruned by default"
    model = build()
    with refuses('no prunable weight in .*name some with targets='):
        prune(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def test_everything_ignored():
    "ignore= leaves nothing"
    with refuses('is left after targets= and ignore='): prune(ignore='re:.')


@pytest.mark.parametrize('pattern, says', [
    ('0.wieght', "'0.wieght' matches no weight of the model; did you mean '0.weight'"),
        ('re:conv', 'matches no weight.*the model has 0.weight, 0.bias'),
    (nn.Conv2d, 'Conv2d.*matches no weight'), (nn.Linear(13, 11), 'matches no weight'), ('1', "'1' matches no weight")])
@pytest.mark.parametrize('where', ['targets', 'ignore'])
def test_pattern(pattern, says, where):
    "A pattern that matches nothing, with near names"
    with refuses(says): prune(**{where: pattern})
    with refuses(says): prune(**{where: [nn.Linear, pattern]})


def test_pattern_type():
    "A pattern that is none"
    with refuses('take modules, types, names or regular expressions: got 3', TypeError): prune(targets=3)


def test_not_in_optimizer():
    "A weight that the optimiser does not train"
    model = mlp()
    with refuses('not in the optimiser: 0.weight; add them, freeze them, or leave them out with ignore='):
        prune(model, sgd(model[2]))
    assert prune(model, sgd(model[2]), ignore='0').names == ['2.weight']


def test_optimizer():
    "LBFGS, and what is no optimiser"
    model = mlp()
    with refuses('LBFGS evaluates its closure several times.*use SGD, Adam', TypeError):
        prune(model, torch.optim.LBFGS(model.parameters()))
    with refuses('must be a torch.optim.Optimizer: got StepLR', TypeError):
        prune(model, torch.optim.lr_scheduler.StepLR(sgd(model), 1))


def test_already_attached():
    "A model has one pruner at a time; detach() makes room for the next"
    model = mlp()
    opt = sgd(model)
    first = prune(model, opt)
    with refuses(r'0.weight already has a pruner \(Hyperflux\): call its detach\(\) first'): prune(model, opt)
    with refuses('already has a pruner'): first.attach()
    first.detach()
    second = prune(model, opt)
    first.detach()                                                    # once more, which is not the second's
    with refuses('already has a pruner'): prune(model, opt)
    assert second.optimizer is opt


def test_collected():
    "A pruner that went out of scope with its optimiser is in nobody's way"
    model = mlp()
    first = prune(model)
    gc.disable()
    try:
        del first
        assert prune(model).model is model
    finally: gc.enable()


@pytest.mark.parametrize('bad', [dict(targets="nowhere"), dict(pressure=lambda q: 1/q),
                                 dict(settings=Settings(controller=lambda: 1/0))],
                         ids=['targets', 'pressure', 'controller'])
def test_refused_leaves_no_trace(bad):
    "After a refusal, model and optimiser are as before, and a second try with better arguments works"
    model = mlp()
    opt = sgd(model)
    with pytest.raises((ValueError, ZeroDivisionError)): prune(model, opt, **bad)
    assert opt.step.__func__ is type(opt).step and not opt._optimizer_step_pre_hooks
    prune(model, opt)


@pytest.mark.parametrize('steps', [0, -3, 200., '200'])
def test_steps(steps):
    "Steps are counted in whole numbers"
    with refuses('a whole number above 0: got'): prune(steps=steps)


def test_too_few_steps():
    "Fewer steps than pruning needs"
    with refuses('pruning was given 10 steps and needs at least 50.*train for more epochs'): prune(steps=20)
    with refuses('moving by at most 1e-05 a step cannot reach zero in 100 steps.*'
                 'use at least 50000 steps or lr >= 0.005'):
        prune(settings=Settings(lr=1e-5))


@pytest.mark.parametrize('shares', [dict(prune=.9, settle=.3), dict(prune=0.), dict(prune=1.5), dict(settle=-.1)])
def test_stages(shares):
    "Stages that do not fit into the run"
    with refuses(r'prune \+ settle <= 1: got prune='): prune(settings=Settings(**shares))


def test_authors():
    "A task that the authors did not have, and a plan that cannot get there"
    with refuses("task is one of lenet, cifar, imagenet: got 'mnist'"): authors(10, 10, 'mnist')
    with refuses('trajectory over 2 epochs ends at a density between'):
        prune(sparsity=.999, steps=4000, settings=authors(2, 2))


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_bad_gradient(bad):
    "NaN or infinite gradients stop the run when the controller looks next"
    model = mlp()
    opt = sgd(model)
    pruner = prune(model, opt, settings=Settings(updates=20))
    def train(n, factor=1.):
        for _ in range(n):
            opt.zero_grad()
            (model(torch.ones(3, 13)).square().mean()*factor).backward()
            opt.step()
    train(12)
    train(1, bad)
    with refuses('at step 20: .*NaN or infinity; lower the learning rate, clip gradients, or use a GradScaler',
                 FloatingPointError):
        train(100)
    assert pruner.step == 20


def test_sparse_gradient():
    "Sparse gradients cannot be gated; the model is left as it was"
    model = nn.Sequential(nn.Embedding(9, 5, sparse=True), nn.Linear(5, 3))
    opt = sgd(model)
    pruner = prune(model, opt, targets=[nn.Embedding, nn.Linear])
    before = [p.clone() for p in model.parameters()]
    model(torch.tensor([1, 2])).sum().backward()
    with refuses('sparse gradients cannot be gated: use a layer with sparse=False, or ignore= it', TypeError):
        opt.step()
    assert all(map(torch.equal, before, model.parameters())) and pruner.step == 0


def test_state_of_another():
    "The state of a pruner of another network"
    pruner, other = prune(), prune(nn.Sequential(nn.Linear(13, 12), nn.ReLU(), nn.Linear(12, 5)))
    before = pruner.presence.clone()
    with refuses(r'belongs to another pruner: its sizes is \[156, 60\], here it is \[143, 55\]'):
        pruner.load_state_dict(other.state_dict())
    with refuses('its names is'): pruner.load_state_dict(prune(nn.Linear(11, 13)).state_dict())
    assert torch.equal(before, pruner.presence)


def test_devices():
    "Weights on several devices"
    model = nn.Sequential(nn.Linear(13, 11), nn.Linear(11, 5, device='meta'))
    with refuses('lie on several devices; a pruner works on one: choose with targets='): prune(model)
    assert prune(model, targets='0').d == 143
