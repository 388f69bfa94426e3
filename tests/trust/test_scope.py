"Kind 5: what is pruned by default, what stays dense, and that this is said. Kind 9: odd layers."
import copy

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune as torch_prune, spectral_norm, weight_norm

from hyperflux import Hyperflux, prunable
from hyperflux.rivals.scores import GMP
from hyperflux.rivals.imp import IMP
from tests.helpers import METHODS, mlp, nnz, said, train, x, y

quiet = pytest.mark.filterwarnings('ignore')


def sgd(model): return torch.optim.SGD(model.parameters(), lr=.1)
def gmp(model, **kw): return GMP(model, sgd(model), **dict(sparsity=.9, steps=60) | kw)
def notices(make): return [t for t in said(make) if 'dense' in t]


def run(model, opt, inputs, steps=60):
    for _ in range(steps):
        model.zero_grad()
        out = model(inputs)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()
        opt.step()


# Recurrent and bilinear layers are pruned by default

class Last(nn.Module):
    "A recurrent layer and a head"
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.proj_size or rnn.hidden_size*(1 + rnn.bidirectional), 3)
    def forward(self, x): return self.head(self.rnn(x)[0][:, -1])


@quiet
@pytest.mark.parametrize('kind', [GMP, Hyperflux])
@pytest.mark.parametrize('rnn', [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize('kw', [{}, dict(bidirectional=True)], ids=['one way', 'both ways'])
def test_recurrent(kind, rnn, kw):
    "All matrices of a recurrent network are pruned, exactly, and nothing is left to say"
    torch.manual_seed(0)
    model = Last(rnn(5, 8, batch_first=True, **kw))
    opt = sgd(model)
    pruners = []
    assert notices(lambda: pruners.append(kind(model, opt, sparsity=.8, steps=100))) == []
    p, = pruners
    assert p.d == sum(w.numel() for w in model.parameters() if w.ndim > 1)
    run(model, opt, torch.randn(6, 4, 5), 100)
    assert nnz(p) == p.keep


def test_cells_projections_bilinear():
    "Cells, projected LSTMs, bilinear and transposed layers"
    assert list(prunable(nn.ModuleList([nn.LSTMCell(2, 3), nn.GRUCell(2, 3), nn.RNNCell(2, 3)]))) == [f'{i}.weight_{k}'
        for i in range(3) for k in ('ih', 'hh')]
    assert 'weight_hr_l0' in prunable(nn.LSTM(3, 4, proj_size=2))
    assert list(prunable(nn.Sequential(nn.Bilinear(2, 3, 4), nn.ConvTranspose2d(2, 3, 2)))) == ['0.weight', '1.weight']


# Computed weights

def two(f):
    torch.manual_seed(0)
    return nn.Sequential(f(nn.Linear(20, 32)), nn.ReLU(), f(nn.Linear(32, 4)))


@quiet
@pytest.mark.parametrize('f', [parametrizations.spectral_norm, spectral_norm], ids=['parametrization', 'hook'])
@pytest.mark.parametrize('kind', [GMP, Hyperflux])
def test_spectral_norm(f, kind):
    "What spectral_norm computes has exactly the zeros asked for, in training and in evaluation"
    model = two(f)
    opt = sgd(model)
    p = kind(model, opt, sparsity=.9, steps=120)
    train(model, opt, 120)
    model.eval(); model(x)
    assert p.d == 768 and sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == p.keep == p.left


UNSOUND = dict(weight_norm=parametrizations.weight_norm, orthogonal=parametrizations.orthogonal,
               old_weight_norm=weight_norm,
               torch_prune=lambda l: torch_prune.l1_unstructured(l, 'weight', .2),
               own=lambda l: parametrize.register_parametrization(l, 'weight', Doubled()) or l,
               two=lambda l: parametrizations.weight_norm(parametrizations.spectral_norm(l)))


class Doubled(nn.Module):
    def forward(self, w): return 2*w


@quiet
@pytest.mark.parametrize('name', UNSOUND)
def test_weights_that_are_computed_otherwise(name):
    """One line names the matrix and the way out; choosing it names the reason; where nothing else is there, it is
    refused"""
    f = UNSOUND[name]
    mixed = nn.Sequential(f(nn.Linear(20, 32)), nn.ReLU(), nn.Linear(32, 4))
    text, = notices(lambda: gmp(mixed))
    assert '0.' in text and 'computed by' in text and ('remove_' in text or 'prune.remove' in text)
    assert '% of all' in text
    for target in '0', mixed[0], 're:^0\\.':
        with pytest.raises(ValueError, match='0.weight is computed by') as e: gmp(mixed, targets=target)
        assert "did you mean" not in str(e.value)
    with pytest.raises(ValueError, match='no prunable weight.*is computed by'): gmp(two(f))


@quiet
def test_folded_as_advised():
    "The way out works: remove the parametrisation, and all is pruned"
    model = two(parametrizations.weight_norm)
    for i in 0, 2: parametrize.remove_parametrizations(model[i], 'weight')
    opt = sgd(model)
    p = GMP(model, opt, sparsity=.9, steps=60)
    train(model, opt, 60)
    assert nnz([model[0].weight, model[2].weight]) == p.keep == 77


def test_named_parameter_is_taken():
    "A parameter by its full name is taken, whatever it is"
    model = two(parametrizations.weight_norm)
    assert gmp(model, targets='0.parametrizations.weight.original1').d == 640


# What stays dense is said

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.gate, self.scale = nn.Parameter(torch.randn(3, 20, 4)), nn.Linear(20,
            3), nn.Parameter(torch.ones(1, 4, 1))
    def forward(self, x): return torch.einsum('be,bi,eio->bo', self.gate(x).softmax(1), x, self.experts)


class Conv1D(nn.Module):
    "As in GPT-2: a linear layer of one's own"
    def __init__(self, i, o):
        super().__init__(); self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.zeros(o))
    def forward(self, x): return x@self.weight + self.bias


@pytest.mark.parametrize('build, says', [
    (Experts, ['1 matrix stays dense, 78.2% of all 307', 'experts']),
        (lambda: nn.Sequential(Conv1D(20, 32), nn.Linear(32, 4)), ['0.weight', '% of all']),
    (lambda: nn.ModuleList([nn.Embedding(50, 8), nn.Linear(8, 8)]), ['0.weight (an embedding)']),
    (lambda: nn.ModuleList([nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8)]), ['0.weight (frozen)', '44']),
    (lambda: nn.ModuleList([*(nn.Embedding(9, 4) for _ in range(9)), nn.Linear(4, 4)]),
     ['9 matrices stay dense', 'and 3 more'])])
def test_what_stays_dense(build, says):
    """One line at construction names the matrices that stay dense, and their share; the report says of what its total
    is a share"""
    model = build()
    text, = notices(lambda: gmp(model, sparsity=.5))
    for s in says: assert s in text, text
    assert 'scale' not in text and 'bias' not in text


@quiet
def test_report_says_of_what_it_is_a_share():
    "Also where it was wanted; and no word where all matrices are pruned"
    model = nn.Sequential(Conv1D(20, 32), nn.Linear(32, 4))
    p = gmp(model, ignore='0')
    assert "of the model's 804 parameters; 1 matrix is left dense" in str(p) and 'left dense' in p._repr_markdown_()
    assert 'dense' not in str(gmp(mlp()))


@pytest.mark.parametrize('how', [dict(ignore=['experts']), dict(targets=nn.Linear), dict(targets=['gate', 'experts'])])
def test_nothing_to_say(how):
    "What was ignored on purpose, or not among the targets, is not complained about"
    assert notices(lambda: gmp(Experts(), sparsity=.5, **how)) == []


def test_targets_with_something_left_out():
    "A target of which a part cannot be pruned"
    model = nn.Sequential(nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4)), nn.Linear(4, 4))
    text, = notices(lambda: gmp(model, sparsity=.5, targets='0'))
    assert '0.0.parametrizations' in text and '1.weight' not in text


# Odd layers

@quiet
@pytest.mark.parametrize('make', [m for _, m in METHODS], ids=[n for n, _ in METHODS])
def test_layer_without_weights(make):
    "A layer of no weights is in nobody's way, and the report prints"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.none, self.b = nn.Linear(20, 32), nn.Linear(0, 32, bias=False), nn.Linear(32, 4)
        def forward(self, x): return self.b((self.a(x) + self.none(x[:, :0])).relu())
    torch.manual_seed(0)
    model = Net()
    opt = sgd(model)
    p = make(model, opt, .9, 120)
    train(model, opt, 120)
    assert nnz([model.a.weight, model.b.weight]) == p.keep and 'none' not in str(p) and p._repr_markdown_()


@pytest.mark.parametrize('kind', [GMP, Hyperflux])
def test_complex_and_lazy(kind):
    "Complex weights and lazy layers are refused at construction, with what to do; done, it works"
    complex_ = nn.Sequential(nn.Linear(20, 8, dtype=torch.complex64), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="0.weight is complex.*ignore='0.weight'"):
        kind(complex_, sgd(complex_), sparsity=.5, steps=120)
    assert kind(complex_, sgd(complex_), sparsity=.5, steps=120, ignore='0').names == ['1.weight']
    lazy = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(ValueError, match='lazy.*run the model once'): kind(lazy, sgd(mlp()), sparsity=.5, steps=120)
    lazy(x)
    assert kind(lazy, sgd(lazy), sparsity=.5, steps=120).d == 20*16 + 16*4


@quiet
def test_extra_state_under_imp():
    "Modules with extra state are rewound, and keep it"
    class Own(nn.Linear):
        rate = 0.
        def get_extra_state(self): return dict(rate=self.rate)
        def set_extra_state(self, state): self.rate = state['rate']
    torch.manual_seed(0)
    model = nn.Sequential(Own(20, 32), nn.ReLU(), nn.Linear(32, 4))
    model[0].rate = .3
    opt = sgd(model)
    p = IMP(model, opt, sparsity=.5, steps=60, levels=2)
    train(model, opt, 60)
    assert nnz(p) == p.keep and model[0].rate == .3


class Pair(nn.Module):
    def __init__(self, online, mean): super().__init__(); self.online, self.mean = online, mean


@pytest.mark.parametrize('other, says', [
    (lambda m: Pair(m, copy.deepcopy(m)), 'no parameter named 0.weight.*it has them inside: give .online or .mean'),
    (lambda m: nn.Linear(3, 3), 'no parameter named 0.weight of shape \\(32, 20\\); it has weight, bias'),
        (lambda m: nn.Sequential(nn.Linear(20, 31), nn.ReLU(), nn.Linear(31, 4)), 'of shape')])
def test_mask_for_another_model(other, says):
    "apply_mask() of what nests the model, or is another: the names that were looked for, and what to give"
    model = mlp()
    p = GMP(model, sgd(model), sparsity=.5, steps=60)
    with pytest.raises(ValueError, match=says): p.apply_mask(other(mlp()))
    p.apply_mask(nn.DataParallel(mlp()))


@quiet
def test_scalar_like_shapes():
    "Weights of one row, of one column and of one number"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 1), nn.Linear(1, 1), nn.Linear(1, 4))
    opt = sgd(model)
    p = GMP(model, opt, sparsity=.6, steps=60)
    for _ in range(60): opt.zero_grad(); F.cross_entropy(model(x), y).backward(); opt.step()
    assert nnz(p) == p.keep == 10 and '1×1' in str(p)
