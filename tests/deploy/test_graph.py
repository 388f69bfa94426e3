"Numbers of channels that stand in the code, and channels in pieces: cut where they are gated, at the cost said"
import pytest, torch, torch.nn.functional as F
from timm.layers import Attention
from torch import nn

from hyperflux import channels, flops
from hyperflux.deploy import compact, load_network, save_network
from hyperflux.deploy.training import carry
from hyperflux.structure import Channels, flops_by_module

pytestmark = pytest.mark.usefixtures('one_thread')
PICTURE, ROWS, WORDS = torch.randn(4, 1, 28, 28), torch.randn(4, 12), torch.randn(4, 5, 12)


class Layers(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items(): setattr(self, name, layer)

class Viewed(Layers):
    def forward(self, x):
        x = F.max_pool2d(self.two(F.max_pool2d(self.one(x), 2).relu()), 2).relu()
        return self.last(self.three(x.view(-1, 320)).relu())

class Sliced(Layers):
    "The first eight rows and the last eight, unequal friends"
    def forward(self, x):
        x = self.one(x).relu()
        return self.last(torch.cat([self.two(x[:, :8]), x[:, -8:]], 1))

class Halves(Layers):
    "Half of the channels go past the layer that the others go through, as in ShuffleNet"
    def forward(self, x):
        a, b = self.one(x).relu().chunk(2, dim=1)
        return self.last(torch.cat([a, self.two(b).relu()], 1).mean((2, 3)))

class Thirds(Layers):
    def forward(self, x):
        a, b, c = self.one(x).split([4, 5, 6], dim=-1)
        return self.last(torch.cat([self.two(a).relu(), self.three(c).relu(), b], -1))

class Gated(Layers):
    def forward(self, x): return self.last(F.glu(self.one(x), dim=-1))

class Sigmoid(Layers):
    "The same by hand, with a number in it"
    def forward(self, x):
        x = self.one(x)
        return self.last(x[..., :8]*x[..., 8:].sigmoid())

class Depthwise(Layers):
    "A grouped convolution, called with its number of groups"
    def forward(self, x):
        x = F.conv2d(self.one(x).relu(), self.two.weight, None, 1, 1, 1, 8)
        return self.last(x.relu().amax((2, 3)).view(-1, 8))

class Heads(Layers):
    "Queries, keys and values in one, and apart again; the class is in no list, so that heads stay"
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.view(x.shape[0], 5, 3, 4).transpose(1, 2) for t in (q, k, v))
        return self.last(self.mlp(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 12)).relu())

class Known(Layers):
    "An attention that is known, behind a number"
    def forward(self, x): return self.last(self.att(self.mlp(self.one(x).relu().view(-1, 5, 16))))

class Two(Layers):
    "Two inputs, one by name"
    def forward(self, x, *, more): return self.last((self.one(x) + self.two(more)).relu().view(-1, 2, 4)[:, 1])


def viewed():
    return Viewed(one=nn.Conv2d(1, 10, 5), two=nn.Conv2d(10, 20, 5), three=nn.Linear(320, 50), last=nn.Linear(50, 10))

NETWORKS = { # → network, example, whether it becomes a graph; None: as random gates have it
    'view': lambda: (viewed(), PICTURE, True),
    'slices': lambda: (Sliced(one=nn.Linear(12, 16), two=nn.Linear(8, 6), last=nn.Linear(14, 3)), ROWS, True),
    'halves': lambda: (Halves(one=nn.Conv2d(1, 8, 3), two=nn.Conv2d(4, 6, 3, padding=1),
                             last=nn.Linear(10, 3)), PICTURE, None),
    'split': lambda: (Thirds(one=nn.Linear(12, 15), two=nn.Linear(4, 6), three=nn.Linear(6, 6), last=nn.Linear(17, 3)),
                      ROWS, True),
    'glu': lambda: (Gated(one=nn.Linear(12, 16), last=nn.Linear(8, 3)), WORDS, False),
    'glu by hand': lambda: (Sigmoid(one=nn.Linear(12, 16), last=nn.Linear(8, 3)), WORDS, True),
    'groups': lambda: (Depthwise(one=nn.Conv2d(1, 8, 3), two=nn.Conv2d(8, 8, 3, groups=8, bias=False),
                                 last=nn.Linear(8, 3)), PICTURE, True),
    'heads of a known attention': lambda: (Known(one=nn.Linear(12, 16), mlp=nn.Linear(16, 12), att=Attention(12, 3),
                                                 last=nn.Linear(12, 3)), WORDS, True),
    'heads': lambda: (Heads(qkv=nn.Linear(12, 36), mlp=nn.Linear(12, 16), last=nn.Linear(16, 3)), WORDS, False),
}

def half(model, example, seed=0):
    "Gates of all channels, half of them shut, and the model pruned by them"
    found = channels(model, example)
    gates, start = torch.ones(sum(b.n for b in found.banks)), 0
    g = torch.Generator().manual_seed(seed)
    for b in found.banks:
        gates[start:start + b.n][torch.randperm(b.n, generator=g)[:b.n//2]] = 0
        start += b.n
    with torch.no_grad():
        for m in found.members: model.get_parameter(m.name).mul_(torch.cat([gates, torch.ones(1)])[m.index])
    return found, gates

def operations(model, example): return flops_by_module(model, example=(example,))['']/len(example)


@pytest.mark.parametrize('name', NETWORKS)
def test_the_small_network_costs_what_was_said(name, tmp_path):
    "And computes the same, for batches of other sizes too; it is saved, and named as before"
    torch.manual_seed(0)
    model, x, graph = NETWORKS[name]()
    model.eval()
    found, gates = half(model, x)
    small, report = compact(model, x)
    assert report.graph == graph or graph is None
    assert report.views and report.text().count('exported graph') == report.graph
    assert operations(small, x) <= found.cost(flops).left(gates) < operations(model, x)
    if name != 'heads': assert operations(small, x) == found.cost(flops).left(gates)
    other = torch.randn(7, *x.shape[1:])
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]
    save_network(small, x, tmp_path/'net.safetensors')
    torch.testing.assert_close(load_network(tmp_path/'net.safetensors')(other), small(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('one', [False, True])
def test_inputs_by_name(one):
    "And an example of one sample, for batches of any size"
    torch.manual_seed(0)
    model = Two(one=nn.Linear(3, 8), two=nn.Linear(3, 8), last=nn.Linear(4, 2)).eval()
    ch = Channels(model, dict(x=torch.randn(2, 3), more=torch.randn(2, 3)))
    assert any('view' in why for _, why in ch.pins)                     # a split of channels that are no heads
    net = viewed().eval()
    found, gates = half(net, PICTURE[:1])
    small, report = compact(net, PICTURE[:1] if one else dict(x=PICTURE))
    assert report.graph and operations(small, PICTURE) == found.cost(flops).left(gates)
    torch.testing.assert_close(small(x=PICTURE), net(PICTURE), rtol=1e-4, atol=1e-5)


def test_training_goes_on():
    "An optimiser's memory goes along; a graph can be trained, in evaluation mode"
    torch.manual_seed(0)
    net, y = viewed().double().eval(), torch.arange(4)
    x = PICTURE.double()
    half(net, x)
    opt = torch.optim.SGD(net.parameters(), .01, momentum=.9)
    masks = {n: p != 0 for n, p in net.named_parameters()}
    def step(net, opt, masks=()):
        opt.zero_grad(); F.cross_entropy(net(x), y).backward()
        for n in masks: net.get_parameter(n).grad *= masks[n]
        opt.step()
    for _ in range(3): step(net, opt, masks)
    small, report = compact(net, x)
    after = carry(opt, net, small, report)
    for _ in range(5): step(net, opt, masks), step(small.train(), after)
    assert report.graph
    torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)


def test_a_network_that_magnifies_rounding():
    "The graph is compared in double precision, too"
    class Chaos(Layers):
        def forward(self, x):
            x = self.last(self.one(x).relu().view(-1, 8)).sigmoid()
            for _ in range(14): x = 4*x*(1 - x)
            return x
    torch.manual_seed(0)
    net = Chaos(one=nn.Linear(12, 8), last=nn.Linear(8, 2)).eval()
    half(net, ROWS)
    small, report = compact(net, ROWS)
    assert report.graph and len(small.one.weight) == 4
    assert report.gap < 1e-9 and (report.rounding is None or report.rounding > 1e-5)
