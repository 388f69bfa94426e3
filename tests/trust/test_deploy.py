"""Deploying: every form and file that can be had is there, those that cannot are named with the reason, and data that
no list knows are no obstacle."""
import copy, dataclasses, json, sys

import numpy as np, pytest, torch
from torch import nn

from hyperflux.lab.data import Data, Split
from hyperflux.deploy.forms import deploy, deploy_run
from hyperflux.deploy.report import plot_deploy
from hyperflux.deploy.loading import load_sparse
from hyperflux.deploy.operations import operations
from hyperflux.study.config import Config
from hyperflux.study.recipes import cost
from hyperflux.study.results import load_run
from hyperflux.study.train import fit

QUICK = dict(batches=(2,), compiled=False, onnx=False, rounds=1)


class Asks(nn.Linear):
    "Looks at the values of its input: no exporter follows, and operations cannot be counted"
    def forward(self, x): return super().forward(x) if x.sum().item() > -1e9 else -x

class Four(nn.Linear):
    "Takes four samples, and no other number"
    def forward(self, x): return super().forward(x.reshape(4, 4))

class Eight(nn.Linear):
    def forward(self, x):
        if len(x) > 8: raise MemoryError('more than eight samples')
        return super().forward(x)

class Noted(nn.Linear):
    "Has something in its state that is no tensor"
    def get_extra_state(self): return dict(note='a note')
    def set_extra_state(self, state): pass

class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn, self.out = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64)), nn.Linear(4, 4)
    def forward(self, x): return self.out((x.to(torch.complex64) @ self.turn).real)

class Nowhere(nn.Linear):
    def forward(self, x): return super().forward(x)*float('nan')

class Reads(nn.Module):
    "Token ids in"
    def __init__(self):
        super().__init__(); self.embed, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    def forward(self, ids, keep=None):
        return self.out((self.hidden(self.embed(ids)).relu()*(1 if keep is None else keep[..., None])).mean(1))

class Dict(nn.Linear):
    "Gives more than one tensor"
    def forward(self, x): return dict(out=super().forward(x), also=[x])

def old_weight_norm():
    with pytest.warns(FutureWarning):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))
    # from here on it holds a tensor that is computed
    net(torch.randn(2, 4))
    return net


TWO = torch.randn(2, 4)
# Situation → network, example, more for deploy, forms that are there, what is not there and a piece of the reason
PARTS = {
    'graph that depends on values': (Asks(4, 4), TWO, {}, ['dense', 'sparsified'], dict(compacted='cannot follow',
    operations='without looking at values')),
    'only one batch size': (Four(4, 4), torch.randn(4, 4), dict(batches=(4, 5)), ['dense', 'compacted', 'sparsified'],
                            {'batch 5': 'invalid for input of size'}),
    'too large a batch': (Eight(4, 4), TWO, dict(batches=(8, 9)), ['dense', 'compacted', 'sparsified'],
                          {'batch 9': 'MemoryError: more than eight samples'}),
    'a state that is no tensor': (Noted(4, 4), TWO, {}, ['dense', 'compacted', 'sparsified'],
                                  {'sparse file': 'only tensors can be saved',
                                   'sparse file, compacted': 'only tensors can be saved'}),
    'complex weights': (Complex(), TWO, {}, ['dense', 'compacted', 'sparsified'], {'sparse file': 'complex64'}),
    'NaN out': (Nowhere(4, 4), TWO, {}, ['dense'], dict(compacted='NaN or infinity', sparsified='NaN or infinity')),
    'token ids': (Reads(), torch.randint(20, (3, 5)), {}, ['dense', 'compacted', 'sparsified'], {}),
    'token ids and a mask': (Reads(), (torch.randint(20, (3, 5)), torch.ones(3, 5)), {},
                             ['dense', 'compacted', 'sparsified'], {}),
    'a mask for all samples': (Reads(), (torch.randint(20, (3, 5)), torch.ones(1, 5)), {},
                               ['dense', 'compacted', 'sparsified'], {}),
    'half precision': (nn.Linear(4, 4).bfloat16(), TWO.bfloat16(), {}, ['dense', 'compacted', 'sparsified'], {}),
    'double precision': (nn.Linear(4, 4).double(), TWO.double(), {}, ['dense', 'compacted', 'sparsified'], {}),
    'recurrent': (nn.LSTM(4, 4, batch_first=True), torch.randn(2, 3, 4), {}, ['dense', 'compacted', 'sparsified'], {}),
    'a dict out': (Dict(4, 4), TWO, {}, ['dense', 'sparsified'], {}),
    'no weights at all': (nn.ReLU(), TWO, {}, ['dense', 'sparsified'], {}),
}


@pytest.mark.parametrize('what', PARTS)
def test_one_part_that_fails_fails_no_other(what, tmp_path):
    net, x, how, forms, missing = PARTS[what]
    report = deploy(net, x, tmp_path, **QUICK | how)
    there = {r['form'].split(' (')[0] for r in report.speed}
    assert set(forms) <= there, (there, report.skipped)
    for name, why in missing.items():
        assert why in report.skipped[name] and f'{name} ({report.skipped[name]})' in str(report)
    assert set(report.skipped) >= set(missing) and there.isdisjoint(report.skipped)
    for path, name in ('model.sparse', 'sparse file'), ('compact.sparse', 'sparse file, compacted'):
        assert (tmp_path/path).is_file() == (name in [r['form'] for r in report.files])
        assert ((tmp_path/path).is_file() or name in report.skipped or 'compacted' in report.skipped)
    assert json.loads(json.dumps(report.record()))['skipped'] == report.skipped and report._repr_markdown_()
    assert plot_deploy(report.record())


def broken(*args, **kwargs): raise RuntimeError('this machine cannot')


def test_no_compiler_and_no_onnx_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'compile', broken)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    (tmp_path/'model.onnx').write_bytes(b'of another network, of an earlier day')
    report = deploy(nn.Linear(4, 4), TWO, tmp_path, **QUICK | dict(compiled=True, onnx=True))
    assert set(report.skipped) == {'dense, compiled', 'ONNX Runtime'}
    assert 'this machine cannot' in report.skipped['dense, compiled']
    assert "pip install" in report.skipped['ONNX Runtime']
    # and no file that is not of this network
    assert sorted(p.name for p in tmp_path.iterdir()) == ['compact.sparse', 'model.sparse', 'network.safetensors']


def test_onnx_of_what_cannot_be_compacted(tmp_path, monkeypatch):
    "The dense network is exported, and says so; and one that takes a single batch is measured with that"
    monkeypatch.setattr('hyperflux.deploy.forms.compact', broken)
    report = deploy(Four(4, 4), torch.randn(4, 4), tmp_path, **QUICK | dict(onnx=True, batches=(4, 5)))
    assert set(report.skipped) == {'compacted', 'batch 5'} and report.skipped['compacted'] == 'this machine cannot'
    assert [r['form'] for r in report.files] == ['dense float32', 'sparse file', 'network, dense', 'ONNX, dense, batches of 4']
    assert ('dense, ONNX Runtime', 4) in [(r['form'], r['batch']) for r in report.speed]


def test_what_the_model_does_not_take_is_refused():
    for net, x, says in ((nn.Linear(4, 4), torch.randn(2, 5), r'Linear does not take the example, of shape \(2, 5\)'),
                         (Reads(), TWO, 'does not take the example'),
                         (nn.Linear(4, 4, device='meta'), TWO, 'another device'), (nn.Linear(4, 4), TWO.to('meta'),
                                                                                   'another device')):
        with pytest.raises(ValueError, match=says): deploy(net, x, **QUICK)


@pytest.mark.parametrize('batches', [np.array([1, 3]), torch.tensor([1, 3]), (np.int64(1), 3), [1, torch.tensor(3)],
                                     range(1, 4, 2)], ids=['array', 'tensor', 'numpy', 'torch', 'range'])
def test_batches_are_anyones_numbers(batches):
    report = deploy(nn.Linear(4, 4), TWO, **QUICK | dict(batches=batches, rounds=np.int64(1)))
    assert {type(r['batch']) for r in report.speed} == {int} and {r['batch'] for r in report.speed} == {1, 3}
    assert json.dumps(report.record())


@pytest.mark.parametrize('how, says', [(dict(batches=()), 'batches are whole numbers'),
                                       (dict(batches=(1, 0)), 'batches are whole numbers'),
                                       (dict(batches=(1.5,)), 'batches are whole numbers'),
                                       (dict(batches=8), 'batches are whole numbers'),
                                       (dict(batches=None), 'batches are whole numbers'),
                                       (dict(rounds=0), 'rounds is a whole number'),
                                       (dict(rounds=2.5), 'rounds is a whole number')])
def test_numbers_that_make_no_sense(how, says):
    with pytest.raises(ValueError, match=says): deploy(nn.Linear(4, 4), TWO, **QUICK | how)


def test_the_model_and_the_world_are_left_as_they_were():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    net[1].eval()
    before, random, threads = copy.deepcopy(net.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    deploy(net, TWO, **QUICK)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random) and torch.get_num_threads() == threads
    net.train()(TWO).sum().backward()                                                         # it can still be trained
    wn = old_weight_norm()
    deploy(wn, TWO, **QUICK)
    wn(TWO).sum().backward()


def test_a_default_of_another_type_changes_nothing():
    net = nn.Linear(4, 4)
    torch.set_default_dtype(torch.float64)
    try: report = deploy(net, TWO, **QUICK)
    finally: torch.set_default_dtype(torch.float32)
    assert report.skipped == {} and report.counts['dense']['dense'] == 32


def test_tied_weights_are_counted_once(tmp_path):
    "In operations, in the dense size and in the file"
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    report = deploy(net, torch.randn(2, 8), tmp_path, **QUICK)
    assert report.files[0]['bytes'] == 4*64 and report.counts['dense']['weights'] == 64
    assert operations(net, torch.randn(2, 8))['dense'] == 2*2*64


# Runs

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run on data of one's own"
    g = torch.Generator().manual_seed(0)
    split = lambda n: Split(torch.randint(256, (n, 2, 4, 4), dtype=torch.uint8, generator=g),
                            torch.randint(3, (n,), generator=g))
    config = Config(data='my photographs', dense_epochs=1, prune_epochs=2, regrow_epochs=1, batch_size=8, sparsity=.9)
    folder = tmp_path_factory.mktemp('runs')/'mine'
    return fit(config, folder, data=Data('mine', ('a', 'b', 'c'), split(256), split(64)), progress=False), folder


def rewritten(folder, to, change):
    "A copy of a run's folder, in which its summary is another"
    to.mkdir()
    for name in 'model.safetensors', 'config.json', 'summary.json': (to/name).write_bytes((folder/name).read_bytes())
    s = json.loads((to/'summary.json').read_text(encoding='utf-8'))
    change(s)
    (to/'summary.json').write_text(json.dumps(s), encoding='utf-8')
    return to


def test_a_run_on_data_of_ones_own_is_deployed(run, tmp_path):
    trained, folder = run
    report = deploy_run(folder, tmp_path/'out', **QUICK)
    assert report.skipped == {}
    assert sorted(p.name for p in (tmp_path/'out').iterdir()) == ['compact.sparse', 'deploy.json', 'deploy.png',
                                                                  'deploy.txt', 'model.sparse', 'network.safetensors']
    net, summary, shape = load_run(folder)
    assert shape == (2, 4, 4) and summary['n_classes'] == 3
    again = load_sparse(tmp_path/'out/model.sparse', copy.deepcopy(net))
    x = torch.randn(5, *shape)
    with torch.no_grad(): assert torch.equal(again(x), trained.model.eval()(x))


def test_a_folder_of_an_older_version(run, tmp_path):
    "Which does not say what its inputs are: known data are asked for, and others are refused with what to do"
    def older(s): del s['in_shape'], s['n_classes'], s['present'], s['differs']
    with pytest.raises(ValueError, match=r"no data set 'my photographs' to ask: write .*in_shape"):
        load_run(rewritten(run[1], tmp_path/'old', older))
    def known(s): older(s); s['config']['data'] = 'fashion-small'
    # 28×28 pixels and 10 classes, which it has not
    with pytest.raises(ValueError, match='model.safetensors does not fit lenet300'):
        load_run(rewritten(run[1], tmp_path/'known', known))


def test_a_run_under_another_default_type(run):
    torch.set_default_dtype(torch.float64)
    try: net, _, _ = load_run(run[1])
    finally: torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_what_data_cost_that_nobody_knows():
    with pytest.raises(ValueError, match="no data set 'my photographs'"):
        cost(Config(data='my photographs'))
    with pytest.raises(ValueError, match="cifar10"): cost(dataclasses.replace(Config(), data='cifar-10'))
