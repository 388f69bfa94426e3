"Residual branches: found in networks that nobody here wrote, shut, heard, at their price, alone and with channels"
import itertools

import pytest, timm, torch
from timm.models import ConvNeXt, VisionTransformer
from torch import nn

from hyperflux import Hyperflux, channels, flops, layers, weights
from hyperflux.core.layout import Whole
from hyperflux.deploy import compact
from hyperflux.lab.models import resnet20, vit_mini
from hyperflux.structure import flops_by_module, rows
from tests.structure.test_heads import SEQUENCE, hugging

IMAGE, GREY_IMAGE, TOKENS = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 28, 28), torch.randn(2, 6)
WORDS = dict(input_ids=SEQUENCE, use_cache=False)


class Block(nn.Module):
    "x + b(relu(a(x)))"
    def __init__(self, n=6, hidden=3):
        super().__init__()
        self.a, self.b = nn.Linear(n, hidden), nn.Linear(hidden, n)
    def forward(self, x): return x + self.b(self.a(x).relu())

def perceptron(): return nn.Sequential(nn.Linear(6, 6), Block(), Block(), nn.Linear(6, 2))

def vit(depth=2):
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=depth, num_heads=3, mlp_ratio=2,
                             num_classes=4)

def convnext(): return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4)


NETWORKS = { # → model, example, branches, the module whose output is the first, or is scaled to be it
    'resnet20': lambda: (resnet20(), IMAGE, [f'blocks.{k}' for k in (0, 1, 2, 4, 5, 7, 8)], 'blocks.0.bn2'),
    'vit_mini': lambda: (vit_mini(), GREY_IMAGE, [f'encoder.layers.encoder_layer_{k}.{n}' for k in range(4)
                                                   for n in ('self_attention', 'mlp')],
                         'encoder.layers.encoder_layer_0.self_attention'),
    'timm resnet': lambda: (timm.create_model('resnet18'), IMAGE, ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1',
                                                                   'layer4.1'], 'layer1.0.bn2'),
    'timm vit': lambda: (vit(1), IMAGE, ['blocks.0.attn', 'blocks.0.mlp'], 'blocks.0.attn.proj'),
    'timm convnext': lambda: (convnext(), IMAGE, [f'stages.{k}.blocks.0' for k in range(4)], 'stages.0.blocks.0.mlp'),
    'Bert': lambda: (hugging('Bert'), dict(input_ids=SEQUENCE, attention_mask=torch.ones(2, 7)),
                     ['encoder.layer.0.attention', 'encoder.layer.0'], 'encoder.layer.0.attention.output.dense'),
    'Llama': lambda: (hugging('Llama', num_key_value_heads=3), WORDS,
                      ['model.layers.0.self_attn', 'model.layers.0.mlp'], 'model.layers.0.self_attn.o_proj'),
}

def loss(model, example):
    "Some number that depends on all of the first output"
    out = model(**example) if isinstance(example, dict) else model(example)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return (out*torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


def scaled(out, gate):
    "The first of several results times a number"
    return gate*out if isinstance(out, torch.Tensor) else (gate*out[0], *out[1:])


@pytest.mark.parametrize('name', NETWORKS)
def test_branches_are_found_and_heard(name):
    "By name; the flux of the first is the derivative by a number that its result is multiplied with, at 1 and at 0"
    torch.manual_seed(0)
    model, example, expected, last = NETWORKS[name]()
    model.eval().double()                                               # no dropout
    example = example if isinstance(example, dict) else example.double()
    for p in model.parameters():
        if p.ndim == 1: nn.init.normal_(p, std=.3)                      # zeros and scales of 1e-6 would hide an error
    found = layers(model, example)
    assert [b.name for b in found.banks] == [f'branch {n}' for n in expected]
    assert all(b.n == 1 and b.floor == 0 for b in found.banks)
    assert found.cost(flops).left(torch.zeros(len(expected))) < found.cost(flops).whole
    params = found.weights(model)
    own = [p.detach().clone() for p in params.values()]
    groups = found.bind(Whole([nn.Parameter(w) for w in own]), list(params))
    for z in 0., 1.:
        gate = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        hook = model.get_submodule(last).register_forward_hook(lambda m, args, out: scaled(out, gate))
        expected_flux, = torch.autograd.grad(loss(model, example), gate)
        hook.remove()
        gates, flux = groups.flat(1.), groups.flat()
        flat = torch.empty(sum(w.numel() for w in own), dtype=torch.float64)
        gates[0] = z
        groups.expand(gates, flat)
        masks = [m.view_as(w) for m, w in zip(flat.split([w.numel() for w in own]), own)]
        with torch.no_grad():
            for p, w, m in zip(params.values(), own, masks): p.copy_(w*m)
        slopes = torch.autograd.grad(loss(model, example), list(params.values()))
        groups.sum(torch.cat([(w*g).flatten() for w, g in zip(own, slopes)]), flux)
        assert expected_flux.abs() > 1e-7
        torch.testing.assert_close(flux[0], expected_flux, rtol=1e-6, atol=0)
        with torch.no_grad():
            for p, w in zip(params.values(), own): p.copy_(w)


def test_a_norm_in_training_mode_is_heard():
    "Statistics of the batch do not change what the gate at the last norm says"
    torch.manual_seed(0)
    model, x = resnet20().train(), torch.randn(4, 3, 16, 16)
    norm, gate = model.blocks[1].bn2, torch.zeros((), requires_grad=True)
    hook = norm.register_forward_hook(lambda m, args, out: gate*out)
    expected, = torch.autograd.grad(loss(model, x), gate)
    hook.remove()
    w, b = norm.weight.detach().clone(), norm.bias.detach().clone()
    with torch.no_grad(): norm.weight.zero_(); norm.bias.zero_()
    gw, gb = torch.autograd.grad(loss(model, x), [norm.weight, norm.bias])
    torch.testing.assert_close((w*gw).sum() + (b*gb).sum(), expected, rtol=1e-4, atol=1e-5)


def test_cost_of_channels_and_branches_by_brute_force():
    "All 256 states of two blocks with three neurons each: products of what is there, in both orders of the sum"
    model = perceptron()
    for both, first in ((channels(model, TOKENS, ignore=['0', '3']) + layers(model, TOKENS), 0),
                        (layers(model, TOKENS) + channels(model, TOKENS, ignore=['0', '3']), 2)):
        names = [b.name for b in both.banks]
        assert sorted(names) == ['1.a', '2.a', 'branch 1', 'branch 2']
        starts = dict(zip(names, itertools.accumulate([0] + [b.n for b in both.banks])))
        for price, each in (weights, 1), (flops, 2):
            cost = both.cost(price)
            for state in itertools.product([0., 1.], repeat=8):
                z = torch.tensor(state)
                inside = [(z[starts[f'{k}.a']:][:3].sum()*z[starts[f'branch {k}']]*12).item() for k in (1, 2)]
                assert cost.left(z).item() == each*(36 + 12 + sum(inside))
                for j in range(8):
                    on, off = z.clone(), z.clone()
                    on[j], off[j] = 1, 0
                    assert cost.marginal(z)[j] == cost.left(on) - cost.left(off)


def test_the_landing_is_never_above_the_budget():
    "Whatever the presences are; and with a budget that pays for no branch none is left"
    both = channels(model := vit(), IMAGE) + layers(model, IMAGE)
    for found in both, layers(model, IMAGE):
        params = found.weights(model)
        groups = found.bind(Whole(list(params.values())), list(params), flops)
        least = found.cost(flops).left(torch.zeros(groups.n)).item()/groups.whole
        for seed in range(20):
            presence = torch.randn(groups.n, generator=torch.Generator().manual_seed(seed))
            budget = groups.whole*(least + (1 - least)*seed/20)
            groups.land_(presence, budget)
            assert found.cost(flops).left((presence >= 0).float()).item() <= budget
            if seed == 0 and found is not both: assert (presence < 0).all()


@pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step')
@pytest.mark.parametrize('make, example', [(vit, IMAGE), (lambda: resnet20(), torch.randn(2, 3, 16, 16))])
def test_pruned_and_compacted(make, example):
    "Channels and branches under one pressure: the smaller network is equal, and costs what the pruner said"
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), .05, momentum=.9)
    x, y = torch.randn(16, *example.shape[1:]), torch.arange(16) % 4
    groups = channels(model, example) + layers(model, example)
    cost = groups.cost(flops)
    most = 1 - cost.left(torch.zeros(cost.n)).item()/cost.whole
    pruner = Hyperflux(model, optimizer, sparsity=.7*most, steps=110, groups=groups, cost=flops, seed=0)
    for _ in range(110):
        optimizer.zero_grad(); nn.functional.cross_entropy(model(x), y).backward(); optimizer.step()
    pruner.detach()
    assert pruner.remaining <= (1 - .7*most)*pruner.groups.whole
    gone = [r['bank'] for r in pruner.groups.widths(pruner.groups.found(pruner.current()))
            if r['bank'].startswith('branch') and not r['open']]
    assert gone
    small, report = compact(model, example)
    assert [f"branch {r['name']}" for r in report.gone] == gone
    with torch.no_grad(): torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert flops_by_module(small, example.shape[1:])[''] <= pruner.remaining*(1 + 1e-9)
    assert all(not any(n in dict(small.named_parameters()) for n in r['parameters']) for r in report.gone)


class Odd(nn.Module):
    "One branch, of a kind"
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.norm = kind, nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6, bias=False)
        self.plain = nn.LayerNorm(6, elementwise_affine=False)
        if kind == 'frozen': self.b.bias.requires_grad_(False)
    def forward(self, x):
        y = self.a(x).relu()
        if self.kind == 'relu': return x + y
        if self.kind == 'shared': return self.b(x + self.b(y))
        if self.kind == 'frozen': return x + self.b(y)
        if self.kind == 'plain': return x + self.plain(y)
        if self.kind == 'computed': return x + nn.functional.linear(y, self.b.weight*2)
        if self.kind == 'read': return (x + (y := self.b(y)))*y
        if self.kind == 'shift': return x + (self.b(y) + 1)
        return self.a(x) + self.b(x)                                    # 'shortcut'


@pytest.mark.parametrize('kind, reason', [
    ('relu', 'a ends in relu'), ('shared', 'a ends in b.weight, which is used elsewhere too'),
    ('frozen', 'ends in b.bias, which is not trained'), ('plain', 'ends in layer_norm, which has no weights'),
    ('computed', 'ends in a weight that is computed'), ('read', 'is also read by others'), ('shift', 'ends in add'),
    ('shortcut', 'nothing with parameters is added to what it was computed from'),
])
def test_a_branch_that_cannot_go_is_refused_by_name(kind, reason):
    "With the reason"
    with pytest.raises(ValueError, match=f'no branch of this model can go: .*{reason}'): layers(Odd(kind), TOKENS)


def test_branches_are_chosen_by_their_weights():
    "Of all weights in a branch, all have to be meant"
    model = vit()
    def names(**how): return [b.name.removeprefix('branch ') for b in layers(model, IMAGE, **how).banks]
    assert names(targets='blocks.0') == ['blocks.0.attn', 'blocks.0.mlp']
    assert names(ignore=['blocks.0.mlp.fc1', 're:attn']) == ['blocks.1.mlp']
    with pytest.raises(ValueError, match='blocks.0.attn has blocks.0.attn.proj.weight, which was not chosen'):
        layers(model, IMAGE, targets='blocks.0.attn.qkv')


def test_inner_branches_are_taken_rather_than_outer_ones():
    "A long connection around many blocks stays, and its blocks may go"
    class Around(nn.Module):
        def __init__(self): super().__init__(); self.body, self.last = perceptron()[1:3], nn.Linear(6, 6)
        def forward(self, x): return x + self.last(self.body(x))
    assert [b.name for b in layers(Around(), TOKENS).banks] == ['branch body.1', 'branch body.2']


def test_parallel_branches_are_two():
    "Attention and perceptron read the same stream, and are added to one another first"
    class Both(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        def forward(self, x): return (self.a(x.tanh()) + self.b(x.tanh())) + x
    assert [b.name for b in layers(Both(), TOKENS).banks] == ['branch a', 'branch b']


def test_widths_in_multiples_go_with_branches():
    "Branches have no width, so multiples are for the channels; what is no branch on a shared weight is refused"
    model = perceptron()
    assert (layers(model, TOKENS) + channels(model, TOKENS, multiple=2)).multiple == 2
    with pytest.raises(ValueError, match='layers and layers both have gates on 1'):
        layers(model, TOKENS) + layers(model, TOKENS)
    tall = rows(model, TOKENS) + layers(model, TOKENS)
    assert tall.cost(flops).whole == layers(model, TOKENS).cost(flops).whole
    assert tall.cost(flops).left(torch.cat([torch.ones(tall.cost().n - 1), torch.zeros(1)])) == 2*(36 + 12 + 36)


def test_weights_that_two_branches_share_stay():
    "Operations go with each branch, but the shared weights are counted as long as one of them may be there"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 6)
        def forward(self, x):
            x = x + self.b(self.a(x).relu())
            return x + self.c(self.a(x).relu())
    found = layers(Tied(), TOKENS)
    assert found.cost(weights).left(torch.zeros(2)) == 36 and found.cost(flops).left(torch.zeros(2)) == 0
    assert found.cost(weights).whole == 3*36 and found.cost(flops).whole == 2*4*36
