"The benchmarks run and write the record they promise; nothing here looks at how fast anything is."
import json, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).parents[1]


def run(*args): return subprocess.run([sys.executable, '-m', 'benchmarks.step', *args], cwd=root, text=True, capture_output=True)


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "What a smoke run prints and writes."
    out = tmp_path_factory.mktemp('benchmarks')/'deep'/'step.json'
    res = run('--smoke', '--device', 'cpu', '--profile', '--out', str(out))
    assert res.returncode == 0, res.stderr
    return res.stdout, json.loads(out.read_text())


def test_record_says_where_it_comes_from(smoke):
    _, record = smoke
    assert {'command', 'date', 'commit', 'torch', 'python', 'sparsity'} <= record.keys() and record['smoke']
    assert record['command'].startswith('python -m benchmarks.step --smoke') and len(record['date']) == 10
    assert {'cpu', 'cores', 'threads', 'gpu', 'load_before'} == record['hardware'].keys() and record['hardware']['threads'] >= 1


def test_every_way_has_its_row(smoke):
    _, record = smoke
    ways = [r['way'] for r in record['rows'] + record['failed']]
    assert sorted(ways) == ['compiled', 'dense', 'eager', 'graph', 'masks']
    assert all(f['way'] == 'compiled' and f['error'] for f in record['failed'])           # only for want of a C++ compiler
    for r in record['rows']:
        assert (r['model'], r['device'], r['unit'], r['n']) == ('lenet300', 'cpu', 'ms', 6)
        assert 0 < r['q1'] <= r['median'] <= r['q3'] and r['mean'] > 0 and r['std'] >= 0
        assert 0 < r['ratio']['q1'] <= r['ratio']['median'] <= r['ratio']['q3']
    dense, eager = (next(r for r in record['rows'] if r['way'] == w) for w in ('dense', 'eager'))
    assert dense['ratio']['median'] == 1 and dense['goal'] is None and eager['goal'] == 1.6


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
    assert all(w in text for w in ('median ms', '× dense', 'Hyperflux eager', 'torch.nn.utils.prune', 'torch ' + record['torch'], record['hardware']['cpu']))


def test_wrong_arguments_are_told():
    res = run('--models', 'lenet')
    assert res.returncode == 2 and "no model 'lenet'; there are lenet300, resnet18" in res.stderr
