"""sparsify on whole models, with the clock replaced so that any kernel can be made the winner; the kernels themselves
are tested in their notebook."""
import copy, importlib, io, json, shutil

import pytest
import torch
from torch import nn

from hyperflux.deploy import kernels as K
from hyperflux.deploy.branches import relative_gap
from hyperflux.lab.models import lenet300, resnet18, vgg19
from hyperflux.deploy.kernels import SparseChain, SparseConv2d, SparseLinear
from hyperflux.deploy.candidates import Bfloat16
from hyperflux.deploy.sparsify import sparsify
from tests.helpers import program

S = importlib.import_module('hyperflux.deploy.sparsify')       # the package's own `sparsify` is the function


pytestmark = pytest.mark.usefixtures('one_thread')


def clock(monkeypatch, *winners):
    "A race that each name with one of these words in it wins, and dense never"
    def race(runs, *args, **kwargs):
        for f in runs.values(): f()
        return {k: next((.1 + .1*i for i, w in enumerate(winners) if w in k), 1. if k == 'dense' else .9) for k in runs}
    monkeypatch.setattr(S, 'race', race)


def pruned(model, density=.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                m.weight *= (torch.rand(m.weight.shape, generator=g) < density)*density**-.5
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.running_mean.normal_(0, .1, generator=g); m.running_var.uniform_(.5, 1.5, generator=g)
    return model.eval()


def net():
    torch.manual_seed(0)
    return pruned(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                                nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.GELU(), nn.MaxPool2d(2),
                                nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 5)), .3)


def sparse_layers(model): return [m for m in model.modules() if isinstance(m, SparseConv2d)]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3,
            padding='same')
        self.again, self.head = self.shared, nn.Linear(4, 3)
    def forward(self, x):
        x = x + self.b(self.a(x).relu_())
        return self.head(torch.cat([self.again(x), self.shared(x)]).mean((2, 3))), {'x': x}


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.low, self.up, self.out = nn.Conv2d(1, 6, 3, 2, 1), nn.Sequential(nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)), nn.ConvTranspose2d(6, 6, 2, 2), nn.Conv2d(7, 1, 1)
    def forward(self, x): return self.out(torch.cat([x, self.up(self.low(self.down(x).relu()))], 1))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.head = nn.Conv1d(3, 8, 5, padding=2), nn.LSTM(8, 8,
            batch_first=True), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    def forward(self, x): return self.head(self.rnn(self.conv(x).transpose(1, 2))[0])


MODELS = dict(net=(net, (3, 10, 10)), lenet=(lenet300, (1, 28, 28)), resnet=(resnet18, (3, 32, 32)),
              vgg=(vgg19, (3, 32, 32)), residual=(Residual, (4, 7, 6)), unet=(UNet, (1, 8, 8)),
              sequence=(Sequence, (3, 9)))


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('winner', ['csr pixel', 'bag pixel', 'csr row', 'bag row', 'csr image', 'bag image', 'chain'])
@pytest.mark.parametrize('name', ['net', 'residual', 'unet', 'sequence'])
def test_equal_with_any_kernel(monkeypatch, name, winner, batch):
    # csr pixel where that form is not on offer
    clock(monkeypatch, winner, 'sparse', 'csr pixel')
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = pruned(make(), .3), torch.randn(batch, *shape)
    before = copy.deepcopy(model.state_dict())
    new, report = sparsify(model, x)
    assert len(sparse_layers(new)) >= 3 and report.gap <= 1e-5 and report.ratio > 1
    assert winner.split()[-1] in ''.join(r['choice'] for r in report.layers) or (winner == 'chain'
                                                                                 and name == 'residual')
    with torch.no_grad():
        for n in (batch, 2):                                                       # another batch works too
            x = torch.randn(n, *shape)
            assert relative_gap(model(x), new(x)) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert not any(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize('name', ['lenet', 'resnet', 'vgg'])
def test_with_the_clock(name):
    "Whatever this machine chooses: equal, and the report agrees with the model"
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = pruned(make(), .02), torch.randn(4, *shape)
    new, report = sparsify(model, x, rounds=3)
    with torch.no_grad(): assert relative_gap(model(x), new(x)) < 1e-5
    chosen = [r for r in report.layers if r['choice'] != 'dense']
    assert len(sparse_layers(new)) == len(chosen)
    assert new is model or (report.sparse < report.dense and report.ratio > 1)
    for text in (str(report), report._repr_markdown_()):
        assert all(r['name'] in text for r in report.layers) and '1 thread, times in ms' in text


def test_layers_that_stay_are_named(monkeypatch):
    clock(monkeypatch, 'csr pixel', 'sparse')
    class Own(nn.Linear): pass
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.hooked, self.never, self.ring, self.two = Own(4, 4), nn.Linear(4, 4), nn.Linear(4,
                4), nn.Conv1d(4, 4, 3, padding=1, padding_mode='circular'), nn.Conv1d(4, 4, 1)
            self.good, self.reads = nn.Linear(4, 4), nn.Linear(4, 4)
            self.hooked.register_forward_hook(lambda m, a, out: out*2)
        def forward(self, x):
            x = self.two(x) + self.two(x[..., :4]).mean(-1, keepdim=True)
            x = self.ring(x).mean(-1)
            x = self.reads(self.good(self.hooked(self.own(x))))
            return x*self.reads.weight.sum()
    model, x = pruned(Model(), .5), torch.randn(2, 4, 6)
    new, report = sparsify(model, x)
    assert {n: w.split()[-1] for n, w in report.left.items()} == dict(own='more', hooked='hooks', never='example',
                                                                      ring='circular', two='input', reads='itself')
    assert type(new.good) is SparseLinear and type(new.reads) is nn.Linear
    with torch.no_grad(): assert relative_gap(model(x), new(x)) < 1e-5
    assert 'left, of type Own, which may do more: own' in str(report)


def test_transformer(monkeypatch):
    "Its fast path reads the weights of its layers: these stay, the rest goes on"
    clock(monkeypatch, 'csr pixel', 'sparse')
    torch.manual_seed(0)
    model = pruned(nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32,
        batch_first=True), 2), nn.Linear(16, 4)))
    new, report = sparsify(model, x := torch.randn(2, 5, 8))
    assert type(new[0]) is SparseLinear and type(new[1].layers[0].linear1) is nn.Linear
    with torch.no_grad(): assert relative_gap(model(x), new(x)) < 1e-5


def test_a_single_layer(monkeypatch):
    clock(monkeypatch, 'bag', 'sparse')
    new, _ = sparsify(pruned(nn.Linear(6, 4), .3), torch.randn(2, 6))
    assert type(new) is SparseLinear


def test_chains_keep_to_their_kind(monkeypatch):
    """A linear layer acts on the last dimension of an image, and a pool after it too: none of these can be in a chain
    of convolutions"""
    clock(monkeypatch, 'chain', 'sparse', 'csr pixel')
    model = pruned(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 1), nn.Linear(6, 7), nn.ReLU(),
                                 nn.Linear(7, 6), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1),
                                 nn.MaxPool2d(2, return_indices=True)), .4)
    new, report = sparsify(model, x := torch.randn(2, 2, 4, 6))
    assert [len(m) for m in new if isinstance(m, SparseChain)] == [2, 3]
    with torch.no_grad():
        assert all(map(torch.equal, [model(x)[1]], [new(x)[1]])) and relative_gap(model(x), new(x)) < 1e-5


def test_called_by_keyword_or_in_bfloat16(monkeypatch):
    clock(monkeypatch, 'csr pixel', 'sparse')
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(4, 20), nn.Linear(20, 3)
        def forward(self, x): return self.b(self.a(input=x))
    new, report = sparsify(pruned(Model(), .3), x := torch.randn(2, 4))
    assert report.left == {'a': 'not called with the example'} and type(new.b) is SparseLinear
    model = pruned(nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 3)), .3)
    with torch.autocast('cpu', torch.bfloat16): same, report = sparsify(model, x)
    # the second layer's input
    assert same is model and 'does not work here: sparse kernels compute in float32' in str(report)


def test_a_chain_on_one_thread(monkeypatch):
    clock(monkeypatch, 'one thread', 'sparse', 'csr pixel')
    torch.set_num_threads(2)
    model, x = net(), torch.randn(4, 3, 10, 10)
    new, report = sparsify(model, x)
    assert [m.alone for m in new if isinstance(m, SparseChain)] == [True, True]
    assert 'one chain on one thread' in str(report) and report.threads == 2
    with torch.no_grad(): assert relative_gap(model(x), new(x)) < 1e-5
    assert torch.get_num_threads() == 2


def test_norms_fold_where_a_sequence_says_so(monkeypatch):
    clock(monkeypatch, 'bag', 'sparse')
    from torchvision.ops import Conv2dNormActivation
    model, x = pruned(nn.Sequential(Conv2dNormActivation(3, 6, 3), Conv2dNormActivation(6, 6, 3, groups=6),
                                    nn.Flatten(1)), .5), torch.randn(2, 3, 6, 6)
    new, report = sparsify(model, x)
    assert not [m for m in new.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] and report.gap < 1e-5
    torch.manual_seed(0)
    new, report = sparsify(pruned(resnet18(), .3), torch.randn(1, 3, 32, 32))
    # 3 of 20 stand beside their convolution
    assert len([m for m in new.modules() if isinstance(m, nn.BatchNorm2d)]) == 17 and report.gap < 1e-5


def test_copies(monkeypatch):
    clock(monkeypatch, 'chain', 'sparse', 'csr pixel')
    model, x = net(), torch.randn(4, 3, 10, 10)
    new, _ = sparsify(model, x)
    assert any(isinstance(m, SparseChain) for m in new.modules())
    twin = copy.deepcopy(new)
    torch.save(new, f := io.BytesIO())
    f.seek(0)
    loaded = torch.load(f, weights_only=False)
    state = copy.deepcopy(new.state_dict())
    with torch.no_grad():
        want = new(x)
        for m in sparse_layers(twin): m.val.zero_()
        assert relative_gap(want, twin(x)) > .1                                    # nothing is shared with the copy
        twin.load_state_dict(state)
        for m in (new, twin, loaded): assert torch.equal(want, m(x))


@pytest.mark.skipif(shutil.which('g++') is None, reason='torch.compile needs a C++ compiler on a CPU')
@pytest.mark.parametrize('winner', ['csr pixel', 'bag row', 'csr image', 'chain'])
def test_compiles_in_one_graph(monkeypatch, winner):
    clock(monkeypatch, winner, 'sparse', 'bag pixel')
    torch._dynamo.reset()
    model, x = net(), torch.randn(4, 3, 10, 10)
    new, _ = sparsify(model, x)
    with torch.no_grad(): assert relative_gap(new(x), torch.compile(new, fullgraph=True)(x)) < 1e-5


def test_bf16_only_when_asked(monkeypatch):
    clock(monkeypatch, 'bf16', 'sparse')
    model, x = net(), torch.randn(4, 3, 10, 10)
    assert not [m for m in sparsify(model, x)[0].modules() if isinstance(m, Bfloat16)]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(ValueError, match='no bfloat16'): sparsify(model, x, bf16=True)
        return
    new, report = sparsify(model, x, bf16=True)
    assert len([m for m in new.modules() if isinstance(m, Bfloat16)]) == 4 and 1e-5 < report.gap < .1
    assert 'bf16' in str(report)


def test_never_slower(monkeypatch):
    "Single layers win their races and the whole model loses: everything is taken back, and it says so"
    monkeypatch.setattr(S, 'race', lambda runs, *a: {k: 1. if k == 'dense' else 2. if k == 'sparse' else .1
                                                     for k in runs})
    model = net()
    new, report = sparsify(model, torch.randn(2, 3, 10, 10))
    assert new is model and 'taken back' in str(report) and 'nothing was faster' in str(report)
    assert {r['choice'] for r in report.layers} == {'dense'}
    slow = {'sparse': iter([2., 2., .5])}
    monkeypatch.setattr(S, 'race', lambda runs, *a: {k: 1. if k in ('dense', '') else next(slow[k]) if k in slow
                                                     else {'csr pixel': .1, 'chain': .9}.get(k, .8) for k in runs})
    new, report = sparsify(model, torch.randn(2, 3, 10, 10))
    assert str(report).count('taken back') == 2 and report.ratio == 2 and new is not model


def test_without_mkl(monkeypatch):
    clock(monkeypatch, 'bag', 'sparse')
    def broken(*args): raise RuntimeError("Calling addmm on a sparse CPU tensor requires compiling PyTorch with MKL")
    monkeypatch.setattr(K, '_csr', broken)
    new, report = sparsify(net(), torch.randn(2, 3, 10, 10))
    assert sparse_layers(new) and all(m.kernel == 'bag' for m in sparse_layers(new))
    assert 'csr pixel does not work here: Calling addmm' in str(report)


def test_disagreement_is_refused(monkeypatch):
    "A kernel that computes something else is never chosen"
    clock(monkeypatch, 'bag', 'sparse')
    right = K.product
    monkeypatch.setattr(K, 'product', lambda *a: right(*a)*(1 + 1e-4*a[5]))
    model = net()
    new, report = sparsify(model, torch.randn(2, 3, 10, 10))
    assert all(m.kernel == 'csr' for m in sparse_layers(new)) and report.gap < 1e-5


def test_bad_input():
    x = torch.randn(2, 3, 10, 10)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    same, report = sparsify(dense, x)
    assert same is dense and 'nothing is sparse: the model is returned as it is' in str(report)
    with pytest.raises(ValueError,
                       match=r'run on a CPU: got a model and an example on cpu, meta; move both with \.cpu\(\)'):
        sparsify(net().to('meta'), x)
    bad = x.clone()
    bad[0, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='NaN or infinity on the example'): sparsify(net(), bad)
    model = net()
    with torch.no_grad(): model[0].weight[0, 0, 0, 0] = float('inf')
    with pytest.raises(ValueError, match='NaN or infinity'): sparsify(model, x)


def test_at_call_time(monkeypatch):
    clock(monkeypatch, 'csr pixel', 'sparse')
    model, x = net(), torch.randn(2, 3, 10, 10)
    new, _ = sparsify(model, x)
    # no gradient is asked for: nothing to forbid
    assert new(x).grad_fn is None
    with pytest.raises(ValueError, match='inputs of 3×10×10: got'): new(torch.randn(2, 3, 12, 12))
    with pytest.raises(RuntimeError, match='no gradient: call under torch.no_grad'): new(x.clone().requires_grad_())
    with pytest.raises(TypeError, match='float32 on a CPU'): new(x.double())
    assert new(x[:0]).shape == (0, 5)
    x[0] = float('nan')
    out = new(x)
    assert out[0].isnan().any() and out[1].isfinite().all()                        # NaN stays in its sample


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_even_kernels_pad_more_on_one_side():
    conv, x = pruned(nn.Conv2d(3, 4, (4, 2), padding='same', dilation=(1, 3)), .4), torch.randn(2, 3, 7, 6)
    for form in ('pixel', 'row', 'image'):
        with torch.no_grad(): assert relative_gap(conv(x), SparseConv2d(conv, x.shape[1:], 'csr', form)(x)) < 1e-6


def test_an_empty_layer_gives_its_bias(monkeypatch):
    clock(monkeypatch, 'bag', 'sparse')
    for layer, x in ((nn.Linear(5, 3), torch.randn(4, 5)), (nn.Conv2d(2, 3, 3, padding=1), torch.randn(4, 2, 5, 5))):
        with torch.no_grad(): layer.weight.zero_()
        for kernel in ('csr', 'bag'):
            with torch.no_grad(): assert torch.equal(SparseConv2d(layer, x.shape[1:], kernel)(x), layer(x))


def test_benchmark_writes_its_record(tmp_path):
    out = tmp_path/'kernels.json'
    args = ['--smoke', '--threads', '1', '--rounds', '2', '--note', 'a test', '--out', str(out)]
    code, text = program('benchmarks.kernels', *args)
    assert code == 0, text
    record = json.loads(out.read_text())
    assert record['smoke'] and record['note'] == 'a test'
    assert record['command'] == 'python -m benchmarks.kernels --threads 1 --rounds 2 --smoke'
    assert record['hardware']['threads'] == 1
    assert {(r['layer'], r['batch']) for r in record['rows']} == {(n, b) for n in ('300→100', '64→64, 3×3, 32×32')
                                                                  for b in (1, 64)}
    assert all(r['speedup']['median'] == 1 for r in record['rows'] if r['kernel'] == 'dense')
    assert all(0 < r['q1'] <= r['median'] <= r['q3'] and r['n'] >= 4 for r in record['rows'])
    assert [(m['model'], m['batch'], m['threads']) for m in record['models']] == [('lenet300', 1, 1),
                                                                                  ('lenet300', 64, 1)]
    assert all(m['gap'] < 1e-5 for m in record['models'])
