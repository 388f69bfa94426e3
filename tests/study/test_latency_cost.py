"""A run whose budget is in time: measured once, said, kept beside it; and what cannot be."""
import dataclasses, json

import pytest, torch

from hyperflux.lab.datasets import load_data
from hyperflux.structure import Latency
from hyperflux.study.config import Config
from hyperflux.study.grid import run_grid
from hyperflux.study.rehearsal import rehearse
from hyperflux.study.results import clear_run, read_summary
from hyperflux.study.run import Run
from hyperflux.study.train import fit
from tests.helpers import Runner

pytestmark = [pytest.mark.usefixtures('one_thread'),
              pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step', 'ignore:at the landing')]

config = Config(groups='channels', cost='latency', latency_batch=64, sparsity=.3, batch_size=500, dense_epochs=1,
                prune_epochs=3, regrow_epochs=2)


@pytest.fixture(scope='module')
def data(): return load_data(config.data)


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "A run from beginning to end, and its folder"
    folder = tmp_path_factory.mktemp('whole')
    return fit(config, folder, data=data, progress=False), folder


@pytest.fixture
def no_clock(monkeypatch):
    "From here on, whatever measures fails"
    def fails(self, *args, **kwargs): raise AssertionError('it is measured again')
    monkeypatch.setattr(Latency, '__init__', fails)


def test_it_lands_within_the_time_that_was_asked_for(whole):
    "Nanoseconds of the kept table, in the summary and in the network itself"
    run, folder = whole
    s, kept = read_summary(folder), Latency.load(folder/'latency.json')
    cost = run.chosen['groups'].cost(kept)
    assert s['cost']['unit'] == 'ns' and s['cost']['whole'] == cost.whole
    assert s['cost']['left'] == cost.left(run.pruner.gate).item() <= .7*cost.whole
    assert kept.made['samples'] == 64 and kept.made['threads'] == 1
    assert all(r['open'] >= 1 for r in s['widths']) and any(r['open'] < r['gates'] for r in s['widths'])


def test_the_log_says_that_it_is_measured_and_how_well(data, tmp_path, capsys):
    "On the screen, and in what the run leaves behind"
    run = fit(config, tmp_path/'a', data=data, progress=False, until=1)
    said = capsys.readouterr().out
    assert 'how long layers take here is measured first' in said and 'median; at most' in said
    assert str(run.chosen['cost']) in said


def test_the_summary_has_its_error(whole):
    "As a line under the table"
    run, folder = whole
    assert read_summary(folder)['latency'] == str(Latency.load(folder/'latency.json'))
    assert 'samples: 64' in run.text() and 'median; at most' in run.text()


def test_a_run_that_goes_on_has_the_same_prices_and_bits(whole, data, tmp_path, no_clock):
    "Stopped in dense training and while pruning, with no clock at hand: as the run that was not stopped"
    run, folder = whole
    fit(config, tmp_path, data=data, progress=False, until=1, latency=Latency.load(folder/'latency.json'))
    for until in 3, None: again = fit(config, tmp_path, data=data, progress=False, resume=True, until=until)
    assert torch.equal(again.pruner.presence, run.pruner.presence)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), run.model.parameters()))
    assert again.history == run.history
    assert (tmp_path/'latency.json').read_bytes() == (folder/'latency.json').read_bytes()


def test_without_its_prices_a_run_does_not_go_on(whole, data, tmp_path, no_clock):
    "Measured anew they would be others"
    fit(config, tmp_path, data=data, progress=False, until=1, latency=Latency.load(whole[1]/'latency.json'))
    (tmp_path/'latency.json').unlink()
    with pytest.raises(FileNotFoundError, match='lacks latency.json.*overwrite'):
        fit(config, tmp_path, data=data, progress=False, resume=True)


def test_clearing_a_run_takes_its_prices_too(whole, data, tmp_path):
    "So that --overwrite measures anew"
    fit(config, tmp_path, data=data, progress=False, until=1, latency=Latency.load(whole[1]/'latency.json'))
    clear_run(tmp_path)
    assert not (tmp_path/'latency.json').exists()


def test_prices_of_something_else_are_refused(whole, data):
    "Another batch, another multiple, another network, another cost"
    kept = Latency.load(whole[1]/'latency.json')
    def given(**how): fit(dataclasses.replace(config, **how), data=data, progress=False, latency=kept)
    with pytest.raises(ValueError, match="'samples': 64.*'samples': 8.*make both alike"): given(latency_batch=8)
    with pytest.raises(ValueError, match="'multiple': 1.*'multiple': 8.*make both alike"): given(multiple=8)
    with pytest.raises(ValueError, match='measured for another model'): given(model='lenet5')
    with pytest.raises(ValueError, match='latency= is for cost=latency, and cost=flops'):
        given(cost='flops', latency_batch=1)


def test_a_budget_below_the_thinnest_network_is_refused_before_training(whole, data, monkeypatch):
    "What lies between layers does not go, and the run says so at its first step"
    monkeypatch.setattr(Run, 'backward', lambda *args: pytest.fail('it trains'))
    with pytest.raises(ValueError, match='ns is less than the .* of the smallest network'):
        fit(dataclasses.replace(config, sparsity=.9999), data=data, progress=False,
            latency=Latency.load(whole[1]/'latency.json'))


@pytest.mark.parametrize('groups', ['single', 'rows', 'nm:2:4', 'blocks:4:4'])
def test_forms_that_change_no_width_have_no_latency(groups):
    "Zeros inside a layer leave it as slow as it was"
    with pytest.raises(ValueError, match=f'groups={groups} leave all layers as wide as they are'):
        Config(groups=groups, cost='latency')


def test_a_batch_to_measure_with_is_for_latency_alone():
    "Also a whole number above 0"
    with pytest.raises(ValueError, match='is for cost=latency, and cost=flops'):
        Config(groups='channels', cost='flops', latency_batch=4)
    with pytest.raises(ValueError, match='latency_batch is 1 or more'): dataclasses.replace(config, latency_batch=0)


def test_a_rehearsal_measures_no_layers(data, no_clock):
    "It wants to know how long a step takes, and a step asks no clock"
    assert len(rehearse(config, data, steps=2)['losses']) == 4


def test_a_comparison_measures_once_for_all_cells(tmp_path, monkeypatch):
    "Two methods and two seeds: one table, and the second call has nothing to do"
    made, make = [], Latency.__init__
    def counted(self, *args, **kwargs): made.append(self), make(self, *args, **kwargs)
    monkeypatch.setattr(Latency, '__init__', counted)
    what = config, ['hyperflux', 'group-l2'], [.3], [0, 1], tmp_path
    rows = run_grid(*what)
    assert len(made) == 1 and not [r for r in rows if 'error' in r]
    tables = {p.read_bytes() for p in tmp_path.glob('*/latency.json')}
    assert len(tables) == 1 and len(list(tmp_path.glob('*/latency.json'))) == 5
    for r in rows:
        cost = json.loads((tmp_path/r['run']/'summary.json').read_text())['cost']
        assert cost['unit'] == 'ns' and cost['left'] <= .7*cost['whole']
    assert run_grid(*what) == rows and len(made) == 1


def test_cells_below_the_thinnest_network_fail_alone(tmp_path):
    "The others go on; what a recipe asks for, and no cell, is not looked at"
    base = dataclasses.replace(config, sparsity=.9999)
    lost, made = run_grid(base, ['group-l2'], [.9999, .3], [0], tmp_path)
    assert 'is less than the' in lost['error'] and 'of the smallest network' in lost['error']
    assert made['accuracy'] > 50


@pytest.mark.long
def test_the_commands_prune_and_compare_by_time(tmp_path):
    "hyperflux prune --cost latency, and compare in two processes"
    run, say = Runner(tmp_path, picture=False), ('--groups', 'channels', '--cost', 'latency', '--latency-batch', 64,
                                                 '--batch-size', 500, '--epochs', 6, '--device', 'cpu')
    said = run('prune', *say, '--sparsity', .3, '--quiet', '--out', 'one')
    assert said.index('is measured first') < said.index('ns left') and 'median; at most' in said
    assert 'latency.json' in said
    said = run('compare', *say, '--methods', 'hyperflux,group-taylor', '--sparsities', '.2,.3', '--seeds', '0,',
               '--processes', 2, '--out', 'side')
    assert said.count('is measured first') == 1 and 'failed' not in said
    assert len({p.read_bytes() for p in tmp_path.glob('side/*/latency.json')}) == 1


def test_a_name_that_is_almost_right():
    "Latency is a cost by name"
    with pytest.raises(ValueError, match='bytes, latency, or package.module:name.*did you mean latency'):
        dataclasses.replace(config, cost='latncy', latency_batch=1)
