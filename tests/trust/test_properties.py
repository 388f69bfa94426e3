"Whatever small network, method, optimiser and interruptions come together, some things hold at every step."
import io

import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from tests.helpers import METHODS, negative_zeros, nnz, said, x, y

make = dict(METHODS)
# L0 needs most steps
METHOD = st.sampled_from(['Hyperflux']*3 + ['GMP', 'Taylor', 'IMP', 'RigL', 'Random', 'Magnitude', 'LayerMagnitude']
                         + ['L0'])


class Recurrent(nn.Module):
    def __init__(self, kind, width):
        super().__init__()
        self.body, self.head = kind(4, width, batch_first=True), nn.Linear(width, 4)
    def forward(self, x): return self.head(self.body(x.view(-1, 5, 4))[0][:, -1])


class Tied(nn.Module):
    "One matrix in two layers, and one layer used twice"
    def __init__(self, width):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(20, width), nn.Linear(width, width), nn.Linear(width,
            width), nn.Linear(width, 4)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(self.b(self.a(self.a(self.first(x).relu()).relu())))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.body, self.head = nn.Linear(4, width), nn.MultiheadAttention(width, 1,
            batch_first=True), nn.Linear(width, 4)
    def forward(self, x):
        h = self.up(x.view(-1, 5, 4))
        return self.head(self.body(h, h, h)[0].mean(1))


NETS = dict(mlp=lambda w: nn.Sequential(nn.Linear(20, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 4)),
            conv=lambda w: nn.Sequential(nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, w, 3, padding=1), nn.BatchNorm2d(w),
                                         nn.ReLU(), nn.Conv2d(w, w, 3, groups=w), nn.Flatten(), nn.Linear(6*w, 4)),
            lstm=lambda w: Recurrent(nn.LSTM, w), gru=lambda w: Recurrent(nn.GRU, w), tied=Tied, attention=Attention,
            norms=lambda w: nn.Sequential(nn.Linear(20, w), nn.LayerNorm(w), nn.GELU(), nn.Linear(w, w),
                                          nn.BatchNorm1d(w), nn.GroupNorm(1, w), nn.Linear(w, 4)))
OPTIMIZERS = dict(SGD=lambda ps: torch.optim.SGD(ps, lr=.1, momentum=.9, weight_decay=1e-3),
                  Adam=lambda ps: torch.optim.Adam(ps, lr=.01), AdamW=lambda ps: torch.optim.AdamW(ps, lr=.01,
    weight_decay=.1),
                  RMSprop=lambda ps: torch.optim.RMSprop(ps, lr=.003, momentum=.9),
                  Adagrad=lambda ps: torch.optim.Adagrad(ps, lr=.03), NAdam=lambda ps: torch.optim.NAdam(ps, lr=.01),
                  ASGD=lambda ps: torch.optim.ASGD(ps, lr=.1), Rprop=lambda ps: torch.optim.Rprop(ps, lr=.01))
try:
    from timm.optim import Lookahead
    OPTIMIZERS['Lookahead'] = lambda ps: Lookahead(torch.optim.SGD(ps, lr=.1, momentum=.9), k=3)
except ImportError: pass
INTERRUPTIONS = ['saved and loaded', 'written', 'written through .data', 'negated', 'zeroed', 'an earlier checkpoint',
                 'frozen', 'no gradient', 'nothing has a gradient', 'a group more', 'looked at', 'masked']


class Run:
    "A network in training, and what may happen to it"
    def __init__(self, net, width, method, optimizer, sparsity, steps):
        self.net, self.width, self.method, self.optimizer, self.sparsity = net, width, method, optimizer, sparsity
        self.steps = 120 if method == 'L0' else steps
        self.more, self.frozen, self.idle, self.empty, self.before = [], 0, 0, None, None
        self.begin()

    def begin(self):
        torch.manual_seed(0)
        self.model = NETS[self.net](self.width)
        self.opt = OPTIMIZERS[self.optimizer](self.model.parameters())
        for p in self.more: self.opt.add_param_group(dict(params=[p]))
        self.pruner = make[self.method](self.model, self.opt, self.sparsity, self.steps)
        self.first = self.pruner.params[0]

    def go_on(self, i):
        self.first.requires_grad_(i >= self.frozen)
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        for p in self.more: p.grad = torch.ones_like(p)
        if i < self.idle: self.pruner.params[-1].grad = None
        if i == self.empty: self.model.zero_grad()
        self.opt.step()

    @torch.no_grad()
    def interrupt(self, what, i):
        p = self.pruner
        if what == 'saved and loaded':
            torch.save([self.model.state_dict(), self.opt.state_dict(), p.state_dict()], file := io.BytesIO())
            file.seek(0)
            p.detach()
            self.frozen = 0
            with torch.enable_grad(): self.begin()
            for o, state in zip((self.model, self.opt, self.pruner), torch.load(file, weights_only=True)):
                o.load_state_dict(state)
            assert self.pruner.step == i
            self.check()
        elif what == 'written': self.first.add_(.01)
        elif what == 'written through .data': p.params[-1].data.sub_(.01)
        elif what == 'negated': self.first.neg_()                               # and every +0 with it
        elif what == 'zeroed': p.params[-1].zero_()
        elif what == 'an earlier checkpoint':
            if self.before: self.model.load_state_dict(self.before)
            self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
        elif what == 'frozen': self.frozen = i + 3
        elif what == 'no gradient': self.idle = i + 2
        elif what == 'nothing has a gradient': self.empty = i
        elif what == 'a group more':
            self.more.append(nn.Parameter(torch.ones(3)))
            self.opt.add_param_group(dict(params=[self.more[-1]]))
        elif what == 'masked': p.apply_mask()
        assert p.left == nnz(p) or what == 'saved and loaded'
        assert repr(p).endswith(p.differs()) and repr(p) == str(p).splitlines()[0]

    def check(self):
        p, in_model = self.pruner, dict(self.model.named_parameters())
        weights = [in_model[n] for n in p.names]
        rows = p.layers()
        assert nnz(weights) == p.left == sum(r['left'] for r in rows[:-1]) == rows[-1]['left']
        assert p.density == p.left/p.d
        assert [nnz([w]) for w in weights] == [r['left'] for r in rows[:-1]]
        assert negative_zeros(weights) == 0
        # its gates are drawn anew each step, and its mask is what they are without noise
        if self.method == 'L0' and p.step < p.plan.end: return
        for w, m in zip(weights, p.mask.split([w.numel() for w in weights])):
            assert not (w.flatten() != 0)[m == 0].any()
        assert 'absent' not in p.differs()


def traces(o): # Methods and hooks of its own, of which an optimiser that nobody has touched has none
    return [k for k, v in vars(o).items() if callable(v) or k.endswith('_hooks') and v]


CASE = dict(net=st.sampled_from(list(NETS)), width=st.integers(2, 6), method=METHOD,
            optimizer=st.sampled_from(list(OPTIMIZERS)), sparsity=st.sampled_from([0., .3, .5, .8, .9, .95]),
            steps=st.integers(16, 40))
how = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=50, **how)
@given(**CASE, interruptions=st.lists(st.tuples(st.floats(0, .999, allow_subnormal=False),
                                                st.sampled_from(INTERRUPTIONS)), max_size=5))
def test_at_every_step(interruptions, **case):
    """The report is what is in the model, nothing is there that the mask has not, absent weights are +0; at the end
    exactly the target is present, and detach leaves nothing behind"""
    run = Run(**case)

    def loop():
        for i in range(run.steps):
            for at, what in interruptions:
                if int(at*run.steps) == i: run.interrupt(what, i)
            run.go_on(i)
            run.check()
            assert run.pruner.step == i + 1
    said(loop)
    p = run.pruner
    assert p.present == p.keep == round((1 - case['sparsity'])*p.d) and p.left <= p.keep
    assert traces(run.opt)
    p.detach()
    assert not traces(run.opt)


@settings(max_examples=20, **how)
@given(**CASE, at=st.lists(st.floats(0, .999, allow_subnormal=False), min_size=1, max_size=3))
def test_saved_and_loaded_at_any_step(at, **case):
    """A run in several parts, each with new objects and a state from a file, ends bit for bit where one in a single
    part ends"""
    ends = []
    for stops in (), at:
        run = Run(**case)
        stops = {int(a*run.steps) for a in stops}

        def loop():
            for i in range(run.steps):
                if i in stops: run.interrupt('saved and loaded', i)
                run.go_on(i)
        said(loop)
        ends.append((run.pruner.mask.clone(), [w.detach().clone() for w in run.model.parameters()], str(run.pruner)))
        run.pruner.detach()
    (a, ws, text), (b, vs, text2) = ends
    assert torch.equal(a, b) and all(map(torch.equal, ws, vs)) and text == text2
