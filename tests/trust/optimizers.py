"Short runs of every kind of method, for the tests of optimisers."
import inspect

import pytest, torch
from torch import nn
from torch.optim import SGD, Optimizer

from hyperflux import Hyperflux, Settings
from hyperflux.rivals.scores import GMP
from hyperflux.rivals.l0 import L0
from hyperflux.rivals.rigl import RigL
from hyperflux.rivals.gradients import Taylor

from tests.helpers import METHODS, loss, negative_zeros, nnz, said

TORCH = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)
         and c is not Optimizer}
make = dict(METHODS)
# one of each kind that can do with few steps
MAIN = ['Hyperflux', 'GMP', 'Taylor', 'IMP', 'RigL']


def having(flag):
    return sorted(n for n, c in TORCH.items() if flag in inspect.signature(c).parameters and n not in ('LBFGS',
        'SparseAdam'))
def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))          # 192 weights


class Often(RigL): every = 5


SHORT = dict(Hyperflux=lambda m, o: Hyperflux(m, o, sparsity=.7, steps=20, settings=Settings(lr=.1)),
             Taylor=lambda m, o: Taylor(m, o, sparsity=.7, steps=20),
             RigL=lambda m, o: Often(m, o, sparsity=.7, steps=20), L0=lambda m, o: L0(m, o, sparsity=.7, steps=112,
    span=(0, .9)), GMP=lambda m, o: GMP(m, o, sparsity=.7, steps=20))
both = pytest.mark.parametrize('method', ['Hyperflux', 'GMP'])
main, every = (pytest.mark.parametrize('name', ns) for ns in (MAIN, [n for n, _ in METHODS]))
# once with L0, which needs more steps
def with_methods(kind, kinds):
    return pytest.mark.parametrize(f'{kind}, name', [(k, n) for k in kinds for n in MAIN] + [(kinds[0], 'L0')])
def length(name): return 120 if name == 'L0' else 40


def exact(p):
    """Zeros where the mask has them, the target's number of weights, and a report that says so; what L0 lands with a
    shut gate, and RigL grows, begins at zero"""
    idle = p.keep - nnz(p)
    return p.present == p.keep and p.left == nnz(p) and negative_zeros(p) == 0 and (not idle
        or isinstance(p, (L0, RigL)) and f'{idle} present ones are zero' in repr(p))


def holds(p):
    """The report is what is in the model, absent weights are +0, and nothing is there that the mask (L0: one draw of
    its noise) has not"""
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


def optimizer_of(name, model):
    if name.startswith('timm '):
        from timm.optim import create_optimizer_v2
        return create_optimizer_v2(model, opt=name[5:], lr=.01, weight_decay=.01)
    kind = TORCH[name]
    try: return kind(model.parameters(), lr=.01)
    except ValueError: return kind([p for p in model.parameters() if p.ndim == 2], lr=.01)      # Muon is for matrices


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


def lookahead(base, **kw): return pytest.importorskip('timm.optim').Lookahead(base, **kw)


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


class Wrapper(Optimizer):
    "Groups of its own around an inner optimiser, as several libraries have it"
    def __init__(self, params, inner, **kw):
        params = list(params)
        super().__init__(params, dict(kw))
        self.inner = inner(params)
    def step(self, closure=None): return self.inner.step(closure)
