"""The cost in bytes: a network that keeps some layers in half precision."""
import pytest, torch, torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux, blocks, channels, nm, single, weights
from hyperflux.structure import Term, kernels, rows
from hyperflux.structure.cost import nbytes

pytestmark = pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step')


class Mixed(nn.Module):
    "4-3-5-2: the layer in the middle is in bfloat16"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 5).bfloat16(), nn.Linear(5, 2)
    def forward(self, x): return self.c(self.b(self.a(x).relu().bfloat16()).float().relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Mixed()


def open_but(n, *shut):
    gates = torch.ones(n)
    gates[list(shut)] = 0
    return gates


def test_channels_of_two_dtypes_cost_what_their_weights_take(net):
    "Four bytes for each weight of a and c, two for each of b: with one neuron of three and two of five shut"
    groups = channels(net, torch.randn(2, 4))
    cost = groups.cost(nbytes)
    assert [(b.name, b.n) for b in groups.banks] == [('a', 3), ('b', 5)]
    assert (cost.unit, cost.whole) == ('bytes', 4*12 + 2*15 + 4*10)
    assert cost.whole == sum(p.nbytes for p in net.parameters() if p.ndim == 2)
    assert cost.left(open_but(8, 1, 3, 4)).item() == 4*4*2 + 2*2*3 + 4*3*2
    assert cost.marginal(torch.ones(8)).tolist() == [4*4 + 2*5]*3 + [2*3 + 4*2]*5


def test_bytes_of_one_dtype_are_its_size_times_the_weights():
    "In float64 eight, at any gates; what hangs on no gate is in it"
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.Flatten(),
                        nn.Linear(16, 3)).double()
    groups = channels(net, torch.randn(2, 3, 6, 6, dtype=torch.float64), ignore='0')
    by, n = groups.cost(nbytes), groups.cost().n
    assert by.whole == 8*(6*27 + 5*54 + 4*5 + 3*16) and n == 9
    for k in range(20):
        gates = (torch.rand(n, generator=torch.Generator().manual_seed(k)) < .5).float()
        assert by.left(gates).item() == 8*groups.cost(weights).left(gates).item()


def test_tied_weights_are_in_memory_once():
    "A table of embeddings that is also the head"
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.up, self.down = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4)
            self.head = nn.Linear(4, 7)
            self.head.weight = self.emb.weight
        def forward(self, i): return self.head(self.down(self.up(self.emb(i)).relu()))
    net = Tied().bfloat16()
    groups = channels(net, torch.zeros(2, 3, dtype=torch.long))
    assert groups.cost(nbytes).whole == 2*groups.cost(weights).whole


@pytest.mark.parametrize('form, least', [(rows, 2*3), (lambda m: blocks(m, 1, 2), 2*1)], ids=['rows', 'blocks'])
def test_forms_of_two_dtypes(net, form, least):
    "Rows and tiles take what their members take"
    cost = form(net).cost(nbytes)
    assert cost.whole == 4*12 + 2*15 + 4*10
    each = cost.marginal(torch.ones(cost.n))
    assert each.sum().item() == cost.whole and each.min() == least


def test_kernels_in_half_precision():
    "Nine weights of two bytes"
    cost = kernels(nn.Sequential(nn.Conv2d(2, 3, 3)).half()).cost(nbytes)
    assert cost.marginal(torch.ones(6)).tolist() == [18.]*6


def train(net, pruner, opt, steps):
    x = torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()


def test_a_budget_in_bytes_is_kept(net):
    "Half of the bytes of a network of two dtypes, the most that fits"
    opt = torch.optim.SGD(net.parameters(), .05)
    groups = channels(net, torch.randn(2, 4))
    pruner = Hyperflux(net, opt, sparsity=.5, steps=100, groups=groups, cost=nbytes)
    train(net, pruner, opt, 100)
    cost, gates = groups.cost(nbytes), pruner.gate
    assert cost.left(gates).item() <= .5*cost.whole
    assert all(cost.left(gates).item() + more > .5*cost.whole for more in cost.marginal(gates)[gates == 0].tolist())
    assert 'bytes' in str(pruner)


def test_single_weights_in_bytes(net):
    "Two weights of bfloat16 for one of float32"
    opt = torch.optim.SGD(net.parameters(), .05)
    pruner = Hyperflux(net, opt, sparsity=.5, steps=100, groups=single(net), cost=nbytes)
    train(net, pruner, opt, 100)
    left = [int((w.weight != 0).sum()) for w in (net.a, net.b, net.c)]
    assert 59 - 2 < 4*left[0] + 2*left[1] + 4*left[2] <= 59


def test_a_term_without_a_dtype_is_refused(net):
    "Groups by hand, which do not say what a weight takes"
    groups = channels(net, torch.randn(2, 4))
    groups.terms[1] = Term(*groups.terms[1][:5])
    with pytest.raises(ValueError, match='the dtype of b.weight is not known.*itemsize='): groups.cost(nbytes)


def test_a_pattern_has_no_choice_between_bytes(net):
    "2:4 leaves as many of each layer whatever they cost"
    opt = torch.optim.SGD(net.parameters(), .05)
    with pytest.raises(ValueError, match='cost has no meaning'):
        Hyperflux(net, opt, steps=200, groups=nm(net, 2, 4, targets='a'), cost=nbytes)
