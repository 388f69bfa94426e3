"Small networks, batches and loops for the tests of the rivals, and every rival that can do with a short run."
import io, math
from collections import OrderedDict
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperflux.rivals.scores import GMP, LayerMagnitude, Magnitude, Progressive, Random
from hyperflux.rivals.imp import IMP
from hyperflux.rivals.gradients import GraSP, SNIP, Taylor
from hyperflux.rivals.rigl import RigL

g0 = torch.Generator().manual_seed(0)
# random labels: gradients never fade
xs, ys = torch.randn(96, 13, generator=g0), torch.randint(5, (96,), generator=g0)


class Swift(RigL):
    "RigL for short runs"
    every = 10


METHODS = Random, Magnitude, LayerMagnitude, GMP, Progressive, Taylor, SNIP, GraSP, Swift, IMP
every_method = pytest.mark.parametrize('kind', METHODS, ids=lambda k: k.__name__)


def mlp(): return nn.Sequential(nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 5))
def conv():
    "Plain and transposed convolutions, BN, biases; smooth"
    return nn.Sequential(nn.Unflatten(1, (1, 13, 1)), nn.Conv2d(1, 6, (3, 1)), nn.BatchNorm2d(6), nn.Tanh(),
                         nn.Conv2d(6, 4, (3, 1), groups=2, bias=False), nn.BatchNorm2d(4),
                         nn.Tanh(), nn.ConvTranspose2d(4, 3, (3, 1)), nn.Flatten(), nn.Linear(33, 5))
def last(): return conv().to(memory_format=torch.channels_last)
def wide():
    "13,000 weights of five kinds of layers, in float64, so that no two are equal; not to be run"
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 24, 3, bias=False), c=nn.Conv1d(5, 8, 2),
                                      d=nn.Linear(130, 70), e=nn.Linear(70, 1))).double()
    for w in model.parameters(): nn.init.normal_(w)
    return model


class Heads(nn.Module):
    "Two heads, of which `use` says the one that computes"
    def __init__(self):
        super().__init__()
        self.body, self.a, self.b, self.use = nn.Linear(13, 11), nn.Linear(11, 5), nn.Linear(11, 5), 'a'
    def forward(self, x): return getattr(self, self.use)(self.body(x).tanh())


def sgd(model, **kw):
    return torch.optim.SGD(model.parameters(), **dict(dict(lr=.1, momentum=.9, weight_decay=5e-3), **kw))
def adam(model, **kw): return torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2, **kw)
def adamw(model, **kw): return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=.1, **kw)


def make(kind, model, opt, **how):
    "A pruner that has started; SNIP and GraSP get the batch they look at"
    x = xs.to(next(model.parameters()).dtype)
    more = dict(batch=(x, ys)) if issubclass(kind, SNIP) else dict(levels=4) if kind is IMP else {}
    p = kind(model, opt, **dict(sparsity=.8, steps=60) | more | how)
    p.start()
    return p


def start(kind, optimizer=sgd, build=mlp, seed=1, hear=None, **how):
    """A seeded model, its optimiser and a pruner of it; `hear` is called after the optimiser has moved and before the
    pruner acts"""
    torch.manual_seed(seed)
    model = build()
    opt = optimizer(model)
    if hear: opt.register_step_post_hook(lambda *_: hear())
    return model, opt, make(kind, model, opt, **how)


def loss(model, i=0):
    part = slice(i % 3*32, i % 3*32 + 32)
    return F.cross_entropy(model(xs[part].to(next(model.parameters()).dtype)), ys[part])


def train(model, opt, begin, end, look=lambda i: None, loss=loss):
    for i in range(begin, end):
        opt.zero_grad()
        loss(model, i).backward()
        opt.step()
        look(i + 1)


# in the logical order of the weights
def vector(tensors): return torch.cat([t.detach().reshape(-1) for t in tensors])
def mask(p): return vector(p.masks)
def weights(p): return vector(p.params)
def refuses(match, error=ValueError): return pytest.raises(error, match=match)


def through_a_file(*objects):
    f = io.BytesIO()
    torch.save([o.state_dict() for o in objects], f)
    f.seek(0)
    return torch.load(f, weights_only=True)


def everything(model, opt, p):
    return [mask(p), *model.state_dict().values(), *(v for s in opt.state.values() for v in s.values()
                                                     if torch.is_tensor(v))]


def due(step, begin, end, updates):
    "Whether masks are renewed after this step: the progress in whole updates has grown, or the span ends"
    whole = lambda t: math.floor(Fraction((t - begin)*updates, end - begin))
    return begin < step <= end and (step == end or whole(step) > whole(step - 1))
