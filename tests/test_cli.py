"The installed command, as a user meets it: exact sparsity, Ctrl-C and resume, a network of one's own, help, errors."
import csv, dataclasses, json, os, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path

import pytest
from fastcore.docments import docments
from safetensors.torch import load_file

from tests.helpers import Runner
from hyperflux.lab.checkpoint import checkpoints
from hyperflux.study.recipes import RECIPES
from hyperflux.study.config import Config, grouped

command = [str(Path(sys.executable).parent/'hyperflux')]
env = os.environ | dict(OMP_NUM_THREADS='1', COLUMNS='200')
RESULTS = 'config.json', 'history.csv', 'model.safetensors', 'run.png', 'summary.json'


def hyperflux(*args, cwd, code=0, command=command, **more):
    "Runs the command to its end; what it printed"
    res = subprocess.run(command + [str(a) for a in args], cwd=cwd, text=True, capture_output=True, timeout=120,
                         env=env | more)
    assert res.returncode == code, res.stdout + res.stderr
    assert 'Traceback' not in res.stderr, res.stderr
    return res.stdout + res.stderr


def weights(run):
    "The prunable weights in a run folder"
    return [v for k, v in load_file(run/'model.safetensors').items() if v.ndim >= 2]


def files(run): return {p.name: p.read_bytes() for p in run.iterdir()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A finished run of five epochs: its folder, and what was printed"
    cwd = tmp_path_factory.mktemp('whole')
    return cwd/'run', hyperflux('prune', '--epochs', 5, '--save-steps', 25, '--out', 'run', cwd=cwd)


# A run

def test_a_run_leaves_a_folder(whole):
    run, text = whole
    assert 'device cpu, 1 thread; results in run' in text                               # one thread for a small network
    # no terminal, no bar: a line for each epoch
    lines = [line for line in text.splitlines() if line.startswith('epoch ')]
    assert [line.split(',')[0] for line in lines] == [f'epoch {i} of 5' for i in range(1, 6)]
    assert 'step 395 of 395' in lines[-1] and 'density 2.00%' in lines[-1] and '\r' not in text
    assert sorted(p.name for p in run.iterdir()) == ['checkpoint-000000391.pt', 'checkpoint-000000395.pt', *RESULTS]
    rows = list(csv.DictReader(open(run/'history.csv')))
    assert [r['stage'] for r in rows] == ['dense', 'prune', 'prune', 'regrow', 'settle']
    assert [int(r['epoch']) for r in rows] == [1, 2, 3, 4, 5]
    assert float(rows[-1]['accuracy']) > 75 and float(rows[-1]['top5']) > 95 and float(rows[-1]['density']) == .02
    config = Config(dense_epochs=1, prune_epochs=2, regrow_epochs=2)
    assert json.loads((run/'config.json').read_text()) == dataclasses.asdict(config)
    s = json.loads((run/'summary.json').read_text())
    assert s['left'] == s['keep'] == 5324 and '5,324 of 266,200' in text
    assert s['accuracy'] == float(rows[-1]['accuracy'])
    # who may read one file may read all
    assert {(p.stat().st_mode & 0o777) for p in run.iterdir()} == {(run/'history.csv').stat().st_mode & 0o777}
    runner = Runner(run.parent)
    assert 'This run is finished; here are its results again' in runner('prune', '--epochs', 5, '--out', 'run')
    says = runner('prune', '--epochs', 5, '--sparsity', .9, '--out', 'run', code=1)
    assert 'holds a finished run with other settings: choose another folder with --out, or --overwrite it' in says


@pytest.mark.parametrize('sparsity', [.5, .995])
def test_lands_on_the_single_weight(sparsity, tmp_path):
    text = Runner(tmp_path, picture=False)('prune', '--sparsity', sparsity, '--epochs', 5, '--quiet')
    keep, run = round((1 - sparsity)*266_200), next((tmp_path/'runs').iterdir())    # the folder's name is the settings'
    assert sum(int(w.count_nonzero()) for w in weights(run)) == keep and f'{keep:,} of 266,200' in text
    assert run.name == Config(dense_epochs=1, prune_epochs=2, regrow_epochs=2, sparsity=sparsity).name


def test_a_network_of_ones_own(tmp_path):
    "And a switch that the recipe has on, turned off"
    (tmp_path/'mine.py').write_text(
        'from torch import nn\n'
        'def tiny(n_classes, in_shape):\n'
        '    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(144, n_classes))\n')
    assert RECIPES['resnet18-quick'].flip
    run = Runner(tmp_path, picture=False)
    run('prune', '--recipe', 'resnet18-quick', '--model', 'mine:tiny', '--no-flip', '--channels-last', '--sparsity',
        .75,
        '--epochs', 5, '--quiet', '--out', 'run')
    assert sum(int(w.count_nonzero()) for w in weights(tmp_path/'run')) == round(.25*(4*25 + 1440))
    config = json.loads((tmp_path/'run/config.json').read_text())
    told = dict(flip=False, crop=2, channels_last=True, optimizer='sgd', model='mine:tiny')
    assert {k: config[k] for k in told} == told


def test_a_dry_run_tells_and_writes_nothing(tmp_path):
    text = Runner(tmp_path)('prune', '--recipe', 'lenet5-quick', '--dry-run')
    for says in 'a dense step', 'a pruning step', 'all epochs, about', 'nothing was written': assert says in text
    assert 'results in' not in text
    assert [p.name for p in tmp_path.iterdir()] == ['said.txt']                         # which the runner writes


# Help

def test_help_explains_every_option(tmp_path):
    text = ' '.join(Runner(tmp_path)('prune', '--help').split())
    for option in ('--recipe', '--root', '--download', '--epochs', '--device', '--threads', '--compile', '--out',
                   '--resume',
                   '--overwrite', '--save-steps', '--tensorboard', '--dry-run', '--quiet'):
        assert option in text
    comments = docments(Config)
    for f in dataclasses.fields(Config):
        option, comment = '--' + f.name.replace('_', '-'), ' '.join(comments[f.name].split())
        shown = f'{option}, --no-{option[2:]} ' if f.type is bool else f'{option} ({f.type.__name__})'
        assert shown in text and comment and comment in text, option
    titles = [text.index(f"{title}: in place of the recipe's") for title in grouped()]
    assert titles == sorted(titles) and text.rindex('--trajectory (str)') > titles[-2]


def test_help_without_and_with_a_command(tmp_path):
    runner, version = Runner(tmp_path), hyperflux('--version', cwd=tmp_path)
    for args in [], ['--help'], ['-h']: assert 'hyperflux prune' in runner(*args)
    assert version.startswith('hyperflux 0.')
    assert version == hyperflux('--version', cwd=tmp_path, command=[sys.executable, '-m', 'hyperflux'])
    text = runner('recipes')
    assert all(f'\n{name} ' in text for name in RECIPES) and 'hyperflux prune --recipe NAME runs one' in text
    assert "no command 'prnue'; there is prune, recipes" in runner('prnue', code=1)


# Stopping

def begin(*args, cwd):
    return subprocess.Popen(command + list(args), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=env)


def stop(process, sig, when, seconds=60):
    "Sends a signal as soon as `when()`, and returns what was printed"
    try:
        end = time.time() + seconds
        while not when() and process.poll() is None and time.time() < end: time.sleep(.0005)
        process.send_signal(sig)
        return process.communicate(timeout=seconds)
    finally: process.kill()


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM], ids=['Ctrl-C', 'SIGTERM'])
def test_stopped_it_says_how_to_go_on(sig, whole, tmp_path):
    "Ctrl-C between two checkpoints, and a scheduler's SIGTERM while the third is written; both go on to the same end"
    args, run = ['prune', '--epochs', '5', '--save-steps', '25', '--quiet', '--out', 'run'], tmp_path/'run'
    writing = lambda: len(checkpoints(run)) >= 2 and any(run.glob('*.part'))
    when = {signal.SIGINT: lambda: len(checkpoints(run)) >= 1, signal.SIGTERM: writing}[sig]
    process = begin(*args, cwd=tmp_path)
    _, says = stop(process, sig, when)
    assert process.returncode == 130 and 'Traceback' not in says, says
    assert 'of 5 epochs' in says and 'go on with:' in says, says
    resume = next(line for line in says.splitlines() if line.strip().startswith('hyperflux prune')).split()[1:]
    assert resume == args + ['--resume'] and checkpoints(run) and not any(run.glob('*.part'))
    Runner(tmp_path)(*resume)
    for name in RESULTS[:-1]: assert (run/name).read_bytes() == (whole[0]/name).read_bytes(), name


def test_stopped_before_it_trains(tmp_path):
    "In a rehearsal there is nothing to go on with, and nothing to say"
    process, said = begin('prune', '--recipe', 'resnet18-quick', '--dry-run', cwd=tmp_path), []
    _, says = stop(process, signal.SIGTERM, lambda: said.append(process.stdout.readline()) or 'device' in said[-1])
    assert process.returncode == 130 and says == '', says


# Errors

def test_broken_and_foreign_files_are_named_and_nothing_is_lost(tmp_path):
    run, runner = tmp_path/'run', Runner(tmp_path)               # errors do not need the shell, and come sooner without
    run.mkdir()
    (run/'checkpoint-000000007.pt').write_bytes(b'not a checkpoint')
    says = runner('prune', '--quiet', '--resume', '--out', 'run', code=1)
    assert 'run/checkpoint-000000007.pt is not a readable checkpoint' in says and 'begin anew with --overwrite' in says
    says = runner('prune', '--quiet', '--out', 'run', code=1)
    assert 'holds a run already: --resume goes on with it, --overwrite begins anew' in says
    assert files(run) == {'checkpoint-000000007.pt': b'not a checkpoint'}
    (tmp_path/'data').mkdir()
    assert 'data' in runner('prune', '--quiet', '--data', 'mnist', '--root', 'data', '--out', 'm', code=1)
    says = runner('prune', '--quiet', '--epochs', 5, '--batch-size', 5000, '--out', 'short', code=1)
    assert 'pruning was given 4 steps and needs at least 50' in says and not (tmp_path/'short').exists()
    debug = subprocess.run([*command, 'prune', '--model', 'lenet30'], cwd=tmp_path, env=env | dict(HYPERFLUX_DEBUG='1'),
                           text=True, capture_output=True, timeout=60)
    assert 'Traceback (most recent call last)' in debug.stderr


@pytest.fixture
def without_tensorboard(tmp_path):
    "An environment in which TensorBoard is not installed, whether or not it is"
    folder = tmp_path/'without'
    folder.mkdir()
    (folder/'tensorboard.py').write_text(
        "raise ModuleNotFoundError(\"No module named 'tensorboard'\", name='tensorboard')\n")
    return dict(PYTHONPATH=os.pathsep.join([str(folder), *filter(None, [os.environ.get('PYTHONPATH')])]))


def test_overwriting_takes_only_a_runs_own_files_and_not_before_it_can_start(tmp_path, whole, without_tensorboard):
    "Whatever is wrong with the new run is told before the old one is gone"
    run, runner = tmp_path/'run', Runner(tmp_path)
    run.mkdir()
    for name, content in files(whole[0]).items(): (run/name).write_bytes(content)
    (run/'notes.txt').write_text('mine')
    before, args = files(run), ['prune', '--epochs', 5, '--quiet', '--out', 'run', '--overwrite']
    for wrong, says in {('--threads', 1, '--model', 'lenet30'): 'did you mean lenet300',
                        ('--ignore', 'fc5'): "'fc5' matches no weight",
                        ('--weights', 'none.pt'): 'no checkpoint at none.pt',
                        ('--batch-size', 5000): 'needs at least 50', ('--resume',): 'choose one of them'}.items():
        assert says in runner(*args, *wrong, code=1) and files(run) == before, wrong
    says = hyperflux(*args, '--tensorboard', cwd=tmp_path, code=1, **without_tensorboard)
    assert 'TensorBoard is not installed' in says and files(run) == before
    runner(*args, '--sparsity', .9)
    assert json.loads((run/'summary.json').read_text())['left'] == 26_620 and (run/'notes.txt').read_text() == 'mine'
    left = {p.name for p in run.iterdir()}
    assert left == {'notes.txt', 'checkpoint-000000316.pt', 'checkpoint-000000395.pt', *RESULTS}


def test_tensorboard(tmp_path, without_tensorboard):
    args = ['prune', '--epochs', 3, '--batch-size', 200, '--quiet', '--tensorboard', '--out', 'run']
    says = hyperflux(*args, cwd=tmp_path, code=1, **without_tensorboard)
    assert "TensorBoard is not installed: pip install 'hyperflux[tensorboard]', or leave out --tensorboard" in says
    assert not (tmp_path/'run').exists()
    if find_spec('tensorboard') is None: pytest.skip('TensorBoard is not installed: only its absence was tested')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for more in [], ['--resume']:              # the second time from the last checkpoint but one: no row is there twice
        Runner(tmp_path, picture=False)(*args, *more)
        events = EventAccumulator(str(tmp_path/'run/tensorboard')).Reload()
        rows = list(csv.DictReader(open(tmp_path/'run/history.csv')))
        assert set(events.Tags()['scalars']) == rows[0].keys() - {'epoch', 'stage'}
        for k in events.Tags()['scalars']:
            said = [(e.step, e.value) for e in events.Scalars(k)]
            assert said == [(int(r['epoch']), pytest.approx(float(r[k]), rel=1e-5)) for r in rows], k
        (tmp_path/'run/summary.json').unlink()
        checkpoints(tmp_path/'run')[-1].unlink()
