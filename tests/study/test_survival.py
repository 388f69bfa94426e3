"""Runs that are killed, run out of disk or find broken files: nothing is lost, nothing is overwritten, and the end is
the same to the last bit.

Most commands here run in processes forked from one that has its imports done (`tests.helpers.Runner`), which saves
seconds each; `test_cli` starts them as a user does.
"""
import errno, json, os, pickle, random, resource, signal, subprocess, sys
from pathlib import Path

import pytest, torch

from hyperflux.lab import checkpoint
from hyperflux.lab.checkpoint import checkpoints, read_checkpoint
from hyperflux.lab.datasets import load_data
from hyperflux.lab.processes import join
from hyperflux.study.config import Config
from hyperflux.study.results import read_history
from hyperflux.study.run import Run
from tests.helpers import Group, command, environment, until
from tests.study.kill import SETTINGS, arguments, differences, inspect, reference, runner_in, survive

pytestmark = pytest.mark.skipif(not Path('/proc/self/stat').exists(),
                                reason='SIGKILL, process groups and /proc, as on Linux')
LARGE, QUICK = list(SETTINGS)[0], list(SETTINGS)[2]                 # with the largest checkpoints, and the cheapest
epochs = 5
long = lambda x: pytest.param(x, marks=pytest.mark.long)


@pytest.fixture(scope='module')
def runner(tmp_path_factory): return runner_in(tmp_path_factory.mktemp('runs'), picture=False)


@pytest.fixture(scope='module')
def peace(runner):
    "Makes, once, the run of a setting that nobody disturbs: its folder, and how long it took"
    made = {}
    return lambda setting: made[setting] if setting in made else made.setdefault(setting,
                                                                                 reference(runner, setting, epochs))


@pytest.fixture
def folder(runner, tmp_path): return runner.cwd/tmp_path.name


def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
def quick(folder, *more): return [*arguments(QUICK, folder, epochs), *more]


# Kills

# The authors' controller and convolutions in bf16, whose runs are the longest, are killed in the long run only
@pytest.mark.parametrize('setting', [long(s) if 'authors' in s or 'convolution' in s else s for s in SETTINGS])
def test_killed_at_random_moments(runner, peace, folder, setting):
    "Also while it writes; resumed, the run ends as if it had been left in peace"
    whole, seconds = peace(setting)
    r = survive(runner, arguments(setting, folder, epochs), folder, whole, random.Random(setting), times=2,
                seconds=seconds)
    assert r['kills'] >= 1 and (r['unreadable'], r['lost'], r['torn'], r['differences']) == (0, 0, 0, []), r


def before(args, cwd, said, picture, operation, file):
    """The command, which kills itself before its first operation of a kind (open to write, os.rename or os.remove) on a
    file whose name begins so"""
    def hook(name, given):
        if name != operation or not str(given[0]).startswith(f'{args[-1]}/{file}'): return
        if name == 'open' and 'w' not in str(given[1]): return
        # what an earlier kill left
        if name == 'os.remove' and str(given[0]).endswith('.part'): return
        os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    command(args, cwd, said, picture)


def test_killed_before_every_kind_of_file_operation(runner, peace, folder):
    """One run, which dies before the first opening, renaming or removing of every file, one after the other, and is
    resumed each time"""
    whole, _ = peace(QUICK)
    write, other = ('open', 'os.rename'), ('os.remove',)
    kinds = {'.write': other, 'config.json': write, 'checkpoint': write + other, 'history.csv': write,
             'model.safetensors': write, 'run.png': write, 'summary.json': write}
    for file, operation in [(f, o) for f, operations in kinds.items() for o in operations]:
        p = runner.start('prune', *['--resume']*bool(checkpoints(folder)), *quick(folder)[1:], target=before,
                         more=(operation, file))
        p.join(60)
        p.kill(), p.join()
        assert p.exitcode == -signal.SIGKILL, (operation, file, (runner.cwd/'said.txt').read_text())
        unreadable, _, prefix = inspect(folder, whole)
        assert unreadable == 0 and prefix, (operation, file)
    runner(*quick(folder, '--resume'))
    assert differences(folder, whole) == []


def doomed(args, cwd, said, picture, size):
    "The command, which the kernel kills when a file reaches so many bytes"
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command(args, cwd, said, picture)


# In the usual run a checkpoint is cut at its beginning only; in the long one also in the middle and at its end
@pytest.mark.parametrize('share', [.01, long(.5), long(.99)])
def test_killed_in_the_middle_of_a_checkpoint(runner, peace, folder, share):
    """The kernel ends the process at a byte of the first checkpoint that is larger than all before: nothing of it is
    taken for one"""
    whole, _ = peace(QUICK)
    size = max(p.stat().st_size for p in checkpoints(whole))
    p = runner.start(*quick(folder), target=doomed, more=(max(800, int(share*size)),))
    p.join(60)
    p.kill(), p.join()
    assert p.exitcode == -signal.SIGXFSZ and [o.name for o in folder.glob('*.part')] != []
    unreadable, _, prefix = inspect(folder, whole)
    assert unreadable == 0 and prefix
    runner(*quick(folder, *['--resume']*bool(checkpoints(folder))))
    assert differences(folder, whole) == []


def test_killed_before_the_first_checkpoint(runner, peace, folder):
    "There is nothing to resume, which --resume says; without it the run begins"
    whole, _ = peace(QUICK)
    p = runner.start(*quick(folder))
    until(lambda: (folder/'config.json').exists(), every=.0005)
    p.kill(), p.join()
    assert not checkpoints(folder) and (folder/'config.json').exists()
    said = runner(*quick(folder, '--resume'), code=1)
    assert f'nothing to resume: {folder} holds no checkpoint; leave out --resume to start' in said
    assert 'Traceback' not in said
    (folder/'checkpoint-000000003.pt.part').write_bytes(b'half of one')                 # as of another --save-steps
    runner(*quick(folder))
    assert differences(folder, whole) == []


# Disks

def one_line(said):
    "The error is one line, and one that says how to see more"
    last = said.rstrip().splitlines()[-2:]
    assert 'Traceback' not in said and last[0].startswith('hyperflux: '), said
    assert last[1] == '(HYPERFLUX_DEBUG=1 shows where)', said
    return last[0]


@pytest.fixture
def disk(tmp_path):
    "A small disk of its own, and a function that mounts it again with other options"
    def mount(*options):
        return subprocess.run(['mount', *options, str(place)], capture_output=True, timeout=20).returncode == 0
    place = tmp_path/'disk'
    place.mkdir()
    if not mount('-t', 'tmpfs', '-o', 'size=64m', 'tmpfs'): pytest.skip('only root can mount a small disk')
    yield place, lambda options: mount('-o', f'remount,{options}')
    subprocess.run(['umount', '--lazy', str(place)], timeout=20)


def test_full_disk(runner, peace, disk):
    "It says so, keeps what is whole, says so again when nothing has changed, and goes on when there is room"
    whole, _ = peace(LARGE)
    place, remount = disk
    args = arguments(LARGE, place/'run', epochs)
    size = max(p.stat().st_size for p in checkpoints(whole))
    assert remount(f'size={int(2.5*size)}')
    said = one_line(runner(*args, code=1))
    left = checkpoints(place/'run')
    assert said.startswith(f'hyperflux: cannot write {place}/run/checkpoint-')
    assert f'No space left on device; {left[-1].name} is whole: make room, then go on from it with --resume' in said
    unreadable, rows, prefix = inspect(place/'run', whole)
    assert unreadable == 0 and prefix and not list(place.glob('run/*.part'))
    before = files(place/'run')
    assert 'No space left on device' in one_line(runner(*args, '--resume', code=1))
    assert files(place/'run') == before
    remount('size=64m')
    runner(*args, '--resume')
    assert differences(place/'run', whole) == []


def test_full_disk_at_the_very_end(runner, peace, disk):
    "No room for history, weights or picture: the checkpoints are whole, and the results come when there is"
    whole, _ = peace(QUICK)
    place, _ = disk
    run = place/'run'
    runner(*quick(run))
    results, page = ('model.safetensors', 'run.png', 'summary.json'), 4096
    for name, pages in ('history.csv', 0), ('model.safetensors', 1), ('run.png',
            -(-(whole/'model.safetensors').stat().st_size//page)):
        for o in results: (run/o).unlink(missing_ok=True)
        before = files(run)
        with pytest.raises(OSError), open(place/'ballast', 'wb') as f:
            while True: os.write(f.fileno(), bytes(page))
        os.truncate(place/'ballast', (place/'ballast').stat().st_size - pages*page)
        said = one_line(runner(*quick(run, '--resume'), code=1))
        assert said == f'hyperflux: cannot write {run}/{name}: No space left on device', said
        assert {k: v for k, v in files(run).items() if k not in results} == before
        (place/'ballast').unlink()
    runner(*quick(run, '--resume'))
    assert differences(run, whole) == []


def limited(args, cwd, said, picture, size):
    "The command, with a limit on the size of each file: its writes fail as on a full disk"
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    command(args, cwd, said, picture)


def test_files_too_large(runner, peace, folder):
    "The same by another limit, and without root: checkpoints are too large as soon as they hold gates"
    whole, _ = peace(QUICK)
    size = max(p.stat().st_size for p in checkpoints(whole))
    said = one_line(runner(*quick(folder), code=1, target=limited, more=(int(.7*size),)))
    assert f'{os.strerror(errno.EFBIG)}; {checkpoints(folder)[-1].name} is whole: make room' in said
    assert read_checkpoint(checkpoints(folder)[-1])['pruner'] is None
    runner(*quick(folder, '--resume'))
    assert differences(folder, whole) == []
    said = one_line(runner(*quick(folder, '--overwrite'), code=1, target=limited, more=(600,)))
    assert said.endswith(f'config.json: {os.strerror(errno.EFBIG)}')


def test_where_nothing_can_be_written(runner, disk):
    place, remount = disk
    (place/'run').mkdir()
    (place/'file').write_text('mine')
    said = one_line(runner(*quick(place/'file'/'run'), code=1))
    assert said == f'hyperflux: cannot write to {place}/file/run: Not a directory; choose another folder with --out'
    assert remount('ro')
    for run in place/'run', place/'new':
        said = one_line(runner(*quick(run), code=1))
        assert said == f'hyperflux: cannot write to {run}: Read-only file system; choose another folder with --out'
    assert sorted(p.name for p in place.rglob('*')) == ['file', 'run']


# Broken and foreign files

@pytest.fixture
def stopped(runner, peace, folder):
    "A run that was stopped before its last epoch was over"
    whole, _ = peace(QUICK)
    folder.mkdir()
    for p in whole.iterdir():
        if p.name != 'summary.json': (folder/p.name).write_bytes(p.read_bytes())
    return folder


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


def refused(runner, run, says, *more):
    "The command ends with this one line, and no file has changed"
    before = files(run)
    said = one_line(runner(*quick(run, '--resume', *more), code=1))
    assert says in said and files(run) == before, said
    return said


def test_broken_checkpoints(runner, peace, stopped):
    "Cut anywhere, or with a single wrong bit: refused, with the one to go on from; which works"
    first, last = checkpoints(stopped)
    good = last.read_bytes()
    at = good.index(read_checkpoint(last)['pruner']['presence'].numpy().tobytes()) + 1000
    flipped = good[:at] + bytes([good[at] ^ 4]) + good[at + 1:]
    for bad in b'', good[:1], good[:4], good[:len(good)//2], good[:-1], bytes(len(good)), flipped:
        last.write_bytes(bad)
        said = refused(runner, stopped, f'{last} is not a readable checkpoint (truncated, or of another program')
        assert said.endswith(f'remove it to go on from {first.name}')
    last.unlink()
    runner(*quick(stopped, '--resume'))
    assert differences(stopped, peace(QUICK)[0]) == []


def test_hostile_checkpoints(runner, stopped, tmp_path):
    "A pickle that would run code is not obeyed, be it bare, or well hidden in one of torch's own files"
    last, owned = checkpoints(stopped)[-1], tmp_path/'owned'
    whole = read_checkpoint(last)
    for protocol in 2, 4:
        last.write_bytes(pickle.dumps(Evil(owned), protocol=protocol))
        refused(runner, stopped, 'is not a readable checkpoint')
    for state in Evil(owned), dict(whole, flux=Evil(owned)), dict(whole, own=[dict(random=Evil(owned))]):
        torch.save(state, last)
        refused(runner, stopped, 'holds more than tensors and numbers, so that loading it could run code: refused')
    assert not owned.exists()
    pickle.loads(pickle.dumps(Evil(owned)))
    assert owned.exists()                                           # it does run, where it is obeyed


def test_checkpoints_of_others(runner, stopped):
    "Another program's, another run's, another network's under the same name: each says what it is"
    last = checkpoints(stopped)[-1]
    whole = read_checkpoint(last)
    for state, says in (torch.ones(3), 'it holds a Tensor'), (dict(model=whole['model']),
            'it holds a dict with model'), (dict(whole, config=3), 'is not a checkpoint of hyperflux'):
        torch.save(state, last)
        refused(runner, stopped, says)
    torch.save(dict(config=whole['config'], model=whole['model'], optimizer={}), last)
    refused(runner, stopped, 'is not a checkpoint of hyperflux: it lacks pruner, scaler')
    torch.save(dict(whole, own=whole['own']*2), last)
    refused(runner, stopped, 'was written by 2 processes, now there are 1')
    torch.save(dict(whole, model={k: v for k, v in whole['model'].items() if k != '0.weight'}), last)
    refused(runner, stopped, 'is a checkpoint of another model: Missing key(s) in state_dict: "0.weight"')
    torch.save(whole, last)
    refused(runner, stopped, 'belongs to another run: sparsity was 0.9, is 0.5', '--sparsity', '.5')
    refused(runner, stopped, "belongs to another run: model was 'own:conv', is 'lenet300'", '--model', 'lenet300')
    refused(runner, stopped, 'resume goes on with a run, overwrite begins anew in its place: choose one of them',
            '--overwrite')
    own = runner.cwd/'own.py'
    text = own.read_text()
    try:
        own.write_text(text.replace('nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8)',
                                    'nn.Conv2d(1, 9, 5, stride=4), nn.BatchNorm2d(9)').replace('288', '324'))
        refused(runner, stopped, 'is a checkpoint of another model: size mismatch for 0.weight')
    finally: own.write_text(text)
    runner(*quick(stopped, '--resume'))


# Several processes

def test_a_signal_waits_for_the_checkpoint(tmp_path, monkeypatch):
    "Torch's writer ends the program if an exception leaves it half way: Ctrl-C and SIGTERM come when the file is whole"
    save = checkpoint._save
    def stop(*_): raise KeyboardInterrupt
    for k, sig in enumerate((signal.SIGINT, signal.SIGTERM)):
        def disturbed(state, f): signal.raise_signal(sig); save(state, f)
        monkeypatch.setattr(checkpoint, '_save', disturbed)
        was = signal.signal(sig, stop)
        try:
            with pytest.raises(KeyboardInterrupt): checkpoint.write_checkpoint(tmp_path, k, dict(config={}))
            assert signal.getsignal(sig) is stop
        finally: signal.signal(sig, was)
        assert checkpoint.read_checkpoint(checkpoint.checkpoints(tmp_path)[-1]) == dict(config={})
        assert len(list(tmp_path.iterdir())) == k + 1


PAIR = 'prune', '--epochs', '5', '--batch-size', '250', '--save-steps', '15', '--device', 'cpu', '--quiet', '--out'


def test_two_processes(runner, folder, tmp_path):
    "They land on the same number as one, go much the same way, and resume after both were killed; only rank 0 writes"
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m',
                'hyperflux']
    said = subprocess.run([*torchrun, *PAIR, tmp_path/'whole'], cwd=tmp_path, env=environment(), text=True, check=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100).stdout
    assert '2 processes' in said and said.count('written to') == 1 and '5,324 of 266,200' in said
    assert {p.name for p in (tmp_path/'whole').iterdir()} == {*(p.name for p in checkpoints(tmp_path/'whole')),
        'config.json', 'history.csv', 'model.safetensors', 'run.png', 'summary.json'}
    pair = lambda *more: Group(2, command, [*PAIR, str(tmp_path/'run'), *more], tmp_path, tmp_path/'said.txt')
    with pair(): until(lambda: len(checkpoints(tmp_path/'run')) >= 2)        # and both are killed
    assert checkpoints(tmp_path/'run') and not (tmp_path/'run/summary.json').exists()
    assert inspect(tmp_path/'run', tmp_path/'whole')[::2] == (0, True)
    said = one_line(runner(*PAIR, tmp_path/'run', '--resume', code=1))
    assert 'was written by 2 processes, now there are 1: go on with as many as before' in said
    with pair('--resume') as g: g.wait()
    assert differences(tmp_path/'run', tmp_path/'whole') == []
    runner(*PAIR, folder)
    for run in tmp_path/'whole', folder: assert json.loads((run/'summary.json').read_text())['left'] == 5324
    for two, one in zip(read_history(tmp_path/'whole/history.csv'), read_history(folder/'history.csv'), strict=True):
        assert (two['epoch'], two['stage'], two['lr']) == (one['epoch'], one['stage'], one['lr'])
        gap = {k: abs(two[k] - one[k]) for k in ('loss', 'accuracy', 'density')}
        assert gap['loss'] < .02 and gap['accuracy'] < 2.5 and gap['density'] < .05*one['density'], (two, one)


def evaluates(out, *more):
    "What evaluation looks at, and what it says, in one process or in each of several; then a command, if one is named"
    world = join()
    rows = []
    for valid in 0., .1, .1001, .1002, .0003, .0005:
        run = Run(Config(valid=valid), load_data(valid=valid), world=world)
        # a number for each image and its label
        seen = [x.flatten(1).double().sum(1)*10 + y for x, y in run.test_loader]
        every = torch.cat(world.gather(torch.cat(seen))).sort().values
        rows.append(dict(n=len(run.data.splits()['valid' if valid else 'test'].labels), every=every, **run.evaluate()))
    if world.main: torch.save(rows, out)
    if more: command(*more)


def test_evaluation_leaves_no_image_out(peace, tmp_path):
    """In three processes, whatever is left over for the last batch; and it says what one process says. A finished run
    is shown by one of them"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluates(tmp_path/'one')
    torch.set_num_threads(threads)
    whole, said = peace(QUICK)[0], tmp_path/'said.txt'
    with Group(3, evaluates, tmp_path/'three', list(map(str, quick(whole))), whole.parent, said) as g: g.wait()
    assert said.read_text().count('This run is finished') == 1
    one, three = (torch.load(tmp_path/o) for o in ('one', 'three'))
    assert [r['n'] for r in one] == [2000, 1000, 1001, 1002, 3, 5]
    for a, b in zip(one, three, strict=True):
        assert len(a['every']) == len(b['every']) == a['n'] and torch.equal(a['every'], b['every'])
        assert (a['accuracy'], a['top5']) == (b['accuracy'], b['top5']) and abs(a['loss'] - b['loss']) < 1e-5
