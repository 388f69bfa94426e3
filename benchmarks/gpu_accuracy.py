"""What pruning costs in accuracy: ResNet-18 and VGG-19 on Fashion-MNIST, padded to 32×32, dense and then at several
sparsities, over seeds.

    python -m benchmarks.gpu --accuracy --root FOLDER --out nbs/results/gpu_accuracy.json

One dense training for each network and seed; every sparsity starts from its weights. Batches of 512, bf16, channels
last, SGD with momentum 0.9, decay 5e-4,
label smoothing 0.1, shifts by up to 2 pixels and flips. The learning rates are those of the recipe resnet18-quick,
which are for batches of 128 and few epochs,
with an epoch of warm-up; nothing was tuned on the test set (--valid 0.1 reports on held-out images instead, for
choosing). The accuracy is that of the last epoch.

All of one seed comes before the next, and a run is begun only if the longest of its kind so far would still fit
--budget. A run that is done is known by its folder
in --runs and by its row in --out: the same command goes on where it was stopped, at the last run that was not
finished. No checkpoints within a run, which takes
about a minute on a large GPU, and no figures: only torch, torchvision, numpy, fastcore and safetensors are needed.
"""
import argparse, dataclasses, functools, json, multiprocessing, sys, time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from statistics import mean, stdev

import torch
from safetensors.torch import save_model

from hyperflux.lab.data import Data, Split
from hyperflux.lab.datasets import load_data
from hyperflux.lab.models import MODELS
from hyperflux.study.config import Config
from hyperflux.study.results import summary, write_history
from hyperflux.study.run import Run, train_epoch
from hyperflux.study.train import fit

from .common import provenance, resume, spelled, table, write_json

BUDGET = 540
SETTINGS = dict(size=32, batch_size=512, dense_epochs=15, prune_epochs=15, regrow_epochs=15, optimizer='sgd',
                momentum=.9, weight_decay=5e-4, warmup_epochs=1.,
                dense_lr=.05, dense_final_lr=1e-3, prune_lr=.05, prune_final_lr=.02, regrow_lr=.02,
                regrow_final_lr=1e-4, crop=2, flip=True,
                precision='bf16', channels_last=True)
TINY = dict(batch_size=20, dense_epochs=1, prune_epochs=1, regrow_epochs=1)          # for --smoke, of a thousand images
RUN = 'model', 'seed', 'sparsity', 'dense_accuracy', 'accuracy', 'split', 'keep', 'left', 'weights', 'refloated', 'seconds'


# One run

@functools.lru_cache(maxsize=1)
def data_of(name, root, valid, size, smoke):
    "The images; read once in each process"
    data = load_data(name, root, valid=valid, size=size)
    few = lambda s, n: s and Split(s.images[:n], s.labels[:n])
    return Data(name, data.classes, few(data.train, 1000), few(data.test, 200), few(data.valid, 200)) if smoke else data


def dense(config, folder, data, device):
    "Trains without a pruner, with the package's own loop, and leaves the weights in the folder"
    torch.set_flush_denormal(True)
    run, began = Run(config, data, device), time.perf_counter()
    while run.epoch < config.dense_epochs:
        train_epoch(run)
        run.epoch += 1
    part = folder/'model.safetensors.part'
    save_model(run.model, str(part))
    part.replace(folder/'model.safetensors')
    return dict(accuracy=run.evaluate()['accuracy'], seconds=time.perf_counter() - began)


def pruned(config, folder, data, device):
    "Prunes and regrows; nothing but history.csv and the summary is written, so that no disk and no plotting library takes part"
    run = fit(config, device=device, progress=False, data=data)
    write_history(run.history, folder/'history.csv')
    return summary(run) | dict(seconds=run.seconds, refloated=sum(r['stage'] == 'refloated'
                                                                  for r in run.pruner.history))


def work(config, folder, source, device):
    "What a run came to, made now or before"
    done, mine = Path(folder)/'summary.json', json.loads(json.dumps(dataclasses.asdict(config)))
    if done.is_file():
        found = json.loads(done.read_text(encoding='utf-8'))
        differ = [f'{k} {found["config"].get(k)!r} there, {v!r} here' for k,
                  v in mine.items() if found['config'].get(k) != v]
        if found['source'] != list(source): differ.append(f"images {found['source']} there, {list(source)} here")
        if differ:
            raise ValueError(f"{folder} holds another run ({'; '.join(differ)}): choose another folder with --runs, or "
                             "remove it")
        return found
    torch.set_num_threads(1)
    done.parent.mkdir(parents=True, exist_ok=True)
    found = (dense if config.dense_epochs else pruned)(config, done.parent, data_of(*source), device)
    write_json(dict(found, config=mine, source=source), done)
    return json.loads(done.read_text(encoding='utf-8'))


# All runs

class Here:
    "As a pool of processes, but in this one"
    def submit(self, f, *args):
        future = Future()
        try: future.set_result(f(*args))
        except Exception as e: future.set_exception(e)
        return future

    def __enter__(self): return self
    def __exit__(self, *_): pass


def campaign(tasks, configure, runs, source, device, jobs, end, tell):
    "Runs (network, seed, sparsity; None: dense) in their order, `jobs` at a time, until time is up; what was not begun"
    longest, active, ready, tasks = {}, {}, set(), list(tasks)
    folder = lambda model, seed, s: runs/f"{model}-{seed}-{'dense' if s is None else format(s, 'g')}"
    def begin(pool):
        now = time.perf_counter()
        free = (t for t in tasks if t[2] is None or t[:2] in ready)            # the others wait for their dense network
        task = next((t for t in free if now + longest.get((t[0], t[2] is None), 0) < end), None)
        if task is None: return False
        tasks.remove(task)
        active[pool.submit(work, configure(*task, folder(*task[:2], None)/'model.safetensors'), folder(*task), source,
                           device)] = task, now
        return True
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context('spawn')) if jobs > 1 else Here() as pool:
        while True:
            while len(active) < jobs and begin(pool): pass
            if not active: return tasks
            for future in wait(active, return_when=FIRST_COMPLETED).done:
                task, start = active.pop(future)
                kind = task[0], task[2] is None
                longest[kind] = max(longest.get(kind, 0), time.perf_counter() - start)
                if future.exception() is None and task[2] is None: ready.add(task[:2])
                tell(task, future)


def rows_of(runs):
    "One row for each network and sparsity: n, mean and sample standard deviation over seeds"
    groups = {}
    for r in runs: groups.setdefault((r['model'], r['sparsity']), []).append(r)
    spread = lambda rs, k: (round(mean(r[k] for r in rs), 3), round(stdev(r[k] for r in rs), 3) if len(rs) > 1 else 0.)
    rows = []
    for (model, s), rs in sorted(groups.items()):
        (d, d_std), (a, a_std), (cost, cost_std) = spread(rs, 'dense_accuracy'), spread(rs,
            'accuracy'), spread([dict(c=r['dense_accuracy'] - r['accuracy']) for r in rs], 'c')
        rows.append(dict(model=model, sparsity=s, n=len(rs), seeds=sorted(r['seed'] for r in rs), dense_mean=d,
                         dense_std=d_std, accuracy_mean=a, accuracy_std=a_std,
                         cost_mean=cost, cost_std=cost_std, weights=rs[0]['weights'], left_asked=rs[0]['keep'],
                         left_min=min(r['left'] for r in rs),
                         left_max=max(r['left'] for r in rs), seconds_mean=round(mean(r['seconds'] for r in rs), 1)))
    return rows


# The command

def table_of(rows):
    cells = [(r['model'], f"{r['sparsity']:.1%}", str(r['n']), f"{r['dense_mean']:.2f} ± {r['dense_std']:.2f}",
              f"{r['accuracy_mean']:.2f} ± {r['accuracy_std']:.2f}",
              f"{r['cost_mean']:+.2f} ± {r['cost_std']:.2f}", f"{r['left_min']:,}", f"{r['left_asked']:,}",
              f"{r['seconds_mean']:.0f}") for r in rows]
    return table(('network', 'sparsity', 'n', 'dense %', 'pruned %', 'dense − pruned', 'left', 'asked', 's a run'),
                 cells, left=1)


def arguments(argv):
    p = argparse.ArgumentParser(prog='python -m benchmarks.gpu --accuracy', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='LeNet-5 on a thousand images, on the CPU: checks that '
                                                        'everything runs, measures nothing')
    p.add_argument('--data', choices=('fashion-mnist', 'fashion-small'),
                   help='default: fashion-mnist; with --smoke, fashion-small, the shipped part')
    p.add_argument('--root', help="folder of Fashion-MNIST (torchvision's or Debian's layout)")
    p.add_argument('--models', help='comma-separated (default: resnet18,vgg19)')
    p.add_argument('--sparsities', type=float, nargs='+', help='default: 0.9 0.95 0.98 0.99 0.995')
    p.add_argument('--seeds', type=int, default=5, help='at most so many, as time allows (default: 5)')
    p.add_argument('--epochs', type=int, nargs=3, metavar=('DENSE', 'PRUNE', 'REGROW'), help='default: 15 15 15')
    p.add_argument('--set', nargs='+', default=[], metavar='NAME=VALUE',
                   help="other settings of a run, such as prune_lr=0.1; see `hyperflux.study.recipes.Config`")
    p.add_argument('--valid', type=float, default=0., help='fraction of the training set to hold out and report on, in '
                                                           'place of the test set')
    p.add_argument('--jobs', type=int, default=1, help='processes that share the GPU: small networks leave it idle '
                                                       '(default: 1)')
    p.add_argument('--budget', type=float, default=BUDGET, metavar='SECONDS',
                   help=f'begin no run that would not be done by then (default: {BUDGET})')
    p.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda; with --smoke cpu')
    p.add_argument('--runs', default='runs/gpu_accuracy', help='folder of the single runs (default: runs/gpu_accuracy)')
    p.add_argument('--commit', help='for the record, where git cannot tell')
    p.add_argument('--out', metavar='FILE.json', help='the record; runs that are in it are left out')
    p.add_argument('--fresh', action='store_true', help='begin the record anew')
    a = p.parse_args(argv)
    a.data, a.device = a.data or ('fashion-small' if a.smoke else 'fashion-mnist'), a.device or ('cpu' if a.smoke
                                                                                                 else 'cuda')
    a.models = a.models.split(',') if a.models else ['lenet5'] if a.smoke else ['resnet18', 'vgg19']
    a.sparsities = a.sparsities or ([.9, .95] if a.smoke else [.9, .95, .98, .99, .995])
    kinds = {f.name: f.type for f in dataclasses.fields(Config) if f.name not in ('model', 'seed', 'sparsity',
                                                                                  'weights', 'data', 'valid')}
    try:
        a.set = {k: dict(true=True, false=False)[v.lower()] if kinds[k] is bool else kinds[k](v) for k, _,
                 v in (o.partition('=') for o in a.set)}
    except (KeyError, ValueError) as e: p.error(f"--set takes NAME=VALUE, where NAME is one of {', '.join(kinds)}: {e}")
    if unknown := [m for m in a.models if m not in MODELS]:
        p.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    if a.epochs and a.epochs[0] < 1: p.error(f"--epochs begins with the dense ones, 1 or more: got {a.epochs[0]}")
    for k in 'seeds', 'jobs', 'budget':
        if getattr(a, k) <= 0: p.error(f"--{k} is above 0: got {getattr(a, k):g}")
    if a.device == 'cuda' and not torch.cuda.is_available():
        p.error("torch finds no CUDA device here; --smoke checks on the CPU that everything runs")
    return p, a


def main(argv):
    "Runs what the arguments ask for, prints it, and returns the record"
    began = time.perf_counter()
    p, a = arguments(argv)
    torch.set_num_threads(1)
    settings = SETTINGS | (TINY if a.smoke else {})
    settings |= dict(zip(('dense_epochs', 'prune_epochs', 'regrow_epochs'), a.epochs or ())) | dict(data=a.data,
        valid=a.valid) | a.set
    def configure(model, seed, sparsity, weights):
        c = Config(model=model, seed=seed, **settings)
        return c if sparsity is None else dataclasses.replace(c, sparsity=sparsity, dense_epochs=0,
                                                              weights=str(weights))
    try:
        for s in a.sparsities: configure(a.models[0], 0, s, '')
        source = a.data, a.root, a.valid, settings['size'], a.smoke
        data = data_of(*source)
    except (ValueError, OSError) as e: p.error(str(e))
    record = dict(benchmark='gpu_accuracy', **provenance(spelled('python -m benchmarks.gpu --accuracy', argv)),
                  smoke=a.smoke, jobs=a.jobs,
                  images=dict(name=a.data, side=settings['size'], train=len(data.train.labels),
                              test=len(data.test.labels), held_out=len(data.valid.labels) if data.valid else 0),
                  settings=settings, rows=[], runs=[])
    record['commit'] = a.commit or record['commit']
    if not a.fresh:
        try: record = resume(a.out, record, ('settings', 'images'))
        except ValueError as e: p.error(str(e))
    have = {(r['model'], r['seed'], r['sparsity']) for r in record['runs']}
    record |= dict(failed=[], not_begun=[])
    tasks = []
    for seed in range(a.seeds):
        new = [(m, seed, s) for m in a.models for s in a.sparsities if (m, seed, s) not in have]
        tasks += [(m, seed, None) for m in dict.fromkeys(m for m, *_ in new)] + new
    print(f"{record['hardware']['gpu'] or record['hardware']['cpu']}; torch {record['torch']}; commit "
          f"{(record['commit'] or 'unknown')[:10]}; {data.name}: "
          f"{len(data.train.labels):,} images; {len(tasks)} runs to make, {a.jobs} at a time", flush=True)
    def tell(task, future):
        model, seed, s = task
        name, error = f"{model}, seed {seed}, {'dense' if s is None else format(s, '.1%')}", future.exception()
        if error:
            record['failed'].append(dict(model=model, seed=seed, sparsity=s,
                                         error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
            print(f"{name}: {record['failed'][-1]['error']}", flush=True)
        else:
            r = future.result()
            print(f"{name}: {r['accuracy']:.2f} %, {r['seconds']:.0f} s" + (f", {r['left']:,} of {r['keep']:,} weights "
                                                                            "left" if s else ''), flush=True)
            if s is not None: record['runs'].append({k: (r | dict(model=model, seed=seed, sparsity=s))[k] for k in RUN})
        record['rows'] = rows_of(record['runs'])
        if a.out: write_json(record, a.out)
    rest = campaign(tasks, configure, Path(a.runs), source, a.device, a.jobs, began + a.budget, tell)
    record['not_begun'] = [dict(model=m, seed=seed, sparsity=s) for m, seed, s in rest]
    if a.out and (record['runs'] or record['failed']): write_json(record, a.out)
    if rest:
        print(f"{len(rest)} runs not begun, for want of time or of their dense network: the same command goes on with "
              "them")
    if record['rows']: print(table_of(record['rows']))
    return record


if __name__ == '__main__': main(sys.argv[1:])
