"Closures, SAM, subclasses, steps and hooks that are replaced later."
import functools, types

import pytest, torch
from torch.optim import SGD


from tests.helpers import loss, mlp, negative_zeros, nnz, said, train
from tests.trust.optimizers import make, MAIN, both, main, with_methods, length, exact, holds, Mine, SAM, sam, train_sam


@functools.cache
def sam_alone(how, steps=60):
    "The loss before and after, without a pruner"
    m = mlp()
    first = loss(m).item()
    train_sam(m, sam(m, how=how), steps)
    return first, loss(m).item()


@pytest.mark.parametrize('how, name', [('plain', n) for n in [*MAIN, 'L0']] + [(how, n)
        for how in ('data', 'data.add_') for n in ('Hyperflux', 'GMP')])
def test_sam_through_its_closure(how, name):
    """SAM evaluates its closure where it has moved the weights to, in the usual way or through .data: it trains as it
    does without a pruner, and lands exactly"""
    first, alone = sam_alone(how)
    m, steps = mlp(), length(name) + 20
    o = sam(m, how=how)
    p = make[name](m, o, .5, steps)
    biases = m[2].bias.detach().clone()
    texts = said(train_sam, m, o, steps, lambda i: holds(p) or pytest.fail(f'at step {i}'))
    assert p.step == steps and exact(p)
    assert alone < first/20 and loss(m) < first/(2 if name == 'IMP' else 20)    # the last of IMP's trainings is short
    assert (m[2].bias - biases).abs().max() > .05 and not any('absent weights' in t for t in texts)


@both
def test_sam_without_noise_is_its_base(method):
    "With a radius of almost nothing, SAM's steps are those of its base optimiser: so are its masks"
    ms = mlp(), mlp()
    os = sam(ms[0], rho=1e-12), SGD(ms[1].parameters(), lr=.2, momentum=.9)
    ps = [make[method](m, o, .5, 40) for m, o in zip(ms, os)]
    said(train_sam, ms[0], os[0], 40)
    said(train, ms[1], os[1], 40)
    assert (ps[0].mask != ps[1].mask).sum() < .02*ps[0].d


@main
def test_sams_two_steps(name):
    """first_step and second_step go around a pruner of SAM: refused at the first of them that steps, by name, with what
    to do; around one of its base optimiser they are exact"""
    m = mlp()
    o = sam(m)
    p = make[name](m, o, .5, 40)
    def both_steps():
        loss(m).backward()
        o.first_step()
        loss(m).backward()
        o.second_step()
    with pytest.raises(RuntimeError, match=r'SGD.*SAM.*base_optimizer'): both_steps()
    assert p.step == 0
    p.detach()
    m = mlp()
    o = sam(m)
    p = make[name](m, o.base_optimizer, .5, 40)
    def loop():
        for _ in range(40):
            both_steps()
            assert holds(p)
    texts = said(loop)
    assert p.step == 40 and exact(p) and not any('absent weights' in t for t in texts)


@both
def test_a_sam_of_ones_own_that_is_never_stepped(method):
    """Everything happens in methods that no optimiser of PyTorch has: the report counts what is in the model, and says
    that no step was seen"""
    class Own(SAM):
        @torch.no_grad()
        def second_step(self):
            for p, s in self.each(): p.copy_(s['there']).sub_(.2*p.grad)
            self.zero_grad()
    m = mlp()
    o = Own(m.parameters(), SGD, lr=.2)
    p = make[method](m, o, .5, 120)
    for _ in range(3):
        loss(m).backward()
        o.first_step()
        loss(m).backward()
        o.second_step()
    assert p.left == nnz(p) == 768 and f'no step of {type(o).__name__} was seen' in repr(p) and 'no step' in str(p)


@both
def test_a_closure_called_twice(method):
    """The form of SAM that begins with a closure of its own: refused as soon as it asks again, with what to do; the
    zeros hold"""
    m = mlp()
    o = sam(m, twice=True)
    p = make[method](m, o, .5, 120)
    with pytest.raises(RuntimeError, match='closure more than once'): train_sam(m, o, 120)
    assert p.step == 0 and nnz(p) == p.left


@with_methods('shift', [0., 1e-3])
def test_a_subclass_that_calls_its_parents_step(shift, name):
    "Two steps of PyTorch's, one inside the other, are one step; what is written after the inner one belongs to it"
    m = mlp()
    o = Mine(m.parameters(), lr=.1, momentum=.9)
    o.shift = shift
    p = make[name](m, o, .8, length(name))
    texts = said(train, m, o, p.steps, lambda i: holds(p) or pytest.fail(f'at step {i}'))
    assert p.step == o.steps == length(name) and exact(p) and not any('absent weights' in t for t in texts)


@both
@pytest.mark.parametrize('how', ['around the old one', "the class's own", 'nothing that was there',
                                 'nothing that was there, through .data'])
@pytest.mark.parametrize('when', [0, 20])
def test_a_step_replaced_later(when, how, method):
    """Somebody puts another step on the optimiser after the pruner was made: it is followed, or the report says that it
    was not"""
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    p = make[method](m, o, .8, 40)
    old = o.step

    @torch.no_grad()
    def own(self, closure=None):
        for w in m.parameters(): (w.data if 'data' in how else w).sub_(.1*w.grad)
    new = {'around the old one': lambda self, closure=None: old(closure),
           "the class's own": lambda self, closure=None: SGD.step(self, closure)}.get(how, own)
    said(train, m, o, when)
    o.step = types.MethodType(new, o)
    said(train, m, o, 40 - when)
    assert p.left == nnz(p)
    if 'nothing' not in how: assert p.step == 40 and exact(p)
    else: assert p.step == when and ('not zero' if when else 'no step of SGD was seen') in repr(p)


@both
@pytest.mark.parametrize('which', ['both', 'pre', 'post'])
def test_hooks_removed(which, method):
    "Somebody clears an optimiser's hooks: an error at the next step, by name, and the zeros hold"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    p = make[method](m, o, .8, 40)
    said(train, m, o, 35)
    left = p.left
    if which != 'post': o._optimizer_step_pre_hooks.clear()
    if which != 'pre': o._optimizer_step_post_hooks.clear()
    with pytest.raises(RuntimeError, match='SGD has stepped without'): train(m, o, 3)
    assert nnz(p) == p.left == left and negative_zeros(p) == 0
