"""From which density on a sparse kernel beats the dense layer: layers of LeNet-300-100 and VGG-19, alone, with random
masks, and both networks as `sparsify` leaves them.

    python -m benchmarks.kernels --out nbs/results/sparse_kernels.json

All kernels of a layer take the same batches in one run, in short turns of random order; a ratio is the dense layer's
time over the kernel's, so above 1 the kernel is faster. `chained` is the product alone, as between the layers of a
chain. Goals, on two CPU cores: 3 for LeNet-300-100 at 99 % and batch 64, 2.5 for VGG-19, nothing below 1.
"""
import argparse, functools

import torch
from torch import nn

from hyperflux.lab.models import lenet300, vgg19
from hyperflux.deploy.candidates import candidates
from hyperflux.deploy.sparsify import sparsify
from hyperflux.helpers import race

from .common import interleave, provenance, ratios, spelled, stats, table, write_json

DENSITIES, BATCHES = (.005, .01, .05, .1, .2), (1, 64)
IMAGES = (64, 32), (128, 16), (256, 8), (512, 4), (512, 2) # Channels, size
LAYERS = {f'{i}→{o}': (functools.partial(nn.Linear, i, o), (i,)) for i, o in ((784, 300), (300, 100))} | {
    f'{c}→{c}, 3×3, {s}×{s}': (functools.partial(nn.Conv2d, c, c, 3, padding=1), (c, s, s)) for c, s in IMAGES}
# Densities by the number of inputs or channels
MODELS = dict(lenet300=(lenet300, (1, 28, 28), {784: .01, 300: .01, 100: .1}),
              vgg19=(vgg19, (3, 32, 32), {3: .5, 64: .2, 128: .1, 256: .05, 512: .01}))
CPU = torch.device('cpu')


def mask(layer, density, g):
    "Random zeros; the rest grows, so that numbers keep their size through many layers"
    with torch.no_grad(): layer.weight.mul_((torch.rand(layer.weight.shape, generator=g) < density)*density**-.5)


def measured(times, names):
    "Rows of what `interleave` gave"
    return [dict(kernel=k, unit='ms', **stats(sum(times[k], [])), speedup=ratios(times['dense'], times[k]))
            for k in names]


def one_layer(name, batch, density, rounds):
    "A row for each kernel that is not hopeless"
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False)
    mask(layer, density, g)
    modules = candidates(layer, torch.randn(batch, *shape, generator=g))
    enter = modules['csr pixel'].enter
    def fresh():
        x = torch.randn(batch, *shape, generator=g)
        return x, enter(x)
    steps = {'dense': lambda x, s: layer(x)} | {k: (lambda x, s, m=m: m(x)) for k, m in modules.items()}
    pixel = {k.replace('pixel', 'chained'): m for k, m in modules.items() if k.endswith('pixel')}
    steps |= {k: (lambda x, s, m=m: m.core(s)) for k, m in pixel.items()}
    b = fresh()
    first = race({k: functools.partial(f, *b) for k, f in steps.items()}, 1)
    steps = {k: f for k, f in steps.items() if first[k] < 4*first['dense']}
    burst = max(2, min(30, int(.005/first['dense'])))
    rows = measured(interleave(steps, fresh, CPU, rounds, burst, 1), steps)
    return [dict(layer=name, batch=batch, density=density, **r) for r in rows]


def one_model(name, batch, rounds):
    "What `sparsify` makes of a network"
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    make, shape, densities = MODELS[name]
    net = make().eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, nn.Conv2d) or isinstance(m, nn.Linear) and name == 'lenet300':
            mask(m, densities[m.weight.shape[1]], g)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, .1, generator=g)
            m.running_var.uniform_(.5, 1.5, generator=g)
    new, report = sparsify(net, torch.randn(batch, *shape, generator=g))
    burst = 20 if name == 'lenet300' else 3
    ways = dict(dense=net, sparsified=new)
    def fresh(): return (torch.randn(batch, *shape, generator=g),)
    rows = measured(interleave(ways, fresh, CPU, rounds, burst, 2), ways)
    return dict(model=name, batch=batch, gap=report.gap, notes=report.notes, ways=rows, layers=report.layers)


def table_of(rows):
    def cells_of(r):
        what, gain = (r['layer'], str(r['batch']), f"{r['density']:.1%}", r['kernel'], str(r['n'])), r['speedup']
        return *what, f"{r['median']:.4f}", f"{gain['median']:.2f}", f"{gain['q1']:.2f} to {gain['q3']:.2f}"
    cells = [*map(cells_of, rows)]
    return table(('layer', 'batch', 'density', 'kernel', 'n', 'median ms', '× dense', 'quartiles'), cells, left=4)


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.kernels', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--threads', default='1,2',
                   help='CPU threads: layers alone with the first number, networks with each (1,2)')
    p.add_argument('--rounds', type=int, default=7, help='turns of each, twice as many for networks (7)')
    p.add_argument('--smoke', action='store_true', help='two layers and LeNet-300-100, one density: measures nothing')
    p.add_argument('--note', default='', help='a line for the record: what else the machine did')
    p.add_argument('--out', help='a JSON file for the record')
    a = p.parse_args(argv)
    threads = [int(t) for t in a.threads.split(',')]
    torch.set_num_threads(threads[0])
    torch.set_flush_denormal(True)
    options = ['--threads', a.threads, '--rounds', str(a.rounds)] + ['--smoke']*a.smoke
    command = spelled('python -m benchmarks.kernels', options)
    record = dict(benchmark='kernels', **provenance(command), smoke=a.smoke, note=a.note,
                  goals=dict(lenet300=3, vgg19=2.5), rows=[], models=[])
    h = record['hardware']
    print(f"{h['cpu']}, {h['cores']} cores, {a.threads} threads, load {h['load_before']}; torch {record['torch']}; "
          f"commit {(record['commit'] or 'unknown')[:10]}", flush=True)
    for name in list(LAYERS)[1:3] if a.smoke else LAYERS:
        for batch in BATCHES:
            for density in (.05,) if a.smoke else DENSITIES:
                rows = [dict(threads=threads[0], **r) for r in one_layer(name, batch, density, a.rounds)]
                record['rows'] += rows
                print(table_of(rows), flush=True)
    for n in threads:
        torch.set_num_threads(n)
        for name in list(MODELS)[:1] if a.smoke else MODELS:
            for batch in BATCHES:
                m = dict(threads=n, **one_model(name, batch, 2*a.rounds))
                record['models'].append(m)
                dense, new = m['ways']
                print(f"{name}, batch {batch}, {n} threads: dense {dense['median']:.3f} ms, sparsified "
                      f"{new['median']:.3f} ms, {new['speedup']['median']:.2f} ×", *m['notes'], sep='\n  ', flush=True)
    if a.out: write_json(record, a.out)
    return record


if __name__ == '__main__': main()
