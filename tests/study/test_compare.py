"`hyperflux compare`: killed, interrupted and repeated, cells that fail, bad input."
import csv, dataclasses, json, os, signal
from pathlib import Path

import pytest

from hyperflux.study.comparison import read_comparison
from hyperflux.rivals.registry import METHODS
from hyperflux.study.config import Config
from hyperflux.study.jobs import alone
from tests.helpers import Runner, command, until

QUICK = ['--dense-epochs', 1, '--prune-epochs', 1, '--regrow-epochs', 1, '--batch-size', 400]
GRID = ['--methods', 'gmp,snip,magnitude', '--sparsities', '.9,.98', '--seeds', '1', *QUICK, '--out', 'side',
        '--record', 'record/side']
TIMES = {'seconds', 'cpu_seconds', 'cpu_seconds_mean'}
MINE = '''
import os, signal
from pathlib import Path
import torch
from hyperflux.rivals import registry, scores
def make(run, plan): return scores.GMP(run.model, run.optimizer, plan=plan)
def too_wild(run, plan):
    with torch.no_grad(): next(run.model.parameters()).mul_(float('inf'))
    return make(run, plan)
def too_big(run, plan):
    # as the system does when memory runs out
    if not Path('spared').exists(): os.kill(os.getpid(), signal.SIGKILL)
    return make(run, plan)
def broken(run, plan): return run.modle
wild, big, bug = map(registry.Method, (too_wild, too_big, broken))
'''


def leading(args, cwd, said, picture):
    "The command, at the head of a process group, as a shell starts it"
    os.setsid()
    command(args, cwd, said, picture)


def begin(*args, cwd): return Runner(cwd, picture=False).start('compare', *args, target=leading)


def end(process, cwd, timeout=100):
    "Its exit code, and what it and its workers said"
    process.join(timeout)
    text = (cwd/'said.txt').read_text()
    assert process.exitcode is not None and 'Traceback' not in text, text
    return process.exitcode, text


def cells(cwd): return {p.parent.name: p.stat().st_mtime_ns for p in cwd.glob('side/*/cell.json')}


def group(process):
    "The processes of its group that still run"
    found = []
    for p in Path('/proc').glob('[0-9]*/stat'):
        try: state, _, pgrp = p.read_text().rpartition(')')[2].split()[:3]
        except OSError: continue
        if int(pgrp) == process.pid and state not in 'ZX': found.append(int(p.parent.name))
    return found


def tables(stem):
    return {p.name: [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(open(p))]
            for p in stem.parent.glob(f'{stem.name}_*.csv')}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "All cells in one process, left in peace"
    cwd = tmp_path_factory.mktemp('whole')
    text = Runner(cwd, picture=False)('compare', *GRID, '--processes', 1)
    return cwd, text


def test_tables(whole):
    cwd, text = whole
    found = read_comparison(cwd/'record/side')
    assert len(found.runs) == 6 and {r['left'] for r in found.runs} == {26_620, 5324}
    assert {r['steps'] for r in found.runs} == {75} and found.head['failed'] == 0
    assert str(found) in text and '6 of 6: magnitude at 0.98, seed 0:' in text and 'left\n' in text
    for r in found.runs:
        assert r['accuracy'] == json.loads((cwd/'side'/r['run']/'summary.json').read_text())['accuracy']
        assert r['commit'] and r['hardware'] and r['date']
    assert found.head['command'] == (
        'hyperflux compare --methods gmp,snip,magnitude --sparsities 0.9,0.98 --seeds 0, '
        '--dense-epochs 1 --prune-epochs 1 --regrow-epochs 1 --batch-size 400')
    assert len(found.history) == 6*3 and len(found.layers) == 6*3 and len(found.overlap) == 2*3
    for name in 'runs', 'summary', 'layers', 'overlap', 'history':
        assert str(cwd) not in (cwd/f'record/side_{name}.csv').read_text()


@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
def test_killed_interrupted_and_repeated(whole, tmp_path):
    """Its parent killed with SIGKILL, then Ctrl-C: no process is left, what was finished is not run again, and the
    tables are those of a run left in peace"""
    p = begin(*GRID, '--processes', 2, cwd=tmp_path)
    until(lambda: cells(tmp_path))
    p.kill(), p.join()
    until(lambda: not group(p), 10)                                                        # the workers see it and end
    before = cells(tmp_path)
    assert 1 <= len(before) < 6
    p = begin(*GRID, '--processes', 2, cwd=tmp_path)
    until(lambda: len(cells(tmp_path)) > len(before))
    # as a terminal does: to all of them
    os.killpg(p.pid, signal.SIGINT)
    code, text = end(p, tmp_path, 20)
    assert code == 130 and 'go on with the same command:' in text, text
    assert ' '.join(['hyperflux', 'compare', *map(str, GRID)]) in text, text
    assert f'{len(before)} of 6 cells were finished before' in text
    # the tracker of Python's own ends last
    until(lambda: not group(p), 10)
    later = cells(tmp_path)
    assert before.items() <= later.items()
    code, text = end(begin(*GRID, '--processes', 1, cwd=tmp_path), tmp_path)               # as many as one likes
    assert code == 0 and f'{len(later)} of 6 cells were finished before' in text
    assert text.count('of CPU time') == 6 - len(later)
    assert later.items() <= cells(tmp_path).items() and len(cells(tmp_path)) == 6
    assert tables(tmp_path/'record/side') == tables(whole[0]/'record/side')
    for name in 'layers', 'overlap', 'history':
        assert (tmp_path/f'record/side_{name}.csv').read_bytes() == (whole[0]/f'record/side_{name}.csv').read_bytes()


def test_cells_that_fail_are_listed_and_harm_no_other(tmp_path):
    "One that diverges, one whose process is killed, one with a mistake in its code"
    (tmp_path/'mine.py').write_text(MINE)
    args = ['--methods', 'mine:wild,mine:big,mine:bug,gmp', '--sparsities', '.9', '--seeds', '1', *QUICK, '--out',
            'side']
    code, text = end(begin(*args, '--processes', 2, cwd=tmp_path), tmp_path)
    assert code == 1 and '3 of 4 cells failed; the same command tries them again' in text
    for says in ('- mine:wild at sparsity 0.9, seed 0: ', 'training has diverged',
                 '- mine:big at sparsity 0.9, seed 0: its process ended with SIGKILL (killed by hand, or for memory); '
                 'the same command goes on',
                 "- mine:bug at sparsity 0.9, seed 0: AttributeError: 'Run' object has no attribute 'modle' "
                 '(mine.py, line 14)'):
        assert says in text, says
    before = cells(tmp_path)
    assert [n.split('-')[3] for n in before] == ['gmp']
    runs = {r['method']: r for r in read_comparison(tmp_path/'side/comparison').runs}
    assert runs['gmp']['left'] == 26_620 and runs['gmp']['error'] is None
    assert runs['mine:wild']['accuracy'] is None and 'diverged' in runs['mine:wild']['error']
    (tmp_path/'spared').touch()
    text = Runner(tmp_path, picture=False)('compare', *args, '--processes', 1, code=1)
    assert '2 of 4 cells failed' in text and '1 of 4 cells were finished before' in text
    assert before.items() <= cells(tmp_path).items() and len(cells(tmp_path)) == 2


def test_bad_input_is_told_before_anything_is_run(tmp_path):
    runner = Runner(tmp_path)
    for wrong, says in {('--methods', 'gmp,gpm'): 'did you mean gmp?',
                        ('--methods', ' '): 'methods is a list of one or more',
                        ('--methods', 'gmp,gmp'): 'methods names gmp more than once',
                        ('--methods', 'gmp-own'): 'gmp trains once, and its own budget is the equal one',
                        ('--methods', 'no.such:method'): 'expected package.module:name of a Method',
                        ('--sparsities', '98'): 'did you mean 0.98?',
                        ('--sparsities', '.9;.95'): "--sparsities takes fractions such as .9,.98: got '.9;.95'",
                        ('--sparsities', ''): 'sparsities is a list',
                        ('--sparsities', '1'): 'leaves no weight at all',
                        ('--sparsities', '.9999999'):
                            'gmp at sparsity 1, seed 0: a sparsity of 1 leaves no weight of 266,200',
                        ('--sparsities', '.9,.90'): 'more than once',
                        ('--seeds', '0'): '--seeds says how many', ('--seeds', '-2'): '--seeds says how many',
                        ('--seeds', 'x'): 'whole numbers such as 0,1,2',
                        ('--seeds', '1,1'): 'seeds names 1 more than once',
                        ('--methods', 'gmp,authors'): 'authors at sparsity 0.95, seed 0: ',
                        ('--methods', 'rigl', '--batch-size',
                         '2000'): 'rigl at sparsity 0.95, seed 0: RigL moves weights every 100 steps',
                        ('--methods', 'imp,imp-own', '--own-epochs', '-1'): 'own_epochs is 0 or more',
                        ('--epochs', '2'): 'expected 3 or more',
                        ('--processes', '-1'): 'processes is a whole number, 1 or more',
                        ('--recipe', 'deit-s-imagenet', '--data', 'fashion-small'): 'no checkpoint at FILE',
                        ('--data', 'mnist', '--root', 'nowhere'): 'nowhere',
                        ('--device', 'gpu'): 'cannot be used here'}.items():
        assert says in (text := runner('compare', '--methods', 'gmp', '--sparsities', '.95', '--seeds', '1', *QUICK[:6],
                                       '--out', 'side', *wrong, code=1)), (wrong, text)
    runner('compare', '--seed', 3, code=2)                                                 # no short form of --seeds
    assert not (tmp_path/'side').exists()
    with alone(tmp_path/'side'):
        assert f'another program is at work in side (process {os.getpid()})' in runner('compare', *QUICK,
            '--methods', 'gmp', '--out', 'side', code=1)
    assert [p.name for p in (tmp_path/'side').iterdir()] == ['.lock']


def test_dry_run_help_and_list(tmp_path):
    runner = Runner(tmp_path)
    text = runner('compare', '--methods', 'gmp,imp-own', '--sparsities', '.9,.98', '--own-epochs', 2, *QUICK,
                  '--processes', 2, '--dry-run', '--out', 'side')
    assert '12 cells, 12 to do, 3 dense trainings shared: about' in text and 'in 2 processes' in text
    assert not (tmp_path/'side').exists()
    assert [line.split()[3:5] for line in text.splitlines() if line.startswith('imp-own')] == [['24', '12'],
        ['38', '19']]
    assert all(f'\n{name} ' in runner('methods') for name in METHODS)
    text = ' '.join(runner('compare', '--help').split())
    for option in ('--recipe', '--methods', '--sparsities', '--seeds', '--own-epochs', '--processes', '--out',
                   '--record',
                   '--root', '--device', '--dry-run', '--quiet'):
        assert option in text
    for f in dataclasses.fields(Config):
        assert (f"--{f.name.replace('_', '-')} " in text or f.type is bool) == (f.name not in ('method', 'sparsity',
            'seed')), f.name
    assert 'hyperflux compare' in runner('--help')
