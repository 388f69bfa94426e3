"A small network, its optimisers and a pruner of it, for the tests of the pruner."

import torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux, Settings

# with pressure .03: 237 of 255 weights left after one step, 69 after ten
quick = Settings(prune=1., settle=0., lr=.01, low=0., high=.1)
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


def loss(model, i=0, part=slice(None)):
    return F.cross_entropy(model(xs[part].to(next(model.parameters()).dtype)), ys[part])
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
    steps = torch.stack([p.gate_optimizer.state[t]['step'] for t in p.gate_params])
    # a vector itself follows the weights' order in memory
    logical = lambda v: flat(p.layout.views(v))
    return dict(theta=flat(p.params), presence=logical(p.presence), value=logical(p.value), mask=logical(p.mask),
                mean=logical(p.moments[0]), square=logical(p.moments[1]), steps=steps)


def assert_same(a, b, *keys):
    for k in keys or a: assert torch.equal(a[k], b[k]), k


def assert_sparse(p, low=.05, high=.95):
    "Model, values, presences and masks agree, with some weights absent"
    assert torch.equal(p.mask, (p.presence >= 0).to(p.dtype))
    assert torch.equal(flat(p.params), flat(p.values)*flat(p.masks)) and p.value.isfinite().all()
    assert low < p.density < high


def standstill(model, opt, p):
    "One step in which nothing moves by itself"
    for g in (*opt.param_groups, *p.gate_optimizer.param_groups): g['lr'] = 0.
    train(model, opt, 1)
