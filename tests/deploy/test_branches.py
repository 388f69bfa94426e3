"Branches that are gone: taken out of networks that nobody here wrote, and what is left saves, exports and trains"
import copy

import pytest, timm, torch
from torch import nn

from hyperflux.deploy import carry, compact, export_onnx, load_network, save_network
from hyperflux.deploy.branches import Gone
from hyperflux.structure import flops, layers
from hyperflux.structure.channels import totals
from tests.structure.test_heads import layer, outputs
from tests.structure.test_layers import NETWORKS, TOKENS, Block, vit

STREAM = torch.randn(2, 5, 24)


def without(model, example, gates): # → operations that are left
    "Sets the ends of branches to zero"
    groups, own = layers(model, example), dict(model.named_parameters())
    gates = torch.tensor(gates) if isinstance(gates, list) else gates(len(groups.banks))
    with torch.no_grad():
        for m in groups.members: own[m.name].mul_(gates[m.index])
    return groups.cost(flops).left(gates).item()

def every_other(n): return (torch.arange(n) % 2).float()

def filled(model):
    "Biases of zero would hide an error"
    for p in model.parameters():
        if p.ndim == 1: nn.init.normal_(p, std=.3)
    return model.eval()


@pytest.mark.parametrize('name', NETWORKS)
def test_every_other_branch_is_taken_out(name):
    "Equal outputs, fewer parameters, and as many operations as the gates said"
    torch.manual_seed(0)
    model, example, names, _ = NETWORKS[name]()
    left = without(filled(model), example, every_other)
    small, report = compact(model, example)
    assert [r['name'] for r in report.gone] == names[::2] and not report.left
    torch.testing.assert_close(outputs(small, example), outputs(model, example), rtol=1e-4, atol=1e-6)
    assert totals(small, example)['flops'] == left
    lost = {n for r in report.gone for n in r['parameters']}
    assert lost and lost == set(dict(model.named_parameters())) - set(dict(small.named_parameters()))
    text = str(report)
    assert 'Branches that are gone: ' + ', '.join(names[::2]) in text and ' gone ' in text
    assert report.after < report.before


@pytest.mark.parametrize('name', ['vit_mini', 'timm vit', 'timm convnext', 'Llama'])
def test_a_block_without_branches_is_one_module(name):
    "Where nothing but the stream is left of a block, the block itself is gone"
    torch.manual_seed(0)
    model, example, _, _ = NETWORKS[name]()
    without(filled(model), example, torch.zeros)
    small, report = compact(model, example)
    blocks = {p for r in report.gone for p in r['modules']}
    assert all(isinstance(small.get_submodule(p), Gone) for p in blocks)
    assert len(list(small.modules())) < len(list(model.modules()))/2
    torch.testing.assert_close(outputs(small, example), outputs(model, example), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('gates', [[0., 1, 1, 1], [1., 0, 1, 1], [0., 0, 0, 0]])
def test_an_encoder_of_pytorch_still_runs(first, gates):
    "Its short cut asks layers for weights that are no longer there: in and out of training, with masks, as before"
    torch.manual_seed(0)
    model = filled(nn.TransformerEncoder(layer(4, batch_first=True, norm_first=first, dropout=0.), 2,
                                         enable_nested_tensor=False))
    without(model, STREAM, gates)
    small, report = compact(model, STREAM)
    assert len(report.gone) == gates.count(0) and not report.left
    late = torch.tensor([[False]*5, [False]*3 + [True]*2])
    for training in False, True:
        a, b = (m.train(training)(STREAM, src_key_padding_mask=late)[~late] for m in (model, small))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_channels_go_from_what_is_left():
    "One branch is gone, of another half of the neurons, and zeros do not hide the rest from the walk"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Block(hidden=8), Block(hidden=8), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[1].b.weight.zero_(); model[1].b.bias.zero_()
        model[2].b.weight[:, ::2] = 0
        model[2].a.weight[:, 4] = 0; model[3].weight[:, 4] = 0          # a channel of the stream that nobody reads
    small, report = compact(model, TOKENS)
    assert [r['name'] for r in report.gone] == ['1']
    assert small[0].out_features == 5 and small[2].a.weight.shape == (4, 5) and small[2].b.weight.shape == (5, 4)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-6)


def test_a_branch_that_python_needs_stays_and_is_reported():
    "The model asks a layer for its weight: as narrow as can be, with the reason, and equal"
    class Asks(Block):
        def forward(self, x): return super().forward(x)*min(1, len(self.a.weight))
    model = nn.Sequential(nn.Linear(6, 6), Asks(), Block(), nn.Linear(6, 2)).eval()
    without(model, TOKENS, [0., 0.])
    small, report = compact(model, TOKENS)
    assert [r['name'] for r in report.gone] == ['2'] and small[1].a.out_features == 1
    row = next(r for r in report.left if r['name'] == '1')
    assert row['channels'] == 6 and 'is in a branch that is zero and cannot go: TypeError' in row['why']
    torch.testing.assert_close(small(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-6)


def small_vit(gates):
    "Compacted, and its example"
    torch.manual_seed(0)
    model, example = filled(vit()), torch.randn(2, 3, 32, 32)
    without(model, example, gates)
    return compact(model, example)[0], example


@pytest.mark.parametrize('gates', [[0., 1, 1, 0], [1., 1, 0, 0]])
def test_the_small_network_is_saved_and_loaded_without_its_class(gates, tmp_path):
    "One file, for any batch"
    small, x = small_vit(gates)
    assert save_network(small, x, tmp_path/'small.safetensors')['batch'] is None
    again, more = load_network(tmp_path/'small.safetensors'), torch.randn(5, 3, 32, 32)
    with torch.no_grad(): torch.testing.assert_close(again(more), small(more), rtol=1e-4, atol=1e-5)


def test_the_small_network_is_exported_to_onnx(tmp_path):
    "ONNX Runtime gives what PyTorch gives"
    for package in 'onnx', 'onnxscript', 'onnxruntime': pytest.importorskip(package)
    small, x = small_vit([0., 1, 1, 0])
    assert export_onnx(small, x, tmp_path/'small.onnx')['error'] < 1e-4


def test_the_small_network_trains_and_keeps_its_state():
    "Gradients for all that is left; a state that another copy of it takes"
    small, x = small_vit([0., 1, 1, 0])
    small.train()
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    other, _ = small_vit([0., 1, 1, 0])
    other.load_state_dict(small.state_dict())


def test_the_model_itself_is_left_as_it_is():
    "Its modules, hooks and weights"
    model, x = filled(vit()), torch.randn(2, 3, 32, 32)
    without(model, x, [0., 1, 1, 0])
    before, modules = {n: p.clone() for n, p in model.named_parameters()}, list(model.modules())
    compact(model, x)
    assert list(model.modules()) == modules and not any(m._forward_hooks for m in modules)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_optimiser_goes_on_without_the_parameters_that_are_gone():
    "What it remembers of all others is carried over, and the next steps are those of the masked network"
    torch.manual_seed(0)
    model, x = filled(vit()).double(), torch.randn(2, 3, 32, 32).double()
    without(model, x, [0., 1, 1, 0])
    optimizer = torch.optim.SGD(model.parameters(), .01, momentum=.9)
    for p in model.parameters(): optimizer.state[p]['momentum_buffer'] = .1*torch.ones_like(p)
    small, report = compact(model, x)
    after = carry(optimizer, model, small, report)
    assert sum(len(g['params']) for g in after.param_groups) == len(list(small.parameters())) == len(after.state)
    for net, opt in (model, optimizer), (small, after):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()
    theirs = dict(model.named_parameters())
    for name, p in small.named_parameters():
        if p.shape == theirs[name].shape: torch.testing.assert_close(p, theirs[name])


def test_branches_that_give_less_than_they_get():
    "In cait, one token looks at all others: what comes out of its attention is shorter than what goes in"
    torch.manual_seed(0)
    model = timm.create_model('cait_xxs24_224', img_size=64, embed_dim=24, depth=1, num_heads=2, num_classes=4)
    x = torch.randn(2, 3, 64, 64)
    left = without(filled(model), x, torch.zeros)
    small, report = compact(model, x)
    assert len(report.gone) == 6 and not report.left and totals(small, x)['flops'] == left
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-6)
    again = copy.deepcopy(small).train()
    nn.functional.cross_entropy(again(x), torch.arange(2)).backward()
