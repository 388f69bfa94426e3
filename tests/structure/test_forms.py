"Forms that need no walk: rows, columns, kernels, tiles, single weights at a price, N:M; each layer, each promise."
import copy, math, warnings

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux, Settings
from hyperflux.core.layout import Whole
from hyperflux.structure import (Apiece, Bank, Grouping, Member, Term, blocks, channels, columns, flops, flops_by_module,
                                 kernels, land_apiece, nm, operations, rows, single, weights)
from tests.helpers import loss, mlp, together, train

pytestmark = pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step', 'ignore:left dense')

LAYERS = dict(linear=lambda: nn.Linear(6, 4), conv1d=lambda: nn.Conv1d(6, 4, 3), conv2d=lambda: nn.Conv2d(6, 4, (2, 3)),
              grouped=lambda: nn.Conv2d(6, 4, 3, groups=2), depthwise=lambda: nn.Conv2d(6, 6, 3, groups=6),
              transposed=lambda: nn.ConvTranspose2d(6, 4, 3), turned_groups=lambda: nn.ConvTranspose1d(6, 4, 3, groups=2))
IMAGE = dict(linear=(6,), conv1d=(6, 9), turned_groups=(6, 9))
layers = pytest.mark.parametrize('name', LAYERS)


def image(name, n=2): return torch.randn(n, *IMAGE.get(name, (6, 9, 9)), generator=torch.Generator().manual_seed(0))
def gates(g): return sum(b.n for b in g.banks)


def masked(layer, g, shut):
    "A copy of the layer in which the weights of one gate are zero"
    twin = copy.deepcopy(layer)
    with torch.no_grad(): twin.weight.masked_fill_((g.members[0].index == shut).expand(layer.weight.shape), 0.)
    return twin


def bare(layer):
    with torch.no_grad(): layer.bias.zero_()
    return layer


# What a form switches, asked of the layer itself

@layers
def test_row_is_an_output(name):
    "Without the weights of gate j, output j is zero, and no other output is changed"
    layer, x = bare(LAYERS[name]()), image(name)
    g, before = rows(layer), layer(x)
    assert gates(g) == before.shape[1]
    for j in range(gates(g)):
        after = masked(layer, g, j)(x)
        assert not after[:, j].any()
        others = [i for i in range(gates(g)) if i != j]
        assert torch.allclose(after[:, others], before[:, others], atol=1e-6)


@layers
def test_column_is_an_input(name):
    "Without the weights of gate j the layer computes what it computes where input j is zero"
    layer, x = LAYERS[name](), image(name)
    g = columns(layer)
    assert gates(g) == 6
    for j in range(6):
        without = x.clone()
        without[:, j] = 0
        assert torch.allclose(masked(layer, g, j)(x), layer(without), atol=1e-6)


@layers
def test_kernel_is_a_pair(name):
    "A gate for each pair of an output and an input that it reads; a linear layer has no kernel"
    layer = LAYERS[name]()
    if name == 'linear':
        with pytest.raises(ValueError, match='Linear has none among the chosen weights: take rows, columns or blocks'):
            kernels(layer)
        return
    g, x = kernels(layer), image(name)
    out, before = bare(layer)(x).shape[1], layer(x)
    assert gates(g) == out*6//layer.groups == layer.weight.shape[0]*layer.weight.shape[1]
    changed = [[i for i in range(out) if not torch.allclose(masked(layer, g, j)(x)[:, i], before[:, i], atol=1e-6)]
               for j in range(gates(g))]
    assert changed == [[j//(6//layer.groups)] for j in range(gates(g))]


@layers
@pytest.mark.parametrize('r, c, n', [(1, 1, None), (2, 4, None), (3, 5, None), (100, 100, 1)])
def test_tiles_cover_the_matrix(name, r, c, n):
    "Each weight hangs on one gate, the gates of whole tiles come first, and tiles are no larger than r × c"
    layer = LAYERS[name]()
    g = blocks(layer, r, c)
    counts = torch.bincount(g.members[0].index.expand(layer.weight.shape).flatten())
    out = rows(layer).banks[0].n
    wide = layer.weight.numel()//out
    assert len(counts) == gates(g) == (n or math.ceil(out/r)*math.ceil(wide/c))
    assert counts.sum() == layer.weight.numel() and counts.max() <= r*c and (counts.diff() <= 0).all()
    assert [w for t in g.terms for w in [t.weights]*len(t.ins)] == counts.tolist()
    if name == 'linear': return
    index = g.members[0].index.expand(layer.weight.shape)
    same = kernels(layer).members[0].index.expand(layer.weight.shape)
    if (r, c) == (1, math.prod(layer.weight.shape[2:])): assert index.equal(same)


@layers
def test_one_tile_of_a_kernel_is_a_kernel(name):
    "blocks(1, places of a kernel) and kernels are the same gates"
    if name == 'linear': return
    layer = LAYERS[name]()
    one, other = (f.members[0].index.expand(layer.weight.shape)
                  for f in (blocks(layer, 1, math.prod(layer.weight.shape[2:])), kernels(layer)))
    assert one.equal(other)


def test_counts_by_hand():
    "Tiles of 2 × 3 in a matrix 5 × 7: four whole ones, two of 2 × 1, two of 1 × 3, one of 1 × 1"
    g = blocks(nn.Linear(7, 5), 2, 3)
    assert [(b.n, t.weights) for b, t in zip(g.banks, g.terms)] == [(4, 6), (2, 3), (2, 2), (1, 1)]
    assert g.cost().whole == 35 and repr(g) == 'blocks of 2 × 3: 9 gates in 4 banks, on 1 weight'


@pytest.mark.parametrize('floor, floors', [(1, [1, 0, 0, 0]), (5, [4, 1, 0, 0]), (0, [0, 0, 0, 0]), (1., [4, 2, 2, 1]),
                                           (np.int64(2), [2, 0, 0, 0])])
def test_floor_stands_on_the_largest(floor, floors):
    assert [b.floor for b in blocks(nn.Linear(7, 5), 2, 3, floor=floor).banks] == floors


# Operations

def test_operations_are_those_of_the_modules():
    "By weight, and by module, where a module has one weight and runs by itself; per sample, whatever the batch"
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Flatten(),
                        nn.Linear(256, 5))
    x = torch.randn(3, 2, 8, 8)
    by, count = flops_by_module(net, example=(x,)), operations(net, x)
    assert {k: 3*count[f'{k}.weight'] for k in '024'} == {k: by[k] for k in ('0', '2', '4')}
    assert count == operations(net, x[:1]) and 3*count[''] == by['']


def test_operations_of_a_recurrent_layer():
    "Both of its matrices, once for each of five steps"
    count = operations(nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3))
    assert (count['weight_ih_l0'], count['weight_hh_l0']) == (2*5*16*3, 2*5*16*4)


def test_shared_weight_counts_both_times():
    layer = nn.Linear(4, 4, bias=False)
    assert operations(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(1, 4))['0.weight'] == 2*2*16


# Budgets

def net_and_task():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4))


pictures = torch.randn(128, 1, 8, 8, generator=torch.Generator().manual_seed(1))
classes = pictures[:, 0].flatten(1).view(128, 4, 16).mean(2).argmax(1)


def learn(net, opt, steps, first=0):
    for i in range(first, first + steps):
        b = slice(32*(i % 4), 32*(i % 4) + 32)
        opt.zero_grad()
        F.cross_entropy(net(pictures[b]), classes[b]).backward()
        opt.step()


FORMS = dict(rows=rows, columns=columns, kernels=lambda net, x=None: kernels(net, x),
             blocks=lambda net, x=None: blocks(net, 3, 4, x), single=single)


@pytest.mark.parametrize('price', [weights, flops], ids=['weights', 'flops'])
@pytest.mark.parametrize('form', FORMS)
def test_budget_is_used_up(form, price):
    "Never above the budget, and no gate that is shut would still fit; the mask has what the report counts"
    net = net_and_task()
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    groups = FORMS[form](net, pictures[:1])
    pruner = Hyperflux(net, opt, sparsity=.5, steps=200, groups=groups, cost=price, settings=Settings(updates=50))
    learn(net, opt, 200)
    left = pruner.remaining
    assert left == pruner.groups.left(pruner.gate) <= pruner.budget == pytest.approx(.5*pruner.groups.whole)
    if type(pruner.groups).__name__ == 'Groups': assert left == round(pruner.budget)
    elif form == 'single':
        shut = [c for c, m in zip(pruner.groups.cost.each, pruner.masks) if (m == 0).any()]
        assert left + min(shut) > pruner.budget
    else:
        shut = pruner.gate == 0
        assert shut.any() and (left + pruner.groups.cost.marginal(pruner.gate)[shut] > pruner.budget).all()
    assert f'{left:,.0f} of' in str(pruner) and pruner.density == left/pruner.groups.whole


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_landing_takes_whatever_can_be_paid(dtype):
    "Against the rule, one weight after another, with ties, prices that differ, and budgets from nothing to all"
    own = [nn.Linear(5, k, bias=False) for k in (1, 4, 2, 3)]
    prices = [7., 2., 5., 2.]
    cost, each = Apiece(Whole([l.weight for l in own]), prices, 'coins', fixed=3.), []
    for c, l in zip(prices, own): each += [c]*l.weight.numel()
    for seed in range(60):
        t = (torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=dtype)*(2 if seed % 2 else 99)).round()
        left, stay = 3.1*seed, torch.zeros(50, dtype=torch.bool)
        for j in t.sort(descending=True, stable=True).indices.tolist():
            if each[j] <= left: stay[j], left = True, left - each[j]
        land_apiece(t, cost, 3.1*seed + 3)
        assert torch.equal(t >= 0, stay)


def test_landing_refuses_what_has_diverged():
    cost = Apiece(Whole([nn.Linear(2, 1).weight]), [2.], 'coins')
    with pytest.raises(ValueError, match='must be finite'): land_apiece(torch.tensor([1., math.nan]), cost, 2)


# Single weights

@pytest.mark.parametrize('make', [lambda ps: torch.optim.SGD(ps, .1, momentum=.9, weight_decay=5e-4),
                                  lambda ps: torch.optim.Adam(ps, 3e-3),
                                  lambda ps: torch.optim.AdamW(ps, 3e-3, weight_decay=.1)], ids=['SGD', 'Adam', 'AdamW'])
def test_single_without_a_price_is_no_group_at_all(make):
    "200 steps with and without groups=single(model): the same bits, in presences, masks and weights"
    runs = []
    for form in lambda net: None, single:
        net = mlp()
        opt = make(net.parameters())
        p = Hyperflux(net, opt, sparsity=.9, steps=200, groups=form(net))
        train(net, opt, 200)
        runs.append((p, [p.presence, p.mask, p.value, *net.parameters()]))
    (plain, a), (grouped, b) = runs
    assert type(grouped.groups) is type(plain.groups) and all(map(torch.equal, a, b))
    assert grouped.gate is grouped.mask and grouped.gate_grad is grouped.sensitivity          # no tensor of their own


def test_price_moves_weights_to_where_they_are_cheap():
    "At one number of operations, pressing by operations leaves more weights than pressing by weights"
    left = {}
    for price in weights, flops:
        net = net_and_task()
        opt = torch.optim.Adam(net.parameters(), 3e-3)
        groups = single(net, pictures[:1])
        share = .5 if price is weights else left['share']
        p = Hyperflux(net, opt, sparsity=1 - share, steps=300, groups=groups, cost=price)
        learn(net, opt, 300)
        count = groups.cost(flops, p.layout)
        left[price] = p.left
        left['share'] = count.left(p.mask).item()/count.whole
    assert left[flops] > 1.1*left[weights]


@pytest.mark.parametrize('form', [single, rows, columns, kernels, lambda net, x=None, **k: blocks(net, 2, 2, x, **k)],
                         ids=['single', 'rows', 'columns', 'kernels', 'blocks'])
def test_operations_need_an_example(form):
    net = net_and_task()
    opt = torch.optim.SGD(net.parameters(), .1)
    with pytest.raises(ValueError, match='without an example, so that operations are not known: give example='):
        Hyperflux(net, opt, sparsity=.5, steps=200, groups=form(net), cost=flops)
    Hyperflux(net, opt, sparsity=.5, steps=200, groups=form(net, pictures[:1]), cost=flops).detach()


@pytest.mark.parametrize('form', [single, rows])
def test_weight_without_operations_is_named(form):
    "A layer that the example does not reach has no price"
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    net[1].spare = nn.Linear(4, 4)
    opt = torch.optim.SGD(net.parameters(), .1)
    with pytest.raises(ValueError, match="no operation of 1.spare.weight was seen.*ignore='1.spare.weight'"):
        Hyperflux(net, opt, sparsity=.5, steps=200, groups=form(net, torch.randn(2, 4)), cost=flops)
    groups = form(net, torch.randn(2, 4), ignore='1.spare.weight')
    Hyperflux(net, opt, sparsity=.5, steps=200, groups=groups, cost=flops).detach()


def square(terms, device): return lambda i, a, b: (a*b)**2
def measured(terms, device): raise ValueError('there is no layer of that shape')


@pytest.mark.parametrize('price', [square, measured])
def test_price_that_a_zero_does_not_lower(price):
    "What a layer takes as a whole is no price of its weights"
    net = mlp()
    with pytest.raises(ValueError, match=f'{price.__name__} is not so much for each weight.*channels, or cost=flops'):
        Hyperflux(net, torch.optim.SGD(net.parameters(), .1), sparsity=.5, steps=200, groups=single(net), cost=price)


def test_single_may_choose_vectors():
    "As without groups=, what is asked for by name is pruned, a bias too"
    net = mlp()
    p = Hyperflux(net, torch.optim.SGD(net.parameters(), .1), sparsity=.5, steps=200, groups=single(net, targets='0.bias'))
    assert p.names == ['0.bias']


# N:M

def pattern_of(weight, n, m, dim=1): return (weight != 0).unflatten(dim, (-1, m)).sum(dim + 1).unique().tolist() == [n]


@pytest.mark.parametrize('n, m', [(2, 4), (1, 2), (1, 4), (3, 8), (7, 8)])
def test_pattern_of_every_layer(n, m):
    "Convolutions, transposed and grouped ones, and linear layers: exactly N of every M along the inputs"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
                        nn.Conv2d(16, 8, 1, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 16, 1), nn.ReLU(),
                        nn.ConvTranspose2d(16, 8, 1, groups=2), nn.Flatten(), nn.Linear(128, 8), nn.ReLU(),
                        nn.Linear(8, 4)).to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    pruner = Hyperflux(net, opt, steps=200, groups=nm(net, n, m))
    assert pruner.sparsity == 1 - n/m and pruner.names == [f'{i}.weight' for i in (2, 4, 6, 8, 10, 12)]
    seen = []
    for i in range(200):
        learn(net, opt, 1, i)
        seen.append(min((g != 0).unflatten(d, (-1, m)).sum(d + 1).min().item()
                        for g, d in zip(pruner.masks, pruner.groups.dims)))
    assert min(seen) == n                                                           # no block was ever emptier
    for w, d in zip(pruner.params, pruner.groups.dims): assert pattern_of(w, n, m, d)
    assert pruner.groups.dims == [1, 1, 0, 0, 1, 1] and pruner.left == pruner.d*n//m == pruner.keep


def test_pattern_goes_into_a_sparse_matrix():
    "PyTorch's semi-structured matrices accept what nm(2, 4) leaves, and multiply the same"
    if not torch.cuda.is_available(): pytest.skip('torch.sparse.to_sparse_semi_structured needs a CUDA GPU')
    net = nn.Linear(128, 128, bias=False).cuda()
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    Hyperflux(net, opt, steps=200, groups=nm(net, 2, 4))
    x = torch.randn(64, 128, device='cuda')
    for _ in range(200):
        opt.zero_grad()
        (net(x) - x.roll(1, 1)).square().mean().backward()
        opt.step()
    w = net.weight.detach().half()
    assert torch.allclose(torch.sparse.to_sparse_semi_structured(w)@x.half().T, w@x.half().T, rtol=1e-2, atol=1e-2)


def test_other_sparsities_are_refused():
    net = mlp()
    opt = torch.optim.SGD(net.parameters(), .1)
    for ask in dict(sparsity=.9, steps=200), dict(plan=Settings().plan(200, .9)):
        with pytest.raises(ValueError, match='2:4 leaves 2 of every 4 weights, a sparsity of 0.5, and sparsity=0.9'):
            Hyperflux(net, opt, groups=nm(net, 2, 4), **ask)
    for ask in dict(sparsity=.5, steps=200), dict(plan=Settings().plan(200)):
        p = Hyperflux(net, opt, groups=nm(net, 2, 4), **ask)
        assert p.sparsity == .5
        p.detach()
    with pytest.raises(ValueError, match='leaves no choice between layers.*leave out cost='):
        Hyperflux(net, opt, steps=200, groups=nm(net, 2, 4), cost=flops)


def test_what_does_not_divide_stays_dense_and_is_named():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=r'left dense, for 4 does not divide .*: 0.weight \(6 inputs\)'): g = nm(net, 2, 4)
    assert list(g.weights(net)) == ['1.weight']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        nm(net, 2, 4, ignore='0')
    with pytest.raises(ValueError, match='4 divides the number of inputs of no weight'): nm(net[0], 2, 4)


def test_plan_ends_where_the_pattern_does():
    "Density is never planned below N/M, which no pressure reaches"
    net = mlp()
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    p = Hyperflux(net, opt, steps=400, groups=nm(net, 1, 4))
    train(net, opt, 400)
    assert min(r['planned'] for r in p.history) == .25 and min(r['density'] for r in p.history) >= .25


# Two at once

def test_two_forms_on_two_layers():
    "Rows of one layer and tiles of the other: gates of both, costs of both, one budget"
    net = net_and_task()
    a, b = rows(net, pictures[:1], targets=['0', '2']), blocks(net, 2, 2, pictures[:1], targets=['6', '8'])
    both = a + b
    assert gates(both) == gates(a) + gates(b)
    assert both.cost().whole == a.cost().whole + b.cost().whole == sum(net[i].weight.numel() for i in (0, 2, 6, 8))
    assert both.cost(flops).whole == a.cost(flops).whole == flops_by_module(net, example=(pictures[:1],))['']
    z = torch.ones(gates(both))
    z[:6], z[-3:] = 0, 0                            # all of the first layer, and three tiles of the last
    assert both.cost().left(z) == both.cost().whole - 54 - 12
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    p = Hyperflux(net, opt, sparsity=.6, steps=200, groups=both, cost=flops)
    learn(net, opt, 200)
    assert p.remaining <= p.budget and p.names == ['0.weight', '2.weight', '6.weight', '8.weight']


def test_channels_and_tiles():
    "A layer that channels counts as fixed is counted once, by the form that has gates there"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    a, b = channels(net, pictures[:1], ignore='5'), blocks(net, 5, 16, pictures[:1], targets='5')
    for both in a + b, b + a:
        assert both.cost(flops).whole == a.cost(flops).whole == both.total['flops']
        assert both.cost().whole == sum(net[i].weight.numel() for i in (0, 2, 5))
        least = both.cost().left(torch.zeros(gates(both))).item()
        assert least == a.cost().left(torch.zeros(gates(a))).item() - net[5].weight.numel()


def test_what_cannot_be_added():
    net, x = net_and_task(), pictures[:1]
    with pytest.raises(ValueError, match=r'rows and blocks of 2 × 2 both have gates on 6.weight: .* ignore='):
        rows(net) + blocks(net, 2, 2, targets='6')
    with pytest.raises(ValueError, match='flops in all: make both for the same model'):
        rows(net, x, targets='0') + columns(nn.Sequential(*net, nn.Linear(4, 4)), x, targets='6')
    for alone in single(net), nm(net, 2, 4, targets='6'):
        for add in (lambda: alone + rows(net)), (lambda: rows(net) + alone):
            with pytest.raises(TypeError, match='every weight has a gate of its own already'): add()
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    with pytest.raises(ValueError, match='change widths by 2 and by 1 gates: make both alike'):
        channels(net, x, multiple=2, ignore='4') + rows(net, x, targets='4')
    with pytest.raises(ValueError, match='channels and rows both have gates on 2.weight'):
        channels(net, x, ignore='4') + rows(net, x, targets='2')
    with pytest.raises(ValueError, match='channels and rows both have gates on 0.weight'):      # whose rows channels takes
        channels(net, x, ignore='4') + rows(net, x, targets='0')


# What is wrong is said

@pytest.mark.parametrize('what, message', [
    (lambda net: blocks(net, 0, 4), 'r is a whole number, 1 or more: got 0'),
    (lambda net: blocks(net, 2, 2.5), 'c is a whole number, 1 or more: got 2.5'),
    (lambda net: rows(net, floor=7), "floor=7 is more than the 6 gates of 0.weight.*ignore='0.weight'"),
    (lambda net: rows(net, floor=-1), 'floor is a whole number, 0 or more: got -1'),
    (lambda net: rows(net, floor=1.5), 'floor is a whole number, 0 or more: got 1.5'),
    (lambda net: rows(net, targets='0.bias'), r"0.bias has the shape \(6,\), without outputs and inputs.*ignore='0.bias'"),
    (lambda net: nm(net, 0, 4), 'n is a whole number, 1 or more: got 0'),
    (lambda net: nm(net, 4, 2), 'n < m: got n=4, m=2'),
    (lambda net: rows(net, torch.randn(1, 3)), 'cannot count Sequential for inputs of shape'),
    (lambda net: rows(net, targets='nine'), "'nine' matches no weight of the model")])
def test_bad_input(what, message):
    with pytest.raises(ValueError, match=message): what(net_and_task())


@pytest.mark.parametrize('form', [rows, single, lambda net: nm(net, 2, 4, ignore=['0', '2', '8'])],
                         ids=['rows', 'single', 'nm'])
def test_groups_of_another_model(form):
    groups, other = form(net_and_task()), mlp()
    with pytest.raises(ValueError, match='another model: this one has no '):
        Hyperflux(other, torch.optim.SGD(other.parameters(), .1), sparsity=.5, steps=200, groups=groups)


def test_hand_written_index_of_another_shape():
    groups = Grouping([Member('0.weight', torch.arange(9)[None])], [Bank('inputs', 9)],
                      [Term('0.weight', np.arange(9), np.full(32, -1), 1, 2)])
    with pytest.raises(ValueError, match=r'0.weight has the shape \(32, 20\), and their index \(1, 9\)'):
        groups.weights(mlp())


def test_budget_that_leaves_nothing():
    net = net_and_task()
    opt = torch.optim.SGD(net.parameters(), .1)
    groups = single(net, pictures[:1], ignore='2')
    with pytest.raises(ValueError, match='hang on no gate: ask for a sparsity of at most 0.3998'):
        Hyperflux(net, opt, sparsity=.9, steps=200, groups=groups, cost=flops)


# Stop and go on

@pytest.mark.parametrize('form', [lambda net: blocks(net, 4, 4), lambda net: nm(net, 2, 4),
                                  lambda net: single(net, torch.randn(1, 20))], ids=['blocks', 'nm', 'single'])
@pytest.mark.parametrize('stop', [40, 130, 170])
def test_stop_and_go_on(form, stop, tmp_path):
    "Stopped in each stage, saved, and begun again: the bits of a run that was never stopped"
    def begin():
        net = mlp()
        opt = torch.optim.Adam(net.parameters(), 3e-3)
        groups = form(net)
        sparsity = {} if 'Pattern' in type(groups).__name__ else dict(sparsity=.8)
        cost = flops if type(groups).__name__ == 'Singles' else None
        return net, opt, Hyperflux(net, opt, steps=200, groups=groups, cost=cost, **sparsity)
    unstopped, opt, whole = begin()
    train(unstopped, opt, 200)
    net, opt, first = begin()
    train(net, opt, stop)
    torch.save(dict(net=net.state_dict(), opt=opt.state_dict(), pruner=first.state_dict()), tmp_path/'state')
    saved = torch.load(tmp_path/'state', weights_only=True)
    net, opt, second = begin()
    net.load_state_dict(saved['net']), opt.load_state_dict(saved['opt']), second.load_state_dict(saved['pruner'])
    train(net, opt, 200 - stop)
    assert torch.equal(whole.presence, second.presence) and torch.equal(whole.mask, second.mask)
    assert all(map(torch.equal, unstopped.parameters(), net.parameters()))
    assert whole.history == second.history and 0 < whole.density < 1


def test_state_of_another_pattern():
    net = mlp()
    state = Hyperflux(net, torch.optim.SGD(net.parameters(), .1), steps=200, groups=nm(net, 2, 4)).state_dict()
    net = mlp()
    other = Hyperflux(net, torch.optim.SGD(net.parameters(), .1), steps=200, groups=nm(net, 1, 2))
    with pytest.raises(ValueError, match="pattern='2:4'.*pattern='1:2'"): other.load_state_dict(state)


# Processes that hold a part of each weight

def test_sharded(tmp_path): together(2, work_on_shards)


def work_on_shards(world):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from hyperflux.core.shards import sharded
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))

    def run(groups, cut, **kw):
        net = mlp()
        made = groups(net)
        if cut:
            for m in net:
                if isinstance(m, nn.Linear): fully_shard(m, mesh=mesh)
            fully_shard(net, mesh=mesh)
        opt = torch.optim.SGD(net.parameters(), .1)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            p = Hyperflux(net, opt, steps=200, groups=made, **kw)
            for _ in range(200):
                opt.zero_grad()
                loss(net).backward()
                opt.step()
        assert not cut or all(map(sharded, p.params))
        return p, [p.layout.whole(i, m).flatten() for i, m in enumerate(p.mask.split(p.sizes))]

    p, cut = run(lambda net: nm(net, 2, 4), True)
    for m in cut: assert m.view(-1, 4).sum(1).unique().tolist() == [2.]
    p, cut = run(lambda net: single(net, torch.randn(1, 20)), True, sparsity=.8, cost=flops)
    assert p.remaining <= p.budget < p.remaining + 2 and sum(m.sum() for m in cut)*2 == p.remaining
    net = nn.Sequential(nn.ConvTranspose1d(8, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3))
    groups = nm(net, 2, 4)
    fully_shard(net, mesh=mesh)
    with pytest.raises(ValueError, match='0.weight is cut along dimension 0, through the blocks of 2:4'):
        Hyperflux(net, torch.optim.SGD(net.parameters(), .1), steps=200, groups=groups)
