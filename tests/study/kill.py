"""Runs that are killed with SIGKILL, at random moments and while they write, and resumed: is anything lost?

    OMP_NUM_THREADS=1 python -m tests.study.kill              # 50 runs, about ten minutes, and the record

Each run is killed one to four times, is resumed from what it left, and is compared, byte for byte, with one of the same
settings that was left in peace.
SIGKILL ends a process and leaves the computer running: what it had handed to the system is still written. A power cut
is not tried here.
"""
import argparse, random, tempfile, time
from pathlib import Path

import torch

from benchmarks.common import provenance, table, write_json
from hyperflux.lab.checkpoint import checkpoints, read_checkpoint
from hyperflux.study.results import clear_run
from tests.helpers import Runner

OWN = '''
from torch import nn
def net(n_classes, in_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Dropout(.1),
                         nn.Linear(100, n_classes))
def conv(n_classes, in_shape):
    return nn.Sequential(nn.Conv2d(1, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(.1),
                         nn.Linear(288, n_classes))
'''
SETTINGS = { # Name → options: between them, all that a checkpoint has to hold
    'LeNet-300-100, Adam': '--batch-size 400 --save-steps 9',
    'dropout, AdamW, augmented, accumulating':
        '--model own:net --optimizer adamw --weight-decay .05 --no-decay-all --crop 2 --flip --cutout 4 --accumulate 2 '
        '--batch-size 300 --save-steps 8',
    'convolution, SGD, bf16':
        '--model own:conv --optimizer sgd --momentum .8 --schedule step --precision bf16 --channels-last --clip 1 '
        '--valid .1 --sparsity .9 --batch-size 150 --save-steps 13',
    'GradScaler, fp16':
        '--model own:net --precision fp16 --sparsity .95 --warmup-epochs .5 --batch-size 250 --save-steps 11',
    "authors' controller": '--model own:net --method authors --sparsity .5 --batch-size 40 --save-steps 70',
}


def runner_in(cwd, **kw):
    "Starts `hyperflux` where own.py is"
    (Path(cwd)/'own.py').write_text(OWN)
    run = Runner(cwd, **kw)
    run('--version')                                        # the imports are not part of the first run's time
    return run


def arguments(setting, folder, epochs):
    return ['prune', *SETTINGS[setting].split(), '--epochs', epochs, '--quiet', '--out', folder]


# What a run leaves

def differing(a, b, path=''):
    "Where two checkpoints differ, apart from time: nothing that is compared with a tolerance"
    if type(a) is not type(b): return [path]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a.view(torch.uint8) if a.ndim else a,
                                                        b.view(torch.uint8) if b.ndim else b) else [path]
    if isinstance(a, dict):
        return [path] if list(a) != list(b) else [d for k in a if k not in ('seconds', 'cpu_seconds')
                                                  for d in differing(a[k], b[k], f'{path}/{k}')]
    if isinstance(a, (list, tuple)):
        return [path] if len(a) != len(b) else [d for i, (x, y) in enumerate(zip(a, b)) for d in differing(x, y,
            f'{path}/{i}')]
    return [] if repr(a) == repr(b) else [path]


def differences(folder, whole):
    "How two finished runs differ: files by their bytes, the last checkpoint by all it holds but times"
    names = [sorted(p.name for p in f.iterdir()) for f in (folder, whole)]
    if names[0] != names[1]: return [f'files {names[0]}, not {names[1]}']
    bytes_of = [k for k in ('config.json', 'history.csv', 'model.safetensors', 'run.png')
                if (folder/k).read_bytes() != (whole/k).read_bytes()]
    return bytes_of + differing(*(read_checkpoint(checkpoints(f)[-1]) for f in (folder, whole)))


def inspect(folder, whole):
    "After a kill: checkpoints that cannot be read, rows of history, and whether these are the first of the whole run's"
    unreadable = 0
    for path in checkpoints(folder):
        try: read_checkpoint(path)
        except ValueError: unreadable += 1
    text = (folder/'history.csv').read_bytes() if (folder/'history.csv').exists() else b''
    complete = not text or text.endswith(b'\n')
    return unreadable, text.count(b'\n'), complete and (whole/'history.csv').read_bytes().startswith(text)


def steps(folder): return int(checkpoints(folder)[-1].stem[11:]) if checkpoints(folder) else 0
def writing(folder): return any(folder.glob('*.part'))


def killed(process, folder, rng, seconds):
    """Waits for a random moment of a run that takes so much longer, one in two for a write after it, and kills; was it
    at work, and was it writing?"""
    process.join(rng.uniform(0, seconds))
    if rng.random() < .5:
        while process.is_alive() and not writing(folder): time.sleep(.0002)
        time.sleep(rng.choice((0, 0, rng.uniform(0, .03))))
    was = process.is_alive()
    process.kill()
    process.join()
    return was and process.exitcode != 0, writing(folder)


def survive(
    runner:Runner,
    args:list, # Of `hyperflux`
    folder, # Of the run that is killed
    whole, # Of the one that was left in peace
    rng:random.Random,
    times:int, # How often it is killed
    seconds:float, # How long all of it takes in peace
# kills, during_write, before_first (kills before there was a checkpoint), unreadable (checkpoints), lost (rows of
# history), torn (histories that are not the first rows), differences
)->dict:
    "Kills a run, resumes it, and so on until it has finished"
    r = dict(kills=0, during_write=0, before_first=0, unreadable=0, lost=0, torn=0)
    rows = 0
    while True:
        resume = ['--resume']*bool(checkpoints(folder))
        if r['kills'] == times: runner(*args, *resume); break
        process = runner.start(*args, *resume)
        was, wrote = killed(process, folder, rng, seconds*(1 - steps(folder)/steps(whole)))
        if not was:
            if process.exitcode: raise RuntimeError((runner.cwd/'said.txt').read_text())
            if r['kills']: break                                    # it was faster
            seconds = seconds/2
            clear_run(folder)
            continue
        unreadable, now, prefix = inspect(folder, whole)
        for k, n in dict(kills=1, during_write=wrote, before_first=not checkpoints(folder), unreadable=unreadable,
                         lost=max(0, rows - now), torn=not prefix).items():
            r[k] += int(n)
        rows = now
    lines = [len((f/'history.csv').read_bytes().splitlines()) for f in (folder, whole)]
    return dict(r, lost=r['lost'] + lines[1] - lines[0], differences=differences(folder, whole))


def reference(runner, setting, epochs):
    "A run in peace: its folder, and how long it took"
    whole = runner.cwd/f'whole-{list(SETTINGS).index(setting)}'
    began = time.perf_counter()
    runner(*arguments(setting, whole, epochs))
    return whole, time.perf_counter() - began


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--runs', type=int, default=50)
    ap.add_argument('--epochs', type=int, default=6)
    ap.add_argument('--seed', type=int, default=0, help='of the moments')
    ap.add_argument('--out', default='nbs/results/kill.json')
    a = ap.parse_args()
    torch.set_num_threads(1)
    changed = ''.join(f' --{k} {v}' for k, v in vars(a).items() if v != ap.get_default(k))
    record, rng, rows = provenance(f'OMP_NUM_THREADS=1 python -m tests.study.kill{changed}'), random.Random(a.seed), []
    with tempfile.TemporaryDirectory() as tmp:
        runner = runner_in(tmp)
        peace = {s: reference(runner, s, a.epochs) for s in list(SETTINGS)[:a.runs]}
        for i in range(a.runs):
            setting = list(SETTINGS)[i % len(SETTINGS)]
            whole, seconds = peace[setting]
            folder = Path(tmp)/f'run-{i}'
            r = survive(runner, arguments(setting, folder, a.epochs), folder, whole, rng, rng.randint(1, 4), seconds)
            rows.append(dict(run=i, setting=setting, **r))
            print(f"{i + 1:>3} of {a.runs}  {setting:<42}" + '  '.join(f'{k} {v}' for k, v in r.items()), flush=True)
            for f in folder.iterdir(): f.unlink()
    total = {k: sum(r[k] for r in rows) for k in ('kills', 'during_write', 'before_first', 'unreadable', 'lost',
                                                  'torn')}
    record |= dict(n=a.runs, epochs=a.epochs, seed=a.seed, **total, identical=sum(not r['differences'] for r in rows),
                   settings=SETTINGS, rows=rows)
    write_json(record, a.out)
    shown = 'n', 'kills', 'during_write', 'before_first', 'identical', 'unreadable', 'lost', 'torn'
    print('\n' + table(shown, [[str(record[k]) for k in shown]], left=0) + f'\n\nwritten to {a.out}')


if __name__ == '__main__': main()
