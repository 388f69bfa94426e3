"""Do two versions of the package train the same network, to the bit?  python -m benchmarks.bits BEFORE [AFTER]

BEFORE and AFTER are folders that hold a package `hyperflux` (two checkouts). Each run of the main command is made
with both, from its start
to its end; it is also stopped in the middle and gone on with, by the version that began it and by the other one.
Weights and
history are then compared as they lie in the files. What is finished in --out is not made again."""
import argparse, csv, hashlib, os, signal, subprocess, sys, time
from pathlib import Path

from hyperflux.helpers import format_table
from safetensors import safe_open

RUNS = dict(default=[], lenet5=['--model', 'lenet5'], l0=['--method', 'l0'], rigl=['--method', 'rigl'],
            imp=['--method', 'imp'],
            authors=['--method', 'authors', '--epochs', '20'])
ALWAYS = ['--seed', '3', '--quiet', '--device', 'cpu', '--threads', '1']


def command(package, run, out, *more):
    "Arguments and environment of one run, by the package in that folder"
    words = [sys.executable, '-m', 'hyperflux', 'prune', '--epochs', '6', *ALWAYS, *RUNS[run], '--out', str(out), *more]
    return words, os.environ | {'PYTHONPATH': str(package), 'PYTHONSAFEPATH': '1', 'OMP_NUM_THREADS': '1'}


def train(package, run, out, *more):
    "To its end; what it says is shown if it fails"
    words, env = command(package, run, out, *more)
    done = subprocess.run(words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode: raise RuntimeError(f'{run} with {package}: {done.stdout}')


def stop_midway(package, run, out):
    "Ctrl-C once half of the epochs lie in a checkpoint"
    epochs = int((RUNS[run] + ['6'])[-1]) if '--epochs' in RUNS[run] else 6
    words, env = command(package, run, out)
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while process.poll() is None and rows(out) < epochs//2: time.sleep(.01)
    process.send_signal(signal.SIGINT)
    process.wait()
    if (out/'summary.json').exists(): raise RuntimeError(f'{run} was over before it could be stopped')


def rows(out):
    "Epochs in the history so far"
    path = out/'history.csv'
    return max(len(path.read_text().splitlines()) - 1, 0) if path.exists() else 0


def digests(out):
    "Of the weights, and of the history"
    h = hashlib.sha256()
    with safe_open(out/'model.safetensors', 'np') as f:
        for k in sorted(f.keys()): h.update(k.encode() + f.get_tensor(k).tobytes())
    with open(out/'history.csv', newline='') as f: history = repr([sorted(r.items()) for r in csv.DictReader(f)])
    return h.hexdigest()[:12], hashlib.sha256(history.encode()).hexdigest()[:12]


def compare(run, before, after, out):
    "One row of the table"
    ways = dict(before=(before, before), after=(after, after), other=(before, after))
    found = {}
    for way, (first, then) in ways.items():
        whole, halved = out/f'{run}-{way}', out/f'{run}-{way}-halved'
        if way != 'other':
            if not (whole/'summary.json').exists(): train(first, run, whole, '--overwrite')
            found[way] = digests(whole)
        if not (halved/'summary.json').exists():
            if not list(halved.glob('checkpoint-*.pt')): stop_midway(first, run, halved)
            train(then, run, halved, '--resume')
        found[way + ', halved'] = digests(halved)
    weights, history = ({k: v[i] for k, v in found.items()} for i in (0, 1))
    return [run, weights['before'], weights['after'], *('equal' if len(set(d.values())) == 1 else ', '.join(
        k for k, v in d.items() if v != d['before']) + ' differ' for d in (weights, history))]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('before', type=Path, help='folder that holds the package as it was')
    p.add_argument('after', type=Path, nargs='?', default=Path(__file__).parents[1],
                   help='as it is; default: this checkout')
    p.add_argument('--out', type=Path, default=Path('runs/bits'), help='folder of the runs')
    p.add_argument('--runs', default=','.join(RUNS), help='which, separated by commas')
    a = p.parse_args()
    table = [compare(run, a.before.resolve(), a.after.resolve(), a.out.resolve()) for run in a.runs.split(',')]
    print(format_table(['run', 'weights before', 'weights after', 'weights, also gone on with', 'history'], table,
                       left=5))
    if any('differ' in x for row in table for x in row): sys.exit(1)


if __name__ == '__main__': main()
