"""Does the scheduler arrive? Runs at many targets, lengths, batch sizes and networks, ours and the authors'.

    python -m benchmarks.reliability
    python -m benchmarks.reliability rest           # the main job with a controller that rests, and with one that does not

All on the shipped images. Runs that are there are not made again. Results go to nbs/results/reliability.json,
reliability_runs.csv and reliability_curves.csv, or rest.json and so on, with every look of the controller.
"""
import argparse
from functools import partial

from hyperflux.core.control import LogController
from hyperflux.study.config import Config
from hyperflux.study.jobs import Job, run_jobs
from hyperflux.study.sweep import aimed, write_family

from benchmarks.common import root as repository

TARGETS = .5, .8, .9, .95, .98, .99, .995, .999
LENGTHS = 2, 5, 10, 20, 50                              # epochs in all under the method: half prune, half regrow


def grid(smoke=False):
    "All configurations, the cheap ones first"
    run = lambda length, **kw: Config(dense_epochs=2, prune_epochs=(length + 1)//2, regrow_epochs=length//2, **kw)
    if smoke: return [run(5, sparsity=.7, batch_size=32, method=m) for m in ('hyperflux', 'authors')]
    seeds = lambda n: (0, 1) if n <= 10 else (0,)                            # the long ones once
    wide = [run(n, sparsity=s, seed=seed, batch_size=b)
            for n in LENGTHS for b in (32, 128) for s in TARGETS for seed in seeds(n) if (n, b) != (50, 32)]
    large = [run(n, sparsity=s, batch_size=512) for n in (10, 20, 50) for s in TARGETS]
    conv = [run(n, sparsity=s, seed=seed, batch_size=64, model='benchmarks.law:small_conv')
            for n in LENGTHS for s in TARGETS[:-1] for seed in seeds(n)]
    theirs = [run(n, sparsity=s, batch_size=64, method='authors') for n in LENGTHS for s in TARGETS]
    return wide + large + conv + theirs


restless = partial(LogController, rest=0.)              # presses however low density is


def rests():
    "The main job in six epochs, three seeds"
    return [Config(dense_epochs=1, prune_epochs=3, regrow_epochs=2, seed=seed, controller=c)
            for seed in (3, 4, 5) for c in (None, 'benchmarks.reliability:restless')]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='?', choices=('reliability', 'rest'), default='reliability', help='which runs')
    p.add_argument('--runs', default='runs/reliability', help='folder for the single runs (runs/reliability)')
    p.add_argument('--out', help='where the record goes, without ending (nbs/results/WHAT)')
    p.add_argument('--processes', type=int, default=2, help='runs at a time (2)')
    p.add_argument('--smoke', action='store_true', help='two runs: does it run at all?')
    a = p.parse_args()
    todo = rests() if a.what == 'rest' else grid(a.smoke)
    say = lambda done, total: print(f'{len(done)} of {total}', flush=True)
    results = run_jobs([Job.of(aimed, c) for c in todo], a.runs, processes=a.processes, show=say)
    asked = 'model', 'data', 'method', 'sparsity', 'seed', 'batch_size', 'prune_epochs', 'regrow_epochs'
    for c, r in zip(todo, results):                     # a run that was refused is a row too, with its settings
        if 'error' in r: r['row'] = {k: getattr(c, k) for k in asked}
        if a.what == 'rest': r['row']['controller'] = (c.controller or 'ours').split(':')[-1]
    out = a.out or repository/f'nbs/results/{a.what}'
    command = 'python -m benchmarks.reliability' + ' rest'*(a.what == 'rest')
    write_family(results, out, command, **(dict(points=10**6) if a.what == 'rest' else {}))


if __name__ == '__main__': main()
