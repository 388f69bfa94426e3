"""Where density goes under constant pressure: the runs behind the tutorials on convergence and on the pruning law.

    python -m benchmarks.law law          LeNet-300-100 on full Fashion-MNIST, 12 pressures, 2 seeds; then a prediction
                                          for 3 others, and these
    python -m benchmarks.law conv         a small convolutional network on the shipped images, 12 pressures
    python -m benchmarks.law converge     at one pressure of the law's: other beginnings, learning rates, dense epochs,
                                          gradient descent on presences
    python -m benchmarks.law bottleneck   one layer gated, pressure five times as high every ten epochs

Runs that are there are not made again. Results go to nbs/results/NAME.json, NAME_runs.csv and NAME_curves.csv.
"""
import argparse, functools, json
from pathlib import Path

from torch import nn

from hyperflux.lab.datasets import load_data
from hyperflux.core.settings import Settings
from hyperflux.study.laws import FORMS, fit_law
from hyperflux.study.config import Config
from hyperflux.study.jobs import Job, run_jobs
from hyperflux.study.sweep import under_pressure, write_family

from benchmarks.common import root as repository

PRESSURES = [2.**k for k in range(-4, 8)]
HELD_OUT = [.1, 3., 90.]
SEEDS = 0, 1


def small_conv(n_classes=10, in_shape=(1, 28, 28)):
    "Two convolutions with stride 2 and two linear layers, 21,000 weights"
    return nn.Sequential(nn.Conv2d(in_shape[0], 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, n_classes))


def staircase(epoch):
    "γ = 5^⌊epoch/10⌋ (arXiv 2504.05349)"
    return 5.**(epoch//10)


def config(seed=0, data='fashion-mnist', epochs=60, dense=0, model='lenet300', **more):
    return Config(model=model, data=data, seed=seed, dense_epochs=dense, prune_epochs=epochs, regrow_epochs=0, **more)


def law(run, out, smoke):
    seeds, pressures, held = (SEEDS[:1], PRESSURES[::2], HELD_OUT[1:2]) if smoke else (SEEDS, PRESSURES, HELD_OUT)
    make = lambda gammas: run([dict(config=config(s, **tiny(smoke)), gamma=g) for s in seeds for g in gammas])
    seen = make(pressures)
    rows = [r['row'] for r in seen]
    fits = {f: fit_law([r['gamma'] for r in rows], [r['density'] for r in rows], f) for f in FORMS}
    # written down before the other pressures are run
    said = []
    for form, w in fits.items():
        at = {k: v.tolist() for k, v in w.predict(held).items()}
        for i, g in enumerate(held): said.append(dict(form=form, gamma=g) | {k: at[k][i] for k in ('y', 'low', 'high')})
    Path(f'{out}_predicted.json').write_text(json.dumps(said, indent=1) + '\n')
    return seen + make(held)


def conv(run, out, smoke):
    more = tiny(smoke) or dict(data='fashion-small', epochs=150)
    c = config(model='benchmarks.law:small_conv', **more)
    return run([dict(config=c, gamma=g) for g in PRESSURES[:2 if smoke else None]])


def converge(run, out, smoke):
    adam, gamma = functools.partial(Settings, lr=1e-3), 4.
    kinds = {'trained first': (adam(), 10), 'low start': (adam(low=.05, high=.1), 0),
             'high start': (adam(low=1., high=1.), 0), 'slow': (adam(lr=3e-4), 0), 'fast': (adam(lr=3e-3), 0),
             'gradient descent': (Settings(sgd=True, lr=1e-3, low=2e-4, high=2e-4), 0)}
    if smoke: kinds = {k: (kinds[k][0], min(kinds[k][1], 1)) for k in ('trained first', 'gradient descent')}
    make = lambda settings, dense: dict(config=config(dense=dense, **tiny(smoke)), gamma=gamma, settings=settings)
    results = run([make(*kind) for kind in kinds.values()])
    for kind, r in zip(kinds, results):
        if 'row' in r: r['row'] = dict(kind=kind, **r['row'])
    return results


def bottleneck(run, out, smoke):
    how = dict(gamma=staircase, targets='5', looks=600)
    return run([dict(config=config(s, **tiny(smoke)), **how) for s in SEEDS[:1 if smoke else None]])


def tiny(smoke): return dict(data='fashion-small', epochs=1, batch_size=16) if smoke else {}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('law', 'conv', 'converge', 'bottleneck'))
    p.add_argument('--runs', default='runs/law', help='folder for the single runs, with which it goes on (runs/law)')
    p.add_argument('--out', help='where the record goes, without ending (nbs/results/WHAT)')
    p.add_argument('--root', help='folder of the full data set, if it is not where load_data looks')
    p.add_argument('--processes', type=int, default=2, help='runs at a time (2)')
    p.add_argument('--smoke', action='store_true', help='one seed, one epoch: does it run at all?')
    a = p.parse_args()
    out = a.out or repository/f'nbs/results/{dict(law="law_lenet300", conv="law_conv").get(a.what, a.what)}'
    shipped = a.smoke or a.what == 'conv'
    root = None if shipped else a.root
    load_data('fashion-small' if shipped else 'fashion-mnist', root)                # says at once if it is not there
    def run(asked):
        jobs = [Job.of(under_pressure, **kw, root=root) for kw in asked]
        say = lambda done, total: print(f'{len(done)} of {total}', flush=True)
        return run_jobs(jobs, a.runs, processes=a.processes, show=say)
    results = globals()[a.what](run, out, a.smoke)
    write_family(results, out, f'python -m benchmarks.law {a.what}')
    short = lambda v: f'{v:.4g}' if isinstance(v, float) else v
    for r in results:
        if 'error' in r: print(r['error'])
        else: print(*(f'{k} {short(r["row"][k])}' for k in ('gamma', 'seed', 'density', 'drift', 'accuracy')))


if __name__ == '__main__': main()
