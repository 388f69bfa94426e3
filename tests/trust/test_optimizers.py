"What an optimiser means by a step: every flag and every class of them."
import warnings

import pytest, torch
from torch.optim import SGD, Adam, AdamW


from tests.helpers import loss, mlp, nnz, said, train
from tests.trust.optimizers import (
    TORCH, make, having, small, SHORT, both, every, with_methods, length, exact, holds, run, same,
    Wrapper)


@pytest.mark.parametrize('name, method', [(n, m) for n in having('maximize') for m in ('Hyperflux', 'Taylor', 'RigL')
                                          if m == 'Hyperflux' or n in ('SGD', 'Adam', 'Rprop')])
def test_maximizing_minus_the_loss(name, method):
    """Every optimiser of PyTorch that can maximise: on minus the loss it prunes what minimising the loss prunes, bit
    for bit"""
    kw = dict(lr=.01)
    assert same(run(method, lambda m: TORCH[name](m.parameters(), **kw)),
                run(method, lambda m: TORCH[name](m.parameters(), maximize=True, **kw), sign=-1))


@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
def test_maximizing_with_noisy_gates(name):
    "L0's gates too follow the loss, not the sign of its gradient"
    assert same(run('L0', lambda m: TORCH[name](m.parameters(), lr=.01)),
                run('L0', lambda m: TORCH[name](m.parameters(), lr=.01, maximize=True), sign=-1))


@pytest.mark.parametrize('method', list(SHORT))
def test_one_group_maximizes(method):
    "Two groups, of which one maximises, and gets its gradients with the other sign, from hooks: as if both minimised"
    def optimizer(m, up):
        return Adam([dict(params=list(m[0].parameters()), maximize=up), dict(params=list(m[2].parameters()))], lr=.01)
    def turn(m, o):
        for p in m[0].parameters(): p.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', -p.grad))
    assert same(run(method, lambda m: optimizer(m, False)), run(method, lambda m: optimizer(m, True), before=turn))


@pytest.mark.parametrize('method', ['Hyperflux', 'Taylor', 'L0'])
def test_maximize_changed_in_mid_run(method):
    "The flag of a group is turned after some steps, together with the loss"
    def go(turns):
        m = small()
        o = SGD(m.parameters(), lr=.05, momentum=0)
        p = SHORT[method](m, o)

        def loop():
            for i in range(p.steps):
                o.param_groups[0]['maximize'] = up = turns and i % 7 > 3
                m.zero_grad()
                ((-1 if up else 1)*loss(m)).backward()
                o.step()
        said(loop)
        return p, [w.detach().clone() for w in m.parameters()]
    assert same(go(False), go(True))


@pytest.mark.parametrize('method', ['Hyperflux', 'Taylor', 'RigL'])
def test_an_inner_optimizer_maximizes(method):
    """A wrapper with groups of its own drives an optimiser that maximises: its masks are those of minimising, or it is
    refused by name"""
    plain = run(method, lambda m: Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.05)))
    try: up = run(method, lambda m: Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.05, maximize=True)), sign=-1)
    except ValueError as e: assert 'maximize' in str(e)
    else: assert same(plain, up)


@pytest.mark.parametrize('name, flag, method', [(n, f, m) for f in ('foreach', 'fused', 'capturable')
                                                for n in having(f) for m in ('Hyperflux', 'GMP') if m == 'Hyperflux'
                                                or f == 'fused'])
def test_other_forms_of_the_same_step(name, flag, method):
    """foreach=, fused= and capturable= are other ways to the same step: the same masks, and weights up to rounding;
    what PyTorch refuses is refused in its words"""
    def alone(): m = small(); o = TORCH[name](m.parameters(), lr=.01, **{flag: True}); train(m, o, 2)
    try: alone()
    except Exception as e:
        with pytest.raises(type(e), match=r'{}'.format(flag)):
            run(method, lambda m: TORCH[name](m.parameters(), lr=.01, **{flag: True}))
        return
    plain = {} if flag == 'capturable' else {flag: False}
    (p, ws), (q, vs) = (run(method, lambda m: TORCH[name](m.parameters(), lr=.01, **kw))
                        for kw in (plain, {flag: True}))
    assert torch.equal(p.mask, q.mask)
    for w, v in zip(ws, vs): torch.testing.assert_close(w, v, rtol=1e-3, atol=1e-4)


@both
@pytest.mark.parametrize('name', having('differentiable'))
def test_differentiable(name, method):
    """A graph through the step would lead around the gates: refused at construction, by the flag's name, for the
    optimiser or for one group; the weights are free again"""
    for groups in (lambda m: m.parameters(), lambda m: [dict(params=m[0].parameters()), dict(params=m[2].parameters(),
            differentiable=True)]):
        m = small()
        o = TORCH[name](groups(m), lr=.01, differentiable=True)
        with pytest.raises(ValueError, match='differentiable=True'): SHORT[method](m, o)
        SHORT[method](m, SGD(m.parameters(), lr=.1)).detach()


@both
def test_differentiable_inside(method):
    "The same in an optimiser that a wrapper drives"
    m = small()
    o = Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.1, differentiable=True))
    with pytest.raises(ValueError, match='differentiable=True'): SHORT[method](m, o)


@every
def test_a_group_of_learning_rate_zero(name):
    "The first layer has learning rate 0: it is pruned all the same, exactly, and what stays of it is what it was"
    m = mlp()
    was = m[0].weight.detach().clone()
    o = SGD([dict(params=m[0].parameters(), lr=0.), dict(params=m[2].parameters())], lr=.1, momentum=.9)
    p = make[name](m, o, .8, length(name))
    said(train, m, o, p.steps)
    assert exact(p)
    w = m[0].weight.detach()
    # L0 folds its gates, which lie in [0, 1], in
    if name != 'L0': assert torch.equal(w, was*(w != 0))
    assert 0 < int(w.count_nonzero()) < w.numel()


DECAYS = dict(SGD=lambda ps: SGD(ps, lr=.1, momentum=.9, weight_decay=.01), Adam=lambda ps: Adam(ps, lr=.01,
    weight_decay=.01), AdamW=lambda ps: AdamW(ps, lr=.01, weight_decay=.1),
              **{f'{n} decoupled': lambda ps, n=n: TORCH[n](ps, lr=.01, weight_decay=.1, decoupled_weight_decay=True)
                 for n in having('decoupled_weight_decay')},
              huge=lambda ps: AdamW(ps, lr=.1, weight_decay=10.))               # each step takes all of a weight away


@pytest.mark.parametrize('method', ['Hyperflux', 'GMP', 'RigL', 'Taylor'])
@pytest.mark.parametrize('decay', list(DECAYS))
def test_weight_decay(decay, method):
    "Coupled or not, decay leaves exactly the target, and +0 where weights are absent"
    m = small()
    o = DECAYS[decay](m.parameters())
    p = SHORT[method](m, o)
    said(train, m, o, p.steps, lambda i: holds(p) or pytest.fail(f'at step {i}'))
    assert nnz(p) == p.keep


@with_methods('outer', ['', 'lookahead_'])
def test_gradients_with_a_graph(name, outer):
    """AdaHessian differentiates its gradients again, at weights that the pruner has exchanged: a clear error at the
    first step, and nothing has moved"""
    optim = pytest.importorskip('timm.optim')
    m = mlp()
    o = optim.create_optimizer_v2(m, opt=f'{outer}adahessian', lr=.01)
    p = make[name](m, o, .5, 120)
    was = [w.detach().clone() for w in m.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                         # PyTorch's, of a reference cycle
        loss(m).backward(create_graph=True)
    with pytest.raises(RuntimeError, match='create_graph'): o.step()
    assert p.step == 0 and all(map(torch.equal, m.parameters(), was))
    m.zero_grad()
