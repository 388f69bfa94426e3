"Whole channels under one pressure: budgets, floors, resumes, reports, refusals."
import copy

import pytest, torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux, Settings
from hyperflux.deploy import compact
from hyperflux.rivals import GMP, L0
from hyperflux.structure import channels, flops, flops_by_module, weights

pytestmark = pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step', 'ignore:at the landing')


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 4))


class Residual(nn.Module):
    "A stem, two blocks that add to its channels, a strided one with a shortcut"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(12, 4)
        self.a, self.b = (nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(),
                                        nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(2))
        self.c, self.short = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(8, 12, 1, stride=2)
    def forward(self, x):
        x = F.relu(self.stem(x))
        for m in self.a, self.b: x = F.relu(x + m(x))
        return self.head(F.relu(self.c(x) + self.short(x)).mean((2, 3)))


NETS = dict(convnet=convnet, residual=Residual)
x = torch.randn(256, 1, 12, 12, generator=torch.Generator().manual_seed(1))
y = x[:, 0].flatten(1).view(256, 4, 36).mean(2).argmax(1)


def adam(net): return torch.optim.Adam(net.parameters(), 3e-3)


def start(net, optimizer=adam, kind=Hyperflux, steps=240, sparsity=.7, cost=flops, **kw):
    opt = optimizer(net)
    how = dict(settings=Settings(updates=60)) if kind is Hyperflux else {}
    return opt, kind(net, opt, sparsity=sparsity, steps=steps, groups=channels(net, x[:2], **kw), cost=cost, **how)


def train(net, opt, steps, first=0):
    for i in range(first, first + steps):
        b = slice(32*(i % 8), 32*(i % 8) + 32)
        opt.zero_grad()
        F.cross_entropy(net(x[b]), y[b]).backward()
        opt.step()


def widths(pruner): return {r['bank']: r['open'] for r in pruner.groups.widths(pruner.groups.found(pruner.current()))}


@pytest.mark.parametrize('net', NETS)
@pytest.mark.parametrize('cost', [flops, weights])
@pytest.mark.parametrize('sparsity', [.5, .8])
def test_lands_on_the_budget_and_the_small_network_costs_what_was_reported(net, cost, sparsity):
    "The largest that fits; counted again on the network that compaction makes of it"
    net = NETS[net]()
    opt, p = start(net, cost=cost, sparsity=sparsity)
    train(net, opt, 240)
    gates = p.groups.found(p.current())
    assert torch.equal(gates, p.gate)
    left, each = p.groups.left(gates), p.groups.cost.marginal(gates)
    assert left <= p.budget and (left + each[gates == 0] > p.budget).all()
    small, report = compact(net, x[:2])
    counted = {'flops': flops_by_module(small, example=(x[:1],))[''], 'weights': report.after}
    assert counted[p.groups.unit] <= left + 1e-6
    assert counted[p.groups.unit] >= .98*left                         # constants may fold away a little more
    assert p.density == left/p.groups.whole


def test_whole_is_what_the_network_takes():
    "Also where some of it hangs on no gate"
    for net in convnet(), Residual():
        _, p = start(net)
        assert p.groups.whole == flops_by_module(net, example=(x[:1],))['']


@pytest.mark.parametrize('optimizer', [adam, lambda net: torch.optim.SGD(net.parameters(), .05, momentum=.9)])
@pytest.mark.parametrize('kind', [Hyperflux, L0])
@pytest.mark.parametrize('stop', [50, 150, 230])
def test_stops_and_goes_on_bit_for_bit(optimizer, kind, stop):
    "Weights, gates, history"
    net = convnet()
    opt, p = start(net, optimizer, kind)
    train(net, opt, stop)
    saved = copy.deepcopy((net.state_dict(), opt.state_dict(), p.state_dict()))
    train(net, opt, 240 - stop, stop)
    other = convnet()
    opt2, q = start(other, optimizer, kind)
    other.load_state_dict(saved[0]); opt2.load_state_dict(saved[1]); q.load_state_dict(saved[2])
    train(other, opt2, 240 - stop, stop)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))
    assert torch.equal(p.gate, q.gate) and p.history == q.history and p.density == q.density


def test_a_state_of_other_groups_is_refused():
    "Single weights, or another cost"
    net = convnet()
    _, p = start(net)
    state = p.state_dict()
    p.detach()
    _, q = start(net, cost=weights)
    with pytest.raises(ValueError, match="unit='flops'.*unit='weights'"): q.load_state_dict(state)
    q.detach()
    single = Hyperflux(net, adam(net), sparsity=.7, steps=240, settings=Settings(updates=60))
    with pytest.raises(ValueError, match='names'): single.load_state_dict(state)


def test_floors_hold_at_every_step():
    "No layer is ever empty, and as many channels stay as were asked for"
    net = convnet()
    opt, p = start(net, sparsity=.85, floor=3)
    for i in range(0, 240, 5):
        train(net, opt, 5, i)
        assert min(r['open'] for r in p.groups.widths(p.gate)) >= 3
    with pytest.raises(ValueError, match='sparsity of at most'): start(convnet(), sparsity=.99, floor=.5)


def test_widths_are_multiples():
    "Of four here"
    net = convnet()
    opt, p = start(net, sparsity=.6, multiple=4)
    train(net, opt, 240)
    assert all(n % 4 == 0 for n in widths(p).values()) and p.remaining <= p.budget


def test_ignored_layers_keep_their_channels():
    "Neither what they read nor what they write goes"
    net = convnet()
    g = channels(net, x[:2], ignore='4')
    assert [b.name for b in g.banks] == ['7']


def test_a_width_that_nothing_can_leave_is_said():
    "One layer has no hidden channel"
    with pytest.raises(ValueError, match='no channel of this model can go: is the input'):
        channels(nn.Sequential(nn.Flatten(), nn.Linear(144, 4)), x[:2])


def test_what_a_method_cannot_do_is_refused():
    "Single-weight methods, targets beside groups, another model's groups, compile"
    net = convnet()
    g = channels(net, x[:2])
    new = lambda **kw: Hyperflux(net, adam(net), **(dict(sparsity=.7, steps=240, groups=g) | kw))
    with pytest.raises(ValueError, match='GMP removes single weights'): GMP(net, adam(net), sparsity=.5, steps=100, groups=g)
    with pytest.raises(ValueError, match='groups= says which weights'): new(ignore='0')
    with pytest.raises(ValueError, match='compile=True'): new(compile=True)
    with pytest.raises(ValueError, match='made for another model'): Hyperflux(Residual(), adam(net), sparsity=.5, steps=240,
                                                                             groups=g)


def test_the_report_says_what_the_model_is():
    "Also after somebody has written weights"
    net = convnet()
    opt, p = start(net)
    train(net, opt, 240)
    text = str(p)
    assert 'flops left' in text and 'sparsity 0.7' in text and 'gates open' in text and 'total' in text
    before = p.density
    with torch.no_grad():
        for q in p.params: q.add_(.1)
    assert p.density == 1 > before and 'its mask has' in repr(p)


def test_a_layer_without_gradient_leaves_its_gates():
    "As automatic differentiation would: no gradient, no step"
    net = convnet()
    opt, p = start(net, sparsity=.7)
    for q in net[9].parameters(): q.requires_grad_(False)
    before = p.presence.clone()
    train(net, opt, 3)
    last = slice(p.groups.n - 20, None)
    assert torch.equal(p.presence[last], before[last]) and not torch.equal(p.presence[:12], before[:12])


class Token(nn.Module):
    "A module is given a view of a parameter, as cait's class token is"
    def __init__(self):
        super().__init__()
        self.token, self.ahead, self.out = nn.Parameter(torch.randn(1, 4)), nn.Identity(), nn.Linear(4, 2)
        self.hidden = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    def forward(self, x): return self.out(self.hidden(x)*self.ahead(self.token.expand(len(x), -1)))


def test_a_module_is_given_a_parameter():
    found = channels(Token(), torch.randn(2, 3))
    assert [(b.name, b.n) for b in found.banks] == [('hidden.0', 5)]
