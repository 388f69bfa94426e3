"The installed command, as a user meets it: exact sparsity, Ctrl-C and resume, a network of one's own, errors in one line."
import csv, json, signal, subprocess, sys, time
from pathlib import Path

import pytest
from safetensors.torch import load_file

command = [str(Path(sys.executable).parent/'hyperflux')]


def hyperflux(*args, cwd, code=0):
    "Runs the command to its end; what it printed"
    res = subprocess.run(command + [str(a) for a in args], cwd=cwd, text=True, capture_output=True, timeout=300)
    assert res.returncode == code, res.stdout + res.stderr
    return res.stdout + res.stderr


def weights(run):
    "The prunable weights in a run folder"
    return [v for k, v in load_file(run/'model.safetensors').items() if v.ndim >= 2]


@pytest.mark.parametrize('sparsity', [.5, .9, .98, .995])
def test_lands_on_the_single_weight(sparsity, tmp_path):
    text = hyperflux('prune', '--sparsity', sparsity, '--epochs', 5, '--out', 'run', cwd=tmp_path)
    keep = round((1 - sparsity)*266_200)
    assert sum(int(w.count_nonzero()) for w in weights(tmp_path/'run')) == keep
    assert f'{keep:,} of 266,200' in text and '100.00% [395/395' in text           # the table, and the progress bar
    assert sorted(p.name for p in (tmp_path/'run').iterdir()) == ['checkpoint.pt', 'config.json', 'history.csv', 'model.safetensors', 'run.png', 'summary.json']
    rows = list(csv.DictReader(open(tmp_path/'run/history.csv')))
    assert [r['stage'] for r in rows] == ['dense', 'prune', 'prune', 'regrow', 'settle']
    assert json.loads((tmp_path/'run/summary.json').read_text())['left'] == keep


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    args = ['prune', '--epochs', '10', '--quiet', '--out', 'run']
    process = subprocess.Popen(command + args, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.time() + 120
    while not (tmp_path/'run/checkpoint.pt').exists() and time.time() < end: time.sleep(.02)
    process.send_signal(signal.SIGINT)
    _, says = process.communicate(timeout=60)
    assert process.returncode == 130 and 'of 10 epochs; go on with:' in says and 'Traceback' not in says, says
    resume = next(line for line in says.splitlines() if line.strip().startswith('hyperflux prune')).split()[1:]
    assert resume == args + ['--resume']
    hyperflux(*resume, cwd=tmp_path)
    hyperflux(*args[:-1], 'whole', cwd=tmp_path)
    assert all(a.equal(b) for a, b in zip(weights(tmp_path/'run'), weights(tmp_path/'whole')))
    assert (tmp_path/'run/history.csv').read_text() == (tmp_path/'whole/history.csv').read_text()


def test_a_network_of_ones_own(tmp_path):
    (tmp_path/'mine.py').write_text('from torch import nn\ndef tiny(n_classes, in_shape): return nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(144, n_classes))\n')
    hyperflux('prune', '--model', 'mine:tiny', '--sparsity', .75, '--epochs', 5, '--quiet', '--out', 'run', cwd=tmp_path)
    assert sum(int(w.count_nonzero()) for w in weights(tmp_path/'run')) == round(.25*(4*25 + 1440))


def test_help_explains_every_option():
    text = hyperflux('prune', '--help', cwd='.')
    for option in '--sparsity', '--model', '--data', '--root', '--epochs', '--seed', '--device', '--out', '--resume': assert option in text
    assert 'hyperflux prune' in hyperflux('--help', cwd='.') and hyperflux('--version', cwd='.').startswith('hyperflux 0.')


def test_broken_and_foreign_files_are_named_and_nothing_is_lost(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'checkpoint.pt').write_bytes(b'not a checkpoint')
    says = hyperflux('prune', '--quiet', '--resume', '--out', 'run', cwd=tmp_path, code=1)
    assert 'run/checkpoint.pt is not a readable checkpoint' in says and 'Traceback' not in says
    assert 'holds a run already' in hyperflux('prune', '--quiet', '--out', 'run', cwd=tmp_path, code=1)
    assert (run/'checkpoint.pt').read_bytes() == b'not a checkpoint'
    (tmp_path/'data').mkdir()
    assert 'data' in hyperflux('prune', '--quiet', '--data', 'mnist', '--root', 'data', '--out', 'm', cwd=tmp_path, code=1)
    says = hyperflux('prune', '--quiet', '--epochs', 5, '--batch-size', 5000, '--out', 'short', cwd=tmp_path, code=1)
    assert 'pruning was given 4 steps and needs at least 50' in says


def test_overwriting_takes_only_a_runs_own_files_and_not_before_it_can_start(tmp_path):
    hyperflux('prune', '--epochs', 5, '--quiet', '--out', 'run', cwd=tmp_path)
    (tmp_path/'run/notes.txt').write_text('mine')
    hyperflux('prune', '--epochs', 5, '--quiet', '--out', 'run', '--overwrite', '--model', 'lenet30', cwd=tmp_path, code=1)
    assert json.loads((tmp_path/'run/summary.json').read_text())['left'] == 5324
    hyperflux('prune', '--epochs', 5, '--quiet', '--out', 'run', '--overwrite', '--sparsity', .9, cwd=tmp_path)
    assert json.loads((tmp_path/'run/summary.json').read_text())['left'] == 26_620 and (tmp_path/'run/notes.txt').read_text() == 'mine'
