"Features of the input: found in networks that nobody here wrote, at their price; taken out, or refused"
import pytest, timm, torch
from torch import nn

from hyperflux import Hyperflux, channels, features, flops
from hyperflux.deploy import compact, load_network, save_network
from hyperflux.deploy.training import carry
from hyperflux.lab.models import lenet5, lenet300, resnet20, vit_mini
from hyperflux.rivals.torch_pruning import TorchPruned
from hyperflux.structure import Latency, flops_by_module
from hyperflux.study.config import Config

pytestmark = pytest.mark.usefixtures('one_thread')


class Two(nn.Module):
    "Two layers read the input, one of them a part of it first"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 2)
    def forward(self, x): return self.out(self.a(x).relu() + self.b(x.transpose(0, 1).transpose(0, 1)).tanh())

class Again(nn.Module):
    "A layer reads the input, and then what another has made of it"
    def __init__(self):
        super().__init__()
        self.a, self.back, self.out = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 2)
    def forward(self, x): return self.out(self.a(self.back(self.a(x).relu())))

class Backwards(Again):
    "The other way round"
    def forward(self, x): return self.out(self.a(self.back(self.out.weight[:, :4].sum(0) + x[:, :4])) + self.a(x))

class Called(nn.Module):
    "A function is called with the weight of a layer"
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(6, 4), nn.Linear(4, 2)
    def forward(self, x): return self.out(nn.functional.linear(x, self.a.weight).relu())

class Turned(nn.Linear):
    "A layer that does something else with its input first"
    def forward(self, x): return super().forward(x.flatten(1))

class Attention(nn.Module):
    "A module with three inputs computes with the weight"
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.MultiheadAttention(6, 2), nn.Linear(6, 2)
    def forward(self, x): return self.out(self.a(x, x, x, need_weights=False)[0])

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight = self.a.weight
    def forward(self, x): return self.b(self.a(x).relu())

ROWS, PICTURE = torch.randn(3, 6), torch.randn(2, 3, 32, 32)
FOUND = {   # → model, example, features by layer
    'LeNet-300': lambda: (lenet300(), torch.randn(2, 1, 28, 28), {'1': 784}),
    'two readers': lambda: (Two(), ROWS, {'a': 6, 'b': 6}),
    'one layer': lambda: (nn.Linear(6, 2), ROWS, {'the model': 6}),
    'bands of a picture': lambda: (resnet20(), PICTURE, {'conv1': 3}),
    'a sequence': lambda: (nn.Sequential(nn.Conv1d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)),
                           torch.randn(2, 5, 8), {'0': 5}),
    'a transposed convolution': lambda: (nn.Sequential(nn.ConvTranspose2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)),
                                         torch.randn(2, 5, 8, 8), {'0': 5}),
    'LeNet-5': lambda: (lenet5(), torch.randn(2, 1, 28, 28), {'0': 1}),
    'patches': lambda: (vit_mini(), torch.randn(2, 1, 28, 28), {'conv_proj': 1}),
    'timm resnet': lambda: (timm.create_model('test_resnet'), PICTURE, {'conv1.0': 3}),
}


@pytest.mark.parametrize('name', FOUND)
def test_features_are_found_and_go(name):
    "A gate each, at its price; the small network is the masked one, and takes the same input"
    torch.manual_seed(0)
    model, x, expected = FOUND[name]()
    found = features(model.eval(), x)
    assert {b.name.removeprefix('input of '): b.n for b in found.banks} == expected
    gates, start = torch.ones(sum(expected.values())), 0
    with torch.no_grad():
        for member, n in zip(found.members, expected.values()):
            gates[start:start + n][torch.randperm(n)[n//2 + (n == 1):]] = 0
            p = model.get_parameter(member.name)
            p *= torch.cat([gates, torch.ones(1)])[member.index]
            start += n
    small, report = compact(model, x, features=True)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    share = flops_by_module(small, example=(x,))['']/len(x)/found.cost(flops).left(gates)
    assert share == 1 or share < 1 and 'resnet' in name                 # whose last norms are made with zeros
    assert sum(map(len, report.picked.values())) == gates.sum() or gates.all()
    assert not compact(model, x)[1].picked                              # unless it was asked for, all are read


@pytest.mark.parametrize('model, why', [(Again(), 'also reads the input'), (Backwards(), 'input of the network'),
    (Called(), 'input of the network'), (Attention().eval(), 'input of the network'), (nn.Sequential(Turned(6, 2)), 'input of the network'),
    (Tied(), 'also known by another name'), (nn.Conv1d(3, 6, 1, groups=3), 'read by conv1d'),
    (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), 'of an operation that is not known')])
def test_what_needs_all_of_its_input(model, why):
    x = torch.randn(2, 3, 4) if isinstance(model, nn.Conv1d) else ROWS
    with pytest.raises(ValueError, match=f'no feature of this model can go: .*{why}'): features(model, x)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p[:, ::2] = 0
    before = {n for n, _ in model.named_parameters()}
    small, report = compact(model, x, features=True)                    # takes out what it can, and is right
    assert not report.picked and before == {n for n, _ in small.named_parameters()}


def test_a_run_reaches_its_budget_and_its_optimiser_goes_on(tmp_path):
    "With channels, trained; the small network costs what was said, is saved, and goes on like the masked one"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(64, 6, 6).double()
    y, opt = x[:, 0, :3].argmax(1), torch.optim.Adam(model.parameters(), 1e-2)
    p = Hyperflux(model, opt, sparsity=.8, steps=330, groups=features(model, x) + channels(model, x), cost=flops)
    def steps(net, opt, n):
        for _ in range(n):
            opt.zero_grad(); nn.functional.cross_entropy(net(x), y).backward(); opt.step()
    steps(model, opt, 300)
    small, report = compact(model, x, features=True)
    assert flops_by_module(small, example=(x,))['']/len(x) == p.groups.left(p.gate) <= p.budget
    save_network(small, x, tmp_path/'net.safetensors')
    torch.testing.assert_close(load_network(tmp_path/'net.safetensors')(x), model(x))
    after = carry(opt, model, small, report)
    steps(small.train(), after, 20), steps(model, opt, 20)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-7, atol=1e-7)
    assert compact(small, x, features=True)[1].after == report.after    # once is enough


def test_a_time_is_not_known(one_thread):
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 6)
    opt, price = torch.optim.SGD(model.parameters(), .1), Latency(model, x, networks=2, sizes=2)
    for groups in features(model, x), channels(model, x) + features(model, x):
        with pytest.raises(ValueError, match='picked out of the input.*cost=flops'):
            Hyperflux(model, opt, sparsity=.5, steps=300, groups=groups, cost=price)
    with pytest.raises(ValueError, match='groups=channels.features pick features out'):
        Config(groups='channels+features', cost='latency')


def test_not_for_torch_pruning():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 6)
    opt = torch.optim.SGD(model.parameters(), .1)
    both = features(model, x) + channels(model, x)
    with pytest.raises(ValueError, match='by their biases and norms, and input of 0 has neither'):
        TorchPruned(model, opt, sparsity=.5, steps=10, groups=both, cost=flops, example=x)
