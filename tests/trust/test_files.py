"""Files and weights: one memory never gets two values, nothing is half loaded, what is no example is refused, and no
default of PyTorch's leaks in."""
import copy, json, math

import pytest, torch
from safetensors.torch import save_file
from torch import nn

from hyperflux.lab.checkpoint import checkpoints
from hyperflux.lab.data import Data, Split
from hyperflux.deploy.forms import deploy
from hyperflux.study.results import load_run
from hyperflux.deploy.onnx import export_onnx
from hyperflux.deploy.loading import load_sparse
from hyperflux.deploy.files import save_sparse
from hyperflux.lab.weights import load_weights
from hyperflux.lab.models import make_model
from hyperflux.study.config import Config
from hyperflux.deploy.sparsify import sparsify
from hyperflux.study.train import fit


class Net(nn.Module):
    "A first layer, then an embedding and an output layer that may share memory in several ways"
    def __init__(self, share='nothing'):
        super().__init__()
        self.first, self.embed, self.out = nn.Linear(4, 4), nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        if share == 'a parameter': self.out.weight = self.embed.weight
        if share == 'a module': self.out = self.embed
        if share == 'a view': self.out.weight = nn.Parameter(self.embed.weight.data.view(6, 4))
        if share == 'a transpose':
            self.out = nn.Linear(6, 4, bias=False); self.out.weight = nn.Parameter(self.embed.weight.data.T)
        if share == 'a part':
            self.out = nn.Linear(4, 2, bias=False); self.out.weight = nn.Parameter(self.embed.weight.data[2:4])
        if share == 'one flat vector':
            flat = torch.randn(6*4*2)
            self.embed.weight, self.out.weight = (nn.Parameter(v.view(6, 4)) for v in flat.split(24))
        if share == 'a buffer':
            del self.out; self.out = nn.Module(); self.out.register_buffer('weight', self.embed.weight.data)


SHARED = ['a parameter', 'a module', 'a view', 'a transpose', 'a part', 'a buffer']


def source(kind, state, folder):
    "The state in a file of this kind, and how to load it"
    path = folder/f'x.{kind}'
    if kind == 'dict': return lambda net: load_weights(net, state)
    if kind == 'pt': torch.save(state, path)
    if kind == 'safetensors': save_file({k: v.clone().contiguous() for k, v in state.items()}, path)
    if kind == 'sparse': save_sparse(state, path)
    return lambda net: (load_sparse if kind == 'sparse' else lambda path, net: load_weights(net, path))(path, net)


def snapshot(net): return {k: v.clone() for k, v in net.state_dict().items()}
def unchanged(net, before): return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
# values of an untied network of the same names and shapes
def others(state): return {k: torch.randn(v.shape) for k, v in state.items()}


@pytest.mark.parametrize('kind', ['dict', 'pt', 'safetensors', 'sparse'])
@pytest.mark.parametrize('share', SHARED)
def test_two_values_for_one_memory(share, kind, tmp_path):
    "Both tensors are named, and neither they nor any other has changed"
    torch.manual_seed(0)
    net = Net(share)
    before, load = snapshot(net), source(kind, others(net.state_dict()), tmp_path)
    with pytest.raises(ValueError, match=r'embed\.weight and out\.weight are one memory .* two values'): load(net)
    assert unchanged(net, before)


@pytest.mark.parametrize('kind', ['dict', 'pt', 'safetensors', 'sparse'])
@pytest.mark.parametrize('share', [*SHARED, 'one flat vector', 'nothing'])
def test_equal_values_for_one_memory(share, kind, tmp_path):
    """Files of tied networks, in which both names have a tensor of their own; and parts of one vector that do not
    overlap"""
    torch.manual_seed(0)
    giver, net = Net(share), Net(share)
    source(kind, {k: v.clone() for k, v in giver.state_dict().items()}, tmp_path)(net)
    assert unchanged(net, giver.state_dict())
    if share == 'a parameter': assert net.out.weight is net.embed.weight


@pytest.mark.parametrize('kind', ['dict', 'pt', 'sparse'])
def test_a_tied_file_into_an_untied_network(kind, tmp_path):
    "The reverse: each gets the value, and they stay two"
    tied, net = Net('a parameter'), Net()
    source(kind, tied.state_dict(), tmp_path)(net)
    assert torch.equal(net.out.weight, tied.embed.weight) and torch.equal(net.embed.weight, tied.embed.weight)
    with torch.no_grad(): net.out.weight.zero_()
    assert net.embed.weight.any()


@pytest.mark.parametrize('name', ['embed.weight', 'out.weight'])
def test_one_name_is_enough_for_a_tied_tensor(name):
    "And the other is not called missing"
    net, new = Net('a parameter'), torch.ones(6, 4)
    report = load_weights(net, {name: new})
    assert torch.equal(net.out.weight.data, new) and report['missing'] == ['first.weight', 'first.bias']


def test_what_differs_only_in_nan_or_in_the_sign_of_zero_is_equal(tmp_path):
    tied = Net('a parameter')
    state = {k: v.clone() for k, v in tied.state_dict().items()}
    state['embed.weight'][0, 0] = state['out.weight'][0, 0] = math.nan
    state['embed.weight'][1, 0], state['out.weight'][1, 0] = 0., -0.
    save_sparse(state, tmp_path/'x')
    assert load_sparse(tmp_path/'x', tied).embed.weight[0, 0].isnan()


def test_an_expanded_tensor_cannot_be_filled_and_nothing_is(tmp_path):
    net = nn.Linear(3, 3)
    net.register_buffer('scale', torch.ones(1).expand(3))
    before, state = snapshot(net), others(net.state_dict())
    save_sparse(state, tmp_path/'x')
    for load in lambda: load_weights(net, state), lambda: load_sparse(tmp_path/'x', net):
        with pytest.raises(ValueError, match='scale is expanded'): load()
        assert unchanged(net, before)


# Runs

def images(n=256, side=4, classes=3):
    g = torch.Generator().manual_seed(0)
    split = lambda n: Split(torch.randint(256, (n, 1, side, side), dtype=torch.uint8, generator=g),
                            torch.randint(classes, (n,), generator=g))
    return Data('mine', tuple('abc'[:classes]), split(n), split(64))


def autoencoder(n_classes, in_shape):
    "Two layers that share one matrix, one more for the classes, and something that is no tensor in the state"
    class Noted(nn.ReLU):
        def get_extra_state(self): return dict(note='of this layer')
        def set_extra_state(self, state): pass
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), Noted(), nn.Linear(16, 16), nn.Linear(16, n_classes))
    net[3].weight = net[1].weight
    return net


TINY = Config(model=f'{__name__}:autoencoder', data='mine', dense_epochs=1, prune_epochs=2, regrow_epochs=1,
              batch_size=8, sparsity=.5)


def test_a_run_of_a_tied_network_comes_back_from_its_folder(tmp_path):
    run = fit(TINY, tmp_path/'run', data=images(), progress=False)
    net, summary, shape = load_run(tmp_path/'run')
    assert shape == (1, 4, 4) and summary['n_classes'] == 3
    assert summary['left'] == run.pruner.left == sum(int(p.count_nonzero()) for p in net.parameters() if p.ndim > 1)
    assert net[3].weight is net[1].weight
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), run.model.parameters()))


def test_a_checkpoint_with_two_values_for_a_tied_matrix(tmp_path):
    "A run that would go on from it says so"
    fit(TINY, tmp_path/'run', data=images(), progress=False, until=1)
    path = checkpoints(tmp_path/'run')[-1]
    state = torch.load(path, weights_only=True)
    state['model']['3.weight'] = state['model']['3.weight'] + 1
    torch.save(state, path)
    with pytest.raises(ValueError, match=r'1\.weight and 3\.weight are one memory'):
        fit(TINY, tmp_path/'run', data=images(), resume=True, progress=False)


# Examples

NOTHING = dict(none=None, empty=(), tuple_of_none=(None,), no_samples=torch.zeros(0, 4), a_list=[1, 2], a_text='x',
               a_number=3, a_dict={})


@pytest.mark.parametrize('do', [sparsify, deploy, lambda net, x: export_onnx(net, x, 'never.onnx')],
                         ids=['sparsify', 'deploy', 'export_onnx'])
@pytest.mark.parametrize('what', NOTHING)
def test_what_is_no_example(what, do, tmp_path, monkeypatch):
    "A ValueError that says what was given and what was expected; no file"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError,
                       match=r'example is (an input of the model with at least one sample|a batch).* '
                                         r'or a tuple of .*: got '):
        do(nn.Linear(4, 4), NOTHING[what])
    assert not list(tmp_path.iterdir())


# Defaults

@pytest.fixture(params=['float64', 'float16', 'another device'])
def default(request):
    if request.param == 'another device':
        with torch.device('meta'): yield
    else:
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(torch.float32)


def test_files_and_weights_under_other_defaults(default, tmp_path):
    "What comes back has the type and the device of the model"
    given = nn.Linear(4, 3, device='cpu', dtype=torch.float32)
    save_sparse(given, tmp_path/'x')
    for load in lambda net: load_sparse(tmp_path/'x', net), lambda net: load_weights(net, given.state_dict()):
        blank = nn.Linear(4, 3, device='cpu', dtype=torch.float32)
        load(blank)
        assert torch.equal(blank.weight, given.weight) and blank.weight.dtype == torch.float32
    assert {(t.dtype, t.device.type) for t in load_sparse(tmp_path/'x').values()} == {(torch.float32, 'cpu')}


@pytest.mark.parametrize('kind', ['float64', 'float16'])
def test_a_run_does_not_depend_on_the_default_type(kind):
    data, ends = images(), []
    for dtype in torch.float32, getattr(torch, kind):
        torch.set_default_dtype(dtype)
        try: ends.append(fit(TINY, data=data, progress=False, until=1))
        finally: torch.set_default_dtype(torch.float32)
    assert ends[0].history == ends[1].history
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(*(r.model.parameters() for r in ends)))


@pytest.mark.parametrize('number', ['numpy', 'torch'])
def test_settings_are_anyones_numbers(number):
    "The same name, and the same JSON, as of Python's own"
    import numpy as np
    whole, real = (np.int64, np.float32) if number == 'numpy' else (torch.tensor, torch.tensor)
    config = Config(batch_size=whole(64), prune_epochs=whole(3), sparsity=real(.5), seed=whole(2),
                    warmup_epochs=real(1.5))
    usual = Config(batch_size=64, prune_epochs=3, sparsity=.5, seed=2, warmup_epochs=1.5)
    assert config == usual and config.name == usual.name and json.dumps(vars(config)) == json.dumps(vars(usual))
    with pytest.raises(ValueError, match='batch_size is a whole number'): Config(batch_size=real(64.5))
    assert make_model('resnet18', whole(7), (3, whole(32), 32)).fc.out_features == 7


def test_a_model_is_left_as_it_was():
    "sparsify and export give something new"
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(), torch.randn(2, 4)
    before, twin = snapshot(net), copy.deepcopy(net)
    sparsify(net, x)
    assert net.training and unchanged(net, before) and all(p.requires_grad for p in net.parameters())
    assert str(net) == str(twin)
