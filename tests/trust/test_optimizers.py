"What an optimiser means by a step, and who takes it: every flag and every class of PyTorch's and timm's optimisers, wrappers, closures and strangers."
import copy, functools, gc, inspect, types, warnings

import pytest, torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hyperflux import Hyperflux, Settings
from hyperflux.rivals.scores import GMP, IMP
from hyperflux.rivals.l0 import L0
from hyperflux.rivals.gradients import RigL, Taylor

from .helpers import METHODS, accuracy, loss, mlp, negative_zeros, nnz, said, train

TORCH = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer) and c is not Optimizer}
make = dict(METHODS)
MAIN = ['Hyperflux', 'GMP', 'Taylor', 'IMP', 'RigL']                            # one of each kind that can do with few steps


def having(flag): return sorted(n for n, c in TORCH.items() if flag in inspect.signature(c).parameters and n not in ('LBFGS', 'SparseAdam'))
def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))          # 192 weights


class Often(RigL): every = 5


SHORT = dict(Hyperflux=lambda m, o: Hyperflux(m, o, sparsity=.7, steps=20, settings=Settings(lr=.1)), Taylor=lambda m, o: Taylor(m, o, sparsity=.7, steps=20),
             RigL=lambda m, o: Often(m, o, sparsity=.7, steps=20), L0=lambda m, o: L0(m, o, sparsity=.7, steps=112, span=(0, .9)), GMP=lambda m, o: GMP(m, o, sparsity=.7, steps=20))
both = pytest.mark.parametrize('method', ['Hyperflux', 'GMP'])
main, every = (pytest.mark.parametrize('name', ns) for ns in (MAIN, [n for n, _ in METHODS]))
def with_methods(kind, kinds): return pytest.mark.parametrize(f'{kind}, name', [(k, n) for k in kinds for n in MAIN] + [(kinds[0], 'L0')])      # once with L0, which needs more steps
def length(name): return 120 if name == 'L0' else 40


def exact(p):
    "Zeros where the mask has them, the target's number of weights, and a report that says so; what L0 lands with a shut gate, and RigL grows, begins at zero"
    idle = p.keep - nnz(p)
    return p.present == p.keep and p.left == nnz(p) and negative_zeros(p) == 0 and (not idle or isinstance(p, (L0, RigL)) and f'{idle} present ones are zero' in repr(p))


def holds(p):
    "The report is what is in the model, absent weights are +0, and nothing is there that the mask (L0: one draw of its noise) has not"
    return nnz(p) == p.left and negative_zeros(p) == 0 and (p.left <= p.present or isinstance(p, L0))


def run(method, optimizer, sign=1, build=small, before=None):
    "A short run on `sign` times the loss: the pruner, and the weights at the end"
    model = build()
    opt = optimizer(model)
    p = SHORT[method](model, opt)
    if before: before(model, opt)

    def loop():
        for _ in range(p.steps):
            model.zero_grad()
            (sign*loss(model)).backward()
            opt.step()
            assert holds(p)
    said(loop)
    assert exact(p)
    return p, [w.detach().clone() for w in model.parameters()]


def same(a, b):
    (p, ws), (q, vs) = a, b
    return torch.equal(p.mask, q.mask) and all(map(torch.equal, ws, vs))


# ---- 1. What an optimiser means by a step

@pytest.mark.parametrize('name, method', [(n, m) for n in having('maximize') for m in ('Hyperflux', 'Taylor', 'RigL') if m == 'Hyperflux' or n in ('SGD', 'Adam', 'Rprop')])
def test_maximizing_minus_the_loss(name, method):
    "Every optimiser of PyTorch that can maximise: on minus the loss it prunes what minimising the loss prunes, bit for bit"
    kw = dict(lr=.01)
    assert same(run(method, lambda m: TORCH[name](m.parameters(), **kw)), run(method, lambda m: TORCH[name](m.parameters(), maximize=True, **kw), sign=-1))


@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
def test_maximizing_with_noisy_gates(name):
    "L0's gates too follow the loss, not the sign of its gradient"
    assert same(run('L0', lambda m: TORCH[name](m.parameters(), lr=.01)), run('L0', lambda m: TORCH[name](m.parameters(), lr=.01, maximize=True), sign=-1))


@pytest.mark.parametrize('method', list(SHORT))
def test_one_group_maximizes(method):
    "Two groups, of which one maximises, and gets its gradients with the other sign, from hooks: as if both minimised"
    def optimizer(m, up): return Adam([dict(params=list(m[0].parameters()), maximize=up), dict(params=list(m[2].parameters()))], lr=.01)
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


class Wrapper(Optimizer):
    "Groups of its own around an inner optimiser, as several libraries have it"
    def __init__(self, params, inner, **kw):
        params = list(params)
        super().__init__(params, dict(kw))
        self.inner = inner(params)
    def step(self, closure=None): return self.inner.step(closure)


@pytest.mark.parametrize('method', ['Hyperflux', 'Taylor', 'RigL'])
def test_an_inner_optimizer_maximizes(method):
    "A wrapper with groups of its own drives an optimiser that maximises: its masks are those of minimising, or it is refused by name"
    plain = run(method, lambda m: Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.05)))
    try: up = run(method, lambda m: Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.05, maximize=True)), sign=-1)
    except ValueError as e: assert 'maximize' in str(e)
    else: assert same(plain, up)


@pytest.mark.parametrize('name, flag, method', [(n, f, m) for f in ('foreach', 'fused', 'capturable') for n in having(f) for m in ('Hyperflux', 'GMP') if m == 'Hyperflux' or f == 'fused'])
def test_other_forms_of_the_same_step(name, flag, method):
    "foreach=, fused= and capturable= are other ways to the same step: the same masks, and weights up to rounding; what PyTorch refuses is refused in its words"
    def alone(): m = small(); o = TORCH[name](m.parameters(), lr=.01, **{flag: True}); train(m, o, 2)
    try: alone()
    except Exception as e:
        with pytest.raises(type(e), match=r'{}'.format(flag)): run(method, lambda m: TORCH[name](m.parameters(), lr=.01, **{flag: True}))
        return
    plain = {} if flag == 'capturable' else {flag: False}
    (p, ws), (q, vs) = (run(method, lambda m: TORCH[name](m.parameters(), lr=.01, **kw)) for kw in (plain, {flag: True}))
    assert torch.equal(p.mask, q.mask)
    for w, v in zip(ws, vs): torch.testing.assert_close(w, v, rtol=1e-3, atol=1e-4)


@both
@pytest.mark.parametrize('name', having('differentiable'))
def test_differentiable(name, method):
    "A graph through the step would lead around the gates: refused at construction, by the flag's name, for the optimiser or for one group; the weights are free again"
    for groups in (lambda m: m.parameters(), lambda m: [dict(params=m[0].parameters()), dict(params=m[2].parameters(), differentiable=True)]):
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
    if name != 'L0': assert torch.equal(w, was*(w != 0))                        # L0 folds its gates, which lie in [0, 1], in
    assert 0 < int(w.count_nonzero()) < w.numel()


DECAYS = dict(SGD=lambda ps: SGD(ps, lr=.1, momentum=.9, weight_decay=.01), Adam=lambda ps: Adam(ps, lr=.01, weight_decay=.01), AdamW=lambda ps: AdamW(ps, lr=.01, weight_decay=.1),
              **{f'{n} decoupled': lambda ps, n=n: TORCH[n](ps, lr=.01, weight_decay=.1, decoupled_weight_decay=True) for n in having('decoupled_weight_decay')},
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
    "AdaHessian differentiates its gradients again, at weights that the pruner has exchanged: a clear error at the first step, and nothing has moved"
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


# ---- 2. A pruner that is not driven

def in_registries():
    "Every optimiser class of PyTorch, and every name that timm can make, alone and in a Lookahead"
    try: from timm.optim import list_optimizers
    except ImportError: return list(TORCH)
    names = list_optimizers()
    return [*TORCH, *(f'timm {n}' for n in names), *(f'timm lookahead_{n}' for n in names)]


def optimizer_of(name, model):
    if name.startswith('timm '):
        from timm.optim import create_optimizer_v2
        return create_optimizer_v2(model, opt=name[5:], lr=.01, weight_decay=.01)
    kind = TORCH[name]
    try: return kind(model.parameters(), lr=.01)
    except ValueError: return kind([p for p in model.parameters() if p.ndim == 2], lr=.01)      # Muon is for matrices


def drive(name, method, steps):
    model = small()
    opt = optimizer_of(name, model)
    p = method and method(model, opt, steps)
    for _ in range(steps):
        model.zero_grad()
        loss(model).backward()
        opt.step() if name != 'LBFGS' else opt.step(lambda: loss(model))
        if p: assert holds(p)
    return p


@functools.cache
def unfit_here(name):
    "Why it does not train on this machine without any pruner: for want of a GPU or of a package, or of sparse or second gradients; None if it does"
    try: drive(name, None, 2)
    except Exception as e: return f'{name}: {e}'


QUICK = dict(GMP=(5, lambda m, o, n: GMP(m, o, sparsity=.8, steps=n, span=(0, .8))), Hyperflux=(10, lambda m, o, n: Hyperflux(m, o, sparsity=.8, steps=n, settings=Settings(lr=.1))))


@both
def test_every_optimizer_there_is(method):
    "Whatever trains without a pruner on this machine trains with one, to exactly the target, or is refused at construction, by name"
    done, refused, unfit = [], [], []
    steps, build = QUICK[method]
    with torch.compiler.set_stance('force_eager'), warnings.catch_warnings():   # PSGD compiles its steps, which takes a minute
        warnings.simplefilter('ignore')
        for i, name in enumerate(in_registries()):
            if method == 'Hyperflux' and 'lookahead_' in name and i % 9: continue
            if why := unfit_here(name): unfit.append(why); continue
            try: p = drive(name, build, steps)
            except (TypeError, ValueError) as e:
                assert name in str(e), f'{name} is refused without its name: {e}'
                refused.append(name)
                continue
            assert nnz(p) == p.keep == p.left and p.step == steps, f'{name}: {nnz(p)} of {p.keep}, {p!r}'
            done.append(name)
            p.detach()
    assert refused == ['LBFGS']
    assert set(TORCH) - set(done) == {'LBFGS', 'SparseAdam'} and len(unfit) < len(done), unfit


def lookahead(base, **kw): return pytest.importorskip('timm.optim').Lookahead(base, **kw)


@with_methods('on', ['outer', 'inner, made before', 'inner, made after'])
def test_lookahead(on, name):
    "A pruner of Lookahead, fresh and never hooked, or of the optimiser inside: exact at every step, or one warning of the zeros and a report that tells the truth"
    m, steps = mlp(), length(name)
    base = SGD(m.parameters(), lr=.1, momentum=.9)
    p = make[name](m, base, .8, steps) if on == 'inner, made before' else None
    o = lookahead(base, k=8)                                                    # so that the last step is one of those that write slow weights
    p = p or make[name](m, o if on == 'outer' else base, .8, steps)
    off = []
    texts = said(train, m, o, steps, lambda i: off.append(nnz(p) - p.left))
    assert p.step == steps and set(off) == {0} and p.present == p.keep
    if on == 'outer': assert exact(p) and not any('absent weights' in t for t in texts)
    else: assert exact(p) or 'not zero' in repr(p) and sum('absent weights were not zero' in t for t in texts) == 1


@both
def test_lookahead_synchronised_at_the_end(method):
    "timm's training script ends each epoch with sync_lookahead(), which writes slow weights: the zeros hold, or the report tells the truth"
    m = mlp()
    o = lookahead(SGD(m.parameters(), lr=.1, momentum=.9), k=7)
    p = make[method](m, o, .8, 40)
    said(train, m, o, 40)
    o.sync_lookahead()
    assert p.left == nnz(p)
    assert nnz(p) == p.keep or 'not zero' in repr(p) and f'{nnz(p)} of' in repr(p)
    p.apply_mask()
    assert nnz(p) == p.keep


@both
@pytest.mark.parametrize('first', ['scheduler', 'pruner'])
@pytest.mark.parametrize('kind', ['SGD', 'Lookahead', 'Mine'])
def test_with_a_scheduler(kind, first, method):
    "A scheduler, which counts steps by a wrapper of its own, made before or after: it follows, it does not warn, and the target is met"
    m = mlp()
    o = SGD(m.parameters(), lr=.1, momentum=.9)
    o = dict(SGD=lambda: o, Lookahead=lambda: lookahead(o), Mine=lambda: Mine(m.parameters(), lr=.1, momentum=.9))[kind]()
    def schedule(): return LambdaLR(o, lambda i: 1 - i/200)
    def prune(): return make[method](m, o, .8, 40)
    a, b = (schedule(), prune()) if first == 'scheduler' else reversed((prune(), schedule()))
    texts = said(train, m, o, 40, lambda i: a.step())
    assert a.last_epoch == 40 and b.step == 40 and exact(b)
    assert o.param_groups[0]['lr'] == pytest.approx(.1*.8) and not any('lr_scheduler' in t for t in texts)
    b.detach()
    said(train, m, o, 3, lambda i: a.step())
    assert a.last_epoch == 43


class SAM(Optimizer):
    "Two evaluations a step: up to where the loss is highest nearby, and back with the gradient from there"
    def __init__(self, params, base, rho=.05, how='plain', twice=False, **kw):
        super().__init__(params, dict(rho=rho, **kw))
        self.base_optimizer, self.how, self.twice = base(self.param_groups, **kw), how, twice
        self.param_groups = self.base_optimizer.param_groups
    def each(self): return ((p, self.state[p]) for g in self.param_groups for p in g['params'] if p.grad is not None)
    @torch.no_grad()
    def first_step(self):
        size = torch.stack([p.grad.norm() for p, _ in self.each()]).norm() + 1e-12
        for p, s in self.each():
            s['there'], up = p.detach().clone(), p.grad*self.param_groups[0]['rho']/size
            if self.how == 'plain': p.add_(up)
            elif self.how == 'data': p.data = p.data + up
            else: p.data.add_(up)
        self.zero_grad()
    @torch.no_grad()
    def second_step(self):
        for p, s in self.each():
            if self.how == 'data': p.data = s['there']
            elif self.how == 'plain': p.copy_(s['there'])
            else: p.data.copy_(s['there'])
        self.base_optimizer.step()
        self.zero_grad()
    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        if self.twice: closure()
        self.first_step()
        closure()
        self.second_step()


def sam(model, **kw): return SAM(model.parameters(), SGD, lr=.2, momentum=.9, **kw)


def train_sam(model, opt, steps, each=None):
    def closure():
        l = loss(model)
        l.backward()
        return l
    for i in range(steps):
        loss(model).backward()
        opt.step(closure)
        if each: each(i)


@functools.cache
def sam_alone(how, steps=60):
    "The loss before and after, without a pruner"
    m = mlp()
    first = loss(m).item()
    train_sam(m, sam(m, how=how), steps)
    return first, loss(m).item()


@pytest.mark.parametrize('how, name', [('plain', n) for n in [*MAIN, 'L0']] + [(how, n) for how in ('data', 'data.add_') for n in ('Hyperflux', 'GMP')])
def test_sam_through_its_closure(how, name):
    "SAM evaluates its closure where it has moved the weights to, in the usual way or through .data: it trains as it does without a pruner, and lands exactly"
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
    "first_step and second_step go around a pruner of SAM: refused at the first of them that steps, by name, with what to do; around one of its base optimiser they are exact"
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
    "Everything happens in methods that no optimiser of PyTorch has: the report counts what is in the model, and says that no step was seen"
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
    "The form of SAM that begins with a closure of its own: refused as soon as it asks again, with what to do; the zeros hold"
    m = mlp()
    o = sam(m, twice=True)
    p = make[method](m, o, .5, 120)
    with pytest.raises(RuntimeError, match='closure more than once'): train_sam(m, o, 120)
    assert p.step == 0 and nnz(p) == p.left


class Mine(SGD):
    "A step that calls its parent's, and goes on to write weights"
    steps, shift = 0, 0.
    def step(self, closure=None):
        value = super().step(closure)
        self.steps += 1
        with torch.no_grad():
            for g in self.param_groups:
                for p in g['params']: p.add_(self.shift)
        return value


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
@pytest.mark.parametrize('how', ['around the old one', "the class's own", 'nothing that was there', 'nothing that was there, through .data'])
@pytest.mark.parametrize('when', [0, 20])
def test_a_step_replaced_later(when, how, method):
    "Somebody puts another step on the optimiser after the pruner was made: it is followed, or the report says that it was not"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    p = make[method](m, o, .8, 40)
    old = o.step

    @torch.no_grad()
    def own(self, closure=None):
        for w in m.parameters(): (w.data if 'data' in how else w).sub_(.1*w.grad)
    new = {'around the old one': lambda self, closure=None: old(closure), "the class's own": lambda self, closure=None: SGD.step(self, closure)}.get(how, own)
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


@both
def test_another_optimizer_trains_instead(method):
    "The pruner stands around one optimiser, and another one of the same weights trains: one warning, and the report tells the truth"
    m = mlp()
    forgotten, o = SGD(m.parameters(), lr=.1), SGD(m.parameters(), lr=.1)
    p = make[method](m, forgotten, .8, 120)
    texts = said(train, m, o, 20)
    assert sum('make the pruner with the optimiser that trains' in t for t in texts) == 1 and p.left == nnz(p) and p.step == 0
    assert 'step 0 of 120' in repr(p)


@both
def test_another_optimizer_takes_over(method):
    "Half-way through another optimiser takes over, as where a schedule ends with SGD: the zeros that there are hold, and one warning says so"
    m = mlp()
    p = make[method](m, o := Adam(m.parameters(), lr=.01), .8, 40)
    said(train, m, o, 20)
    zeros = p.mask == 0
    texts = said(train, m, SGD(m.parameters(), lr=.1), 20, lambda i: nnz(p) == p.left <= p.present or pytest.fail(f'at step {i}'))
    assert sum('make the pruner with the optimiser that trains' in t for t in texts) == 1
    assert torch.equal(p.mask == 0, zeros) and 'step 20 of 40' in repr(p)


@with_methods('kind', ['SGD', 'timm lookahead_sgd'])
def test_a_shared_trunk(kind, name):
    "Two optimisers over a trunk that two tasks share take turns: the zeros hold at every step, and nobody warns"
    m = mlp()
    head = nn.Linear(32, 2)
    o = SGD(m.parameters(), lr=.05, momentum=.9)
    p = make[name](m, o, .8, length(name))
    if 'lookahead' in kind: pytest.importorskip('timm.optim')
    other = optimizer_of(kind, nn.ModuleList([m[0], head])) if 'timm' in kind else SGD([*m[0].parameters(), *head.parameters()], lr=.05, momentum=.9)
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(1))

    def second(i):
        other.zero_grad()
        head(m[0](x).relu()).pow(2).mean().backward()
        other.step()
        assert holds(p)
    texts = said(train, m, o, p.steps, second)
    assert p.step == p.steps and exact(p) and not any('absent' in t or 'trains' in t for t in texts)


class ScheduleFree(Optimizer):
    "SGD at y, with an average x that eval() puts into the model and train() takes out again"
    def __init__(self, params, lr, beta=.9):
        super().__init__(params, dict(lr=lr, beta=beta, k=0, training=True))
    def each(self): return ((p, self.state[p], g) for g in self.param_groups for p in g['params'])
    @torch.no_grad()
    def eval(self): self.swap(False, lambda p, z, beta: p.lerp_(z, 1 - 1/beta))         # y → x
    @torch.no_grad()
    def train(self): self.swap(True, lambda p, z, beta: p.lerp_(z, 1 - beta))           # x → y
    def swap(self, to, move):
        for p, s, g in self.each():
            if 'z' in s and g['training'] != to: move(p.data, s['z'], g['beta'])
        for g in self.param_groups: g['training'] = to
    @torch.no_grad()
    def step(self, closure=None):
        for g in self.param_groups: g['k'] += 1
        for p, s, g in self.each():
            if p.grad is None: continue
            z, c = s.setdefault('z', p.detach().clone()), 1/g['k']
            p.data.lerp_(z, c).add_(p.grad, alpha=g['lr']*(g['beta']*(1 - c) - 1))
            z.sub_(p.grad, alpha=g['lr'])


def schedule_free(kind, model):
    if kind == 'own': return ScheduleFree(model.parameters(), lr=.5)
    o = getattr(pytest.importorskip('schedulefree'), kind)(model.parameters(), lr=.5 if 'SGD' in kind else .01)
    o.train()
    return o


@with_methods('kind', ['own', 'SGDScheduleFree', 'AdamWScheduleFree'])
def test_an_optimizer_that_swaps_weights(kind, name):
    "eval() puts an average into the model, train() takes it out again, every now and then: the zeros hold in both, and the target is met in both"
    m = mlp()
    o = schedule_free(kind, m)
    p = make[name](m, o, .8, length(name))

    def look(i):
        assert holds(p)
        if i % 13 and i != p.steps - 1: return
        was = [w.detach().clone() for w in m.parameters()]
        for mode in o.eval, o.train:
            mode()
            assert holds(p), (i, mode)
        for w, v in zip(m.parameters(), was): torch.testing.assert_close(w.detach(), v, rtol=1e-3, atol=1e-4)
    texts = said(train, m, o, p.steps, look)
    o.eval()
    assert exact(p) and not any('absent weights' in t for t in texts)


@with_methods('where', ['closure', 'step', 'after the step'])
def test_an_exception_in_a_step(where, name):
    "What raises in the closure, or in the step itself, is nobody's step: the zeros hold, training goes on and lands exactly"
    class Fails(SGD):
        at = None
        def step(self, closure=None):
            if self.at == 'step': raise KeyError('step')
            value = super().step(closure)
            if self.at == 'after the step': raise KeyError('after the step')
            return value
    m = mlp()
    o = Fails(m.parameters(), lr=.1, momentum=.9)
    p = make[name](m, o, .8, length(name))

    def closure():
        m.zero_grad()
        l = loss(m)
        l.backward()
        if o.at == 'closure': raise KeyError('closure')
        return l

    def loop():
        for i in range(p.steps):
            if i % 15 == 14:
                o.at, left = where, p.left
                with pytest.raises(KeyError, match=where): o.step(closure)
                o.at = None
                assert holds(p) and p.step == i and (p.left == left or name == 'L0')
            o.step(closure)
            assert holds(p) and p.step == i + 1
    said(loop)
    assert exact(p)


def traces(o):
    "What could be left behind on an optimiser, and for all optimisers"
    methods = {k: id(v) for k, v in vars(o).items() if callable(v)}
    hooks = {k: list(v) for k, v in vars(o).items() if k.endswith('_hooks')}
    return sorted(vars(o)), methods, hooks, list(_global_optimizer_pre_hooks), list(_global_optimizer_post_hooks)


@with_methods('kind', ['SGD', 'Mine', 'Lookahead', 'SAM', 'ScheduleFree', 'with a scheduler'])
def test_detach_leaves_nothing_behind(kind, name):
    "An optimiser has the methods and hooks that it had, and there are none for all optimisers; then it trains dense again"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    o = dict(Mine=lambda: Mine(m.parameters(), lr=.1), Lookahead=lambda: lookahead(o), SAM=lambda: sam(m), ScheduleFree=lambda: schedule_free('own', m)).get(kind, lambda: o)()
    scheduler = LambdaLR(o, lambda i: 1.) if 'scheduler' in kind else None
    go = train_sam if kind == 'SAM' else train
    go(m, o, 1)                                                                 # after which PyTorch and schedulers leave marks of their own
    before = traces(o)
    p = make[name](m, o, .8, length(name))
    said(go, m, o, 20)
    zeros = 768 - nnz(p)
    assert zeros and traces(o) != before
    p.detach()
    assert traces(o) == before
    p.detach()                                                                  # once more is no harm
    go(m, o, 5)
    assert nnz(p) > 768 - zeros
    if scheduler: scheduler.step()
    assert traces(o) == before


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
@both
def test_two_pruners_of_one_optimizer(method, order):
    "Two layers, two targets, one optimiser: each is exact, and whichever is detached first, nothing is left behind"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    train(m, o, 1)
    before = traces(o)
    how = dict(settings=Settings(lr=.1)) if method == 'Hyperflux' else {}
    ps = [(Hyperflux if how else GMP)(m, o, sparsity=s, steps=40, targets=t, **how) for t, s in (('0', .8), ('2', .5))]
    said(train, m, o, 40, lambda i: all(map(holds, ps)) or pytest.fail(f'at step {i}'))
    assert all(map(exact, ps)) and [p.keep for p in ps] == [128, 64] and [p.step for p in ps] == [40, 40]
    ps[order[0]].detach()
    said(train, m, o, 2)
    assert nnz(ps[order[1]]) == ps[order[1]].keep and nnz(ps[order[0]]) > ps[order[0]].keep
    ps[order[1]].detach()
    assert traces(o) == before


def test_no_hooks_for_all_optimizers():
    "However many pruners there are, they hear of the steps of all optimisers once; with the last of them that ends, and that is all"
    def count(): return len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    def one(): m = mlp(); return GMP(m, SGD(m.parameters(), lr=.1), sparsity=.5, steps=10)
    gc.collect()
    before = count()                                                            # other tests may have left theirs
    for order in (0, 1, 2), (2, 0, 1):
        ps = [one() for _ in order]
        assert count() == (1, 1)
        for i in order: ps[i].detach()
        assert count() in (before, (0, 0))


@pytest.mark.parametrize('kind, method', [('SGD', 'GMP'), *((k, 'Hyperflux') for k in ('SGD', 'Mine', 'Lookahead', 'Wrapper'))])
@pytest.mark.parametrize('how', ['in its place', 'by name', 'none in its place', 'none by name'])
def test_a_closure_given_in_any_way(how, kind, method):
    "A closure may come in its place or by name, or be None: the same steps, and the loss comes back"
    def go(how):
        m = mlp()
        o = dict(SGD=lambda: SGD(m.parameters(), lr=.1), Mine=lambda: Mine(m.parameters(), lr=.1), Lookahead=lambda: lookahead(SGD(m.parameters(), lr=.1)),
                 Wrapper=lambda: Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.1)))[kind]()
        p = make[method](m, o, .8, 40)

        def closure():
            m.zero_grad()
            l = loss(m)
            l.backward()
            return l

        def loop():
            for _ in range(40):
                if how is None or 'none' in how: closure()
                if how is None: o.step()
                else:
                    given = None if 'none' in how else closure
                    value = o.step(given) if 'place' in how else o.step(closure=given)
                    assert value is None if given is None else value > 0
        said(loop)
        assert exact(p)
        return p, [w.detach().clone() for w in m.parameters()]
    assert same(go(how), go(None))


@both
def test_named_parameters(method):
    "An optimiser of named parameters is one of parameters"
    assert same(run(method, lambda m: SGD(m.named_parameters(), lr=.1)), run(method, lambda m: SGD(m.parameters(), lr=.1)))


@both
def test_pruners_that_are_dropped(method):
    "Sixty pruners made and detached, some in a failed construction: no hooks pile up, and the last one is exact"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    train(m, o, 1)
    before = traces(o)
    for i in range(20):
        make[method](m, o, .8, 40).detach()
        with pytest.raises((ValueError, TypeError)): make[method](m, o, 1.5, 40)
        with pytest.raises(ValueError): make[method](m, SGD(m[0].parameters(), lr=.1), .8, 40)
    assert traces(o) == before
    p = make[method](m, o, .8, 40)
    said(train, m, o, 40)
    assert exact(p)


@both
def test_a_copied_optimizer(method):
    "A deep copy of model and optimiser trains for itself: it is not the one that is pruned, which goes on exactly"
    m = mlp()
    o = SGD(m.parameters(), lr=.1, momentum=.9)
    p = make[method](m, o, .8, 40)
    said(train, m, o, 20)
    left = nnz(p)
    m2, o2 = copy.deepcopy((m, o))
    train(m2, o2, 5)
    assert nnz(p) == left and p.step == 20
    said(train, m, o, 20)
    assert exact(p) and p.step == 40


def test_imp_rewinds_an_inner_optimizer():
    "IMP trains anew with the state of a new optimiser, also where a wrapper drives the one that has it"
    def end(wrap):
        m = mlp()
        o = SGD(m.parameters(), lr=.1, momentum=.9)
        o = Wrapper(m.parameters(), lambda ps: SGD(ps, lr=.1, momentum=.9)) if wrap else o
        p = IMP(m, o, sparsity=.8, steps=40)
        said(train, m, o, 40)
        return p, [w.detach().clone() for w in m.parameters()]
    assert same(end(False), end(True)) and accuracy(mlp()) < .6
