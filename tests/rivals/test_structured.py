"Structural rivals: scores against sums written the long way, budgets, floors, files, and Torch-Pruning itself."
import copy, functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperflux.deploy.compact import compact
from hyperflux.rivals.l0 import L0
from hyperflux.rivals.structured import FPGM, GroupMagnitude, GroupRandom, GroupTaylor, Slimming
from hyperflux.rivals.torch_pruning import TorchPruned
from hyperflux.structure.channels import channels
from hyperflux.structure.cost import flops, flops_by_module, weights
from tests.rivals.rig import through_a_file

g0 = torch.Generator().manual_seed(0)
xs, ys = torch.randn(96, 1, 12, 12, generator=g0), torch.randint(4, (96,), generator=g0)


def convnet():
    "Two convolutions with norms, a hidden layer with one"
    return nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(108, 16),
                         nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 4))


class Residual(nn.Module):
    "A stream that two layers write and two read, and a grouped convolution"
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, groups=3), nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 4)
    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        return self.last((x + self.norm2(self.inner(x))).mean((2, 3)))


ALL = {'L2': (GroupMagnitude, {}), 'L1 of rows': (GroupMagnitude, dict(p=1, of='rows')),
       'columns': (GroupMagnitude, dict(of='columns')), 'FPGM': (FPGM, {}), 'slimming': (Slimming, {}),
       'Taylor': (GroupTaylor, {}), 'random': (GroupRandom, {})}
every = pytest.mark.parametrize('name', ALL)


@functools.cache
def grouped(build, **how): return channels(build(), xs[:2], **how)


def start(name, build=convnet, seed=0, opt=lambda ps: torch.optim.SGD(ps, .05, momentum=.9, weight_decay=1e-3), **how):
    kind, more = ALL[name]
    torch.manual_seed(seed)
    m = build()
    o = opt(m.parameters())
    how = dict(sparsity=.75, steps=40, cost=flops, updates=10) | more | how
    how.setdefault('groups', grouped(build))
    return m, o, kind(m, o, **how)


def train(m, o, begin, end, look=lambda: None):
    for i in range(begin, end):
        part = slice(i % 3*32, i % 3*32 + 32)
        o.zero_grad()
        F.cross_entropy(m(xs[part]), ys[part]).backward()
        o.step()
        look()


def cheapest(p):
    "What the next of the shut gates would cost, at the least"
    c = p.groups.cost.marginal(p.opened)
    return c[p.opened == 0].min().item()


# Budgets

@every
@pytest.mark.parametrize('build, cost', [(convnet, flops), (mlp, weights)])
def test_lands_within_the_budget(name, build, cost):
    "Never above it, at the end no channel can still be paid; until then masks nest; the small network agrees"
    if name == 'slimming' and build is mlp: build = convnet
    m, o, p = start(name, build, cost=cost, sparsity=.6)
    seen = [p.opened.clone()]
    def look():
        assert p.step == p.plan.end or (p.opened <= seen[-1]).all()
        assert (p.groups.found(p.current()) <= p.opened).all()
        if p.history and p.history[-1]['step'] == p.step: assert p.remaining <= p.planned*p.groups.whole + 1e-6
        seen.append(p.opened.clone())
    train(m, o, 0, 40, look)
    assert p.stage == 'done' and p.budget - cheapest(p) < p.remaining <= p.budget
    assert torch.equal(p.groups.found(p.current()), p.opened)                       # what was given back has trained
    assert p.deaths - p.births == p.groups.n - int(p.opened.sum())
    begin = 10 if name == 'slimming' else 0
    assert [r['step'] for r in p.history] == [begin + k*(20 - begin)//10 for k in range(1, 11)]
    assert p.history[-1]['density'] == p.density
    small, report = compact(m.eval(), xs[:2])
    assert report.gap < 1e-5
    if build is convnet and cost is flops:
        counted = [flops_by_module(n, example=(xs[:1],))[''] for n in (small, build())]
        assert counted[0] <= .4*counted[1]


@every
def test_floors_hold(name):
    "Half of each width stays, and widths are multiples of four"
    m, o, p = start(name, groups=grouped(convnet, floor=.5, multiple=4), sparsity=.5)
    train(m, o, 0, 40)
    open = [r['open'] for r in p.groups.widths(p.opened)]
    assert all(k >= n/2 and k % 4 == 0 for k, n in zip(open, p.groups.sizes)) and p.remaining <= p.budget


@every
def test_one_shot(name):
    "A span without length: all at once, in the middle of the run or, where no gradient is needed, before it"
    m, o, p = start(name, span=(.5, .5))
    train(m, o, 0, 19)
    assert p.density == 1 and p.stage == 'dense'
    train(m, o, 19, 20)
    assert p.remaining <= p.budget and p.stage == 'finetune' and len(p.history) == 1
    if name == 'Taylor':
        with pytest.raises(ValueError, match='was to prune before the first'): start(name, span=(0, 0))
    else:
        _, _, p = start(name, span=(0, 0))
        assert p.density == 1
        assert p.start().remaining <= p.budget


# Files

sgd, adam = lambda ps: torch.optim.SGD(ps, .05, momentum=.9), lambda ps: torch.optim.Adam(ps, 2e-3)


@pytest.mark.parametrize('name, stop, opt', [*((name, 17, sgd) for name in ALL), ('Taylor', 3, adam),
                                             ('Taylor', 33, adam)])
def test_resume(name, stop, opt):
    "Stopped, and loaded into a fresh network, the run ends in the same bits"
    everything = lambda m, o, p: [p.opened, p.mask, *m.state_dict().values()]
    whole = start(name, opt=opt, span=(.2, .7))
    train(*whole[:2], 0, 40)
    first = start(name, opt=opt, span=(.2, .7))
    train(*first[:2], 0, stop)
    saved = through_a_file(*first)
    second = start(name, seed=7, opt=opt, span=(.2, .7))
    for part, state in zip(second, saved): part.load_state_dict(state)
    assert all(map(torch.equal, everything(*first), everything(*second)))
    kept = copy.deepcopy(saved[2]['history'])
    train(*second[:2], stop, 40)
    assert all(map(torch.equal, everything(*whole), everything(*second))) and second[2].history == whole[2].history
    assert saved[2]['history'] == kept                                  # a state can be loaded twice


def test_a_state_of_another_score_is_refused():
    "The power, what is looked at and normalising belong to the goal"
    state = start('L2')[2].state_dict()
    for how, says in (dict(p=1), 'p=2.*p=1'), (dict(of='rows', normalise=False), 'normalise=True'):
        with pytest.raises(ValueError, match=says): start('L2', **how)[2].load_state_dict(state)


# Scores

def test_sizes_the_long_way():
    "Rows, columns and scales of each channel, one by one, at open and half-shut gates"
    m, o, p = start('L2', normalise=False)
    train(m, o, 0, 9)
    open = p.opened
    assert 0 < open.sum() < p.groups.n
    squares = {i: m[i].weight.detach().double().square() for i in (0, 1, 4, 5, 8, 9, 11)}
    conv1, norm1, conv2, norm2, lin, norm3, last = squares.values()
    a, b, c = (z.double() for z in open.split([8, 12, 16]))
    lin = lin.view(16, 12, 9)                                           # flattened: nine places a channel
    expected = torch.cat([
        conv1.sum((1, 2, 3)) + norm1 + (conv2.sum((2, 3))*b[:, None]).sum(0),
        (conv2.sum((2, 3))*a).sum(1) + norm2 + (lin.sum(2)*c[:, None]).sum(0),
        (lin.sum(2)*b).sum(1) + norm3 + last.sum(0)])
    torch.testing.assert_close((p.score()*open).double(), expected*open, rtol=1e-5, atol=1e-6)


def test_medians_the_long_way():
    "Distances between rows, to those that are there"
    m, o, p = start('FPGM')
    train(m, o, 0, 9)
    expected = []
    for layer, z in zip((m[0], m[4], m[8]), p.opened.split([8, 12, 16])):
        rows = layer.weight.detach().double().flatten(1)
        expected += [sum((rows[i] - rows[j]).norm() for j in range(len(rows)) if z[j]) for i in range(len(rows))]
    torch.testing.assert_close((p.score()*p.opened).double(), torch.stack(expected)*p.opened, rtol=1e-4, atol=1e-5)


def test_taylor_is_a_gate_in_the_graph():
    "The mean of the squared derivatives by gates that multiply the channels"
    m, o, p = start('Taylor', span=(.5, .5), opt=lambda ps: torch.optim.SGD(ps, 0.))
    seen = []
    for i in range(4):
        part = slice(i % 3*32, i % 3*32 + 32)
        z = [torch.ones(n, requires_grad=True) for n in (8, 12, 16)]
        h = m[:4](xs[part])*z[0][:, None, None]
        h = m[8:11](m[7](m[4:7](h)*z[1][:, None, None]))*z[2]
        seen.append(torch.cat(torch.autograd.grad(F.cross_entropy(m[11](h), ys[part]), z)).square())
    train(m, o, 0, 4)
    torch.testing.assert_close(p.squares, torch.stack(seen).mean(0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('maximize', [False, True])
def test_slimming_pulls_at_scales(fused, maximize):
    "λ·sign γ beside the gradient of the loss, unscaled, downhill in either direction, until the last cut and no longer"
    def run(penalty):
        m, o, p = start('slimming', penalty=penalty, span=(.1, .2), steps=10, sparsity=.1,
                        opt=lambda ps: torch.optim.SGD(ps, .1, fused=fused, maximize=maximize))
        scaler = torch.amp.GradScaler('cpu', init_scale=64.)
        moves = []
        for _ in range(4):
            before = [m[i].weight.detach().clone() for i in (1, 5, 9)]
            o.zero_grad()
            scaler.scale(0*m(xs).sum()).backward()                      # a loss without a slope
            scaler.step(o)
            scaler.update()
            moves.append(torch.cat([m[i].weight.detach() - w for i, w in zip((1, 5, 9), before)]))
        return moves
    for move in run(0.): assert not move.any()
    moves = run(.5)
    for move in moves[:2]: torch.testing.assert_close(move, torch.full((36,), -.05), rtol=1e-3, atol=1e-6)
    for move in moves[2:]: assert not move.any()


def test_writers_of_a_stream():
    "Both layers that write a residual stream, the grouped one with all rows of a group, and norms and biases"
    m = Residual()
    found = {w.name: w.index for w in channels(m, xs[:2]).writers}
    assert list(found) == ['first.weight', 'first.bias', 'norm1.weight', 'norm1.bias', 'inner.weight', 'inner.bias',
                           'norm2.weight', 'norm2.bias']
    assert all(i.flatten().tolist() == [0, 0, 1, 1, 2, 2] for i in found.values())
    assert found['inner.weight'].shape == (6, 1, 1, 1)
    m, o, p = start('L1 of rows', Residual, sparsity=.6)
    train(m, o, 0, 40)
    assert p.remaining <= p.budget and compact(m.eval(), xs[:2])[1].gap < 1e-5


# What is refused

def test_refusals():
    "No groups, no example, no norm, a budget below the floors; a refused pruner leaves the optimiser free"
    m = mlp()
    o, groups = torch.optim.SGD(m.parameters(), .1), channels(m, xs[:2])
    how = dict(sparsity=.5, steps=40, cost=flops)
    for kind in GroupMagnitude, FPGM, Slimming, GroupTaylor, GroupRandom:
        with pytest.raises(ValueError, match=f'{kind.__name__} removes groups of weights, and was given none'):
            kind(m, o, **how)
    with pytest.raises(ValueError, match='TorchPruned runs the network.*give example='):
        TorchPruned(m, o, groups=groups, **how)
    with pytest.raises(ValueError, match='Torch-Pruning cuts to a share of operations: give cost=flops'):
        TorchPruned(m, o, groups=groups, example=xs[:2], **how | dict(cost=weights))
    with pytest.raises(ValueError, match="1 has none behind it: give it one, or keep its channels.*ignore='1'"):
        Slimming(m, o, groups=groups, **how)
    with pytest.raises(ValueError, match='smallest network these groups allow'):
        GroupRandom(m, o, groups=groups, **how | dict(sparsity=.999))
    with pytest.raises(ValueError, match='made for another model'): GroupMagnitude(convnet(), o, groups=groups, **how)
    GroupRandom(m, o, groups=groups, **how)


def test_diverged():
    "Scores that are not finite are refused by name"
    m, o, p = start('L2', span=(0, 0))
    with torch.no_grad(): m[4].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match='scores of GroupMagnitude hold NaN'): p.start()


# Hard concrete gates on channels

@pytest.mark.parametrize('share', [.5, .2])
def test_l0_with_channels(share):
    "Lands within the budget and less than a channel below it, agrees with the small network, goes on from a file"
    def fresh(seed=0):
        torch.manual_seed(seed)
        m = convnet()
        o = torch.optim.Adam(m.parameters(), 2e-3)
        return m, o, L0(m, o, sparsity=1 - share, steps=180, groups=grouped(convnet), cost=flops)
    whole = fresh()
    train(*whole[:2], 0, 180)
    m, _, p = whole
    cost = p.groups.cost.marginal(p.opened)
    assert p.budget - cost[p.opened == 0].max() < p.remaining <= p.budget and p.expected == p.density
    assert compact(copy.deepcopy(m).eval(), xs[:2])[1].gap < 1e-5
    first, second, stop = fresh(), fresh(5), 60 if share == .5 else 150
    train(*first[:2], 0, stop)
    for part, state in zip(second, through_a_file(*first)): part.load_state_dict(state)
    train(*second[:2], stop, 180)
    assert torch.equal(second[2].alpha, p.alpha) and torch.equal(second[2].opened, p.opened)
    assert all(map(torch.equal, m.state_dict().values(), second[0].state_dict().values()))


# Torch-Pruning

@pytest.fixture
def tp(): return pytest.importorskip('torch_pruning', reason="not installed: pip install torch-pruning")


@pytest.mark.parametrize('build', [convnet, mlp, Residual])
@pytest.mark.parametrize('importance', ['magnitude', 'taylor'])
def test_torch_pruning_meets_the_budget(build, importance, tp):
    "At most the share of operations that was asked for, no empty layer, the same outputs; the model is untouched"
    from hyperflux.rivals.torch_pruning import torch_pruning
    torch.manual_seed(0)
    m = build().train()
    before = copy.deepcopy(m.state_dict())
    small = torch_pruning(m, xs[:2], .5, importance, batch=(xs, ys), steps=40)
    took, whole = (flops_by_module(n, example=(xs[:2],))[''] for n in (small, m))
    assert .3*whole < took <= .5*whole and small(xs).shape == (96, 4) and small.training
    assert all(p.numel() and p.grad is None for p in small.parameters()) and all(p.grad is None for p in m.parameters())
    assert all(map(torch.equal, before.values(), m.state_dict().values()))


def test_our_magnitude_is_theirs(tp):
    "Scores of GroupMagnitude equal those of its GroupMagnitudeImportance, bank by bank"
    for power in 1, 2:
        m, _, p = start('L2', p=power)
        graph = tp.DependencyGraph().build_dependency(m, example_inputs=xs[:2])
        theirs = tp.importance.GroupMagnitudeImportance(p=power)
        for i, ours in zip((0, 4, 8), p.groups.views(p.by_bank(p.score().detach()))):
            cut = tp.prune_linear_out_channels if i == 8 else tp.prune_conv_out_channels
            group = graph.get_pruning_group(m[i], cut, list(range(len(ours))))
            torch.testing.assert_close(ours, theirs(group), rtol=1e-5, atol=1e-6)
