"""Latency as the cost: is a network as fast as it was asked to be?

One convolution is timed at every width. Some networks get a latency each, at any widths and at multiples of 4 or 8,
and are checked at random widths that no table was made from. Then each is pruned to a share of its time, on random
data, since accuracy is not the point, and compacted; the dense and the small network take short turns of random order.
A share is the small one's time over the dense one's in the same round.

--clock cpu counts the processor's time of this process, not the wall's: on a machine that others use, too, the wall
counts their work. It needs a single thread. What was measured is told by both clocks.
"""
import argparse, os, random, statistics, sys, time

import torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux
from hyperflux.deploy import compact
from hyperflux.lab.models import lenet5, resnet20
from hyperflux.structure import channels
from hyperflux.structure.latency import Latency, steady

from .common import provenance, spelled, stats, table, write_json


def perceptron():
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))


def small_vgg():
    "Six convolutions with batch norm, and a hidden layer"
    layers, ins = [], 3
    for outs in 32, 64, 128:
        for i in ins, outs: layers += [nn.Conv2d(i, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()]
        layers, ins = [*layers, nn.MaxPool2d(2)], outs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 10))


# Name → in words, network, samples, shape of one, what widths are multiples of, the share of its time that is asked.
# LeNet-5 is too narrow for multiples of 8, and so is ResNet-20 for 40 %: eight channels a layer take half of its time.
MODELS = dict(lenet5=('LeNet-5', lenet5, 16, (1, 28, 28), 4, .4),
              vgg=('VGG-like', small_vgg, 8, (3, 32, 32), 8, .4),
              resnet20=('ResNet-20', resnet20, 8, (3, 32, 32), 8, .6),
              perceptron=('784-1000-500-10', perceptron, 64, (784,), 8, .4))


def times(runs, rounds, turn=1e-3):
    "Name → clock → seconds of a call, one a round: short turns of random order, as `hyperflux.helpers.turns`"
    clocks, rng, found = dict(wall=time.perf_counter, cpu=time.process_time), random.Random(0), {}
    for k, f in runs.items():
        f()
        t = time.perf_counter()
        f()
        found[k] = dict(n=max(1, int(turn/(time.perf_counter() - t))), wall=[], cpu=[])
    for _ in range(rounds):
        for k in rng.sample(list(runs), len(runs)):
            f, n, began = runs[k], found[k]['n'], {c: clock() for c, clock in clocks.items()}
            for _ in range(n): f()
            for c, clock in clocks.items(): found[k][c].append((clock() - began[c])/n)
    return found


def timed_by(clock, rounds):
    "What `Latency` takes as a way to time"
    def timed(runs):
        with torch.inference_mode(): found = times(runs, rounds)
        return steady({k: f[clock] for k, f in found.items()})
    return timed


def stairs(rounds, clock, most):
    "One convolution of 3×3 at every width: milliseconds"
    runs = {}
    for w in range(1, most + 1):
        layer, x = nn.Conv2d(w, w, 3, padding=1, bias=False), torch.randn(8, w, 16, 16)
        runs[w] = lambda layer=layer, x=x: layer(x)
    with torch.inference_mode(): found = times(runs, rounds)
    return [dict(width=w, **stats([1e3*t for t in f[clock]])) for w, f in found.items()]


def pruned(model, example, latency, multiple, asked, steps):
    "The small network, what is predicted of it as a share of the whole, and its widths"
    groups = channels(model, example, multiple=multiple)
    opt = torch.optim.SGD(model.train().parameters(), .05, momentum=.9)
    rest = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    pruner = Hyperflux(model, opt, sparsity=1 - asked, steps=steps, groups=groups, cost=latency)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(8, *example.shape[1:], generator=g), torch.randint(10, (8,), generator=g)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step(), rest.step()
    share = pruner.groups.left(pruner.gate)/pruner.groups.whole
    widths = [r['open'] for r in pruner.groups.widths(pruner.gate)]
    pruner.detach()
    return compact(model.eval(), example)[0], share, widths


def landing(name, latency, steps, rounds, clock):
    "Pruned to the share, compacted, measured"
    _, make, n, shape, multiple, asked = MODELS[name]
    torch.manual_seed(0)
    dense, example = make().eval(), torch.randn(n, *shape)
    small, predicted, widths = pruned(make(), example, latency, multiple, asked, steps)
    with torch.inference_mode(): found = times(dict(dense=lambda: dense(example), small=lambda: small(example)), rounds)
    shares = {c: stats([a/b for a, b in zip(found['small'][c], found['dense'][c])]) for c in ('wall', 'cpu')}
    ms = {k: {c: 1e3*statistics.median(f[c]) for c in ('wall', 'cpu')} for k, f in found.items()}
    return dict(model=name, asked=asked, predicted=predicted, measured=shares[clock], wall=shares['wall'], ms=ms,
                widths='-'.join(map(str, widths)), load=os.getloadavg()[0])


def tables_of(record):
    "What a record says, for a terminal"
    names = {m['model']: m['name'] for m in record['models']}
    rows = []
    for model, multiple in dict.fromkeys((r['model'], r['multiple']) for r in record['tried']):
        off = [abs(r['predicted']/r['measured'] - 1) for r in record['tried']
               if (r['model'], r['multiple']) == (model, multiple) and not r['fitted']]
        rows.append((names[model], str(multiple), str(len(off)), f'{statistics.median(off):.1%}', f'{max(off):.1%}'))
    yield table(('network', 'multiples of', 'n', 'median error', 'largest'), rows, left=1)
    def spread(s): return f"{s['median']:.1%}", f"{s['q1']:.1%}–{s['q3']:.1%}"
    rows = [(names[r['model']], f"{r['asked']:.1%}", f"{r['predicted']:.1%}", *spread(r['measured']),
             *spread(r['wall']), f"{r['load']:.1f}") for r in record['landings']]
    head = 'network', 'asked', 'predicted', 'measured', 'quartiles', 'by the wall', 'quartiles', 'load'
    yield table(head, rows, left=1)


def arguments(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.latency', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='a few turns: checks that everything runs, measures nothing')
    p.add_argument('--models', help=f"comma-separated, of {', '.join(MODELS)} (default: all; with --smoke the last)")
    p.add_argument('--clock', choices=('wall', 'cpu'), default='wall', help='cpu: on a machine that others use')
    p.add_argument('--threads', type=int, default=1, help='of the CPU (default: 1)')
    p.add_argument('--rounds', type=int, default=25, help='turns of each (default: 25)')
    p.add_argument('--out', metavar='FILE.json', help='write a record')
    args = p.parse_args(argv)
    args.models = args.models.split(',') if args.models else list(MODELS)[-1 if args.smoke else 0:]
    if unknown := [m for m in args.models if m not in MODELS]:
        p.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    for name in ('rounds', 'threads'):
        if (n := getattr(args, name)) < 1: p.error(f"--{name} is a whole number above 0: got {n}")
    if args.clock == 'cpu' and args.threads > 1:
        p.error(f"--clock cpu adds up what all threads take, so it needs --threads 1: got {args.threads}")
    return args


def main(argv=None):
    "Runs what the arguments ask for, prints it, and returns the record"
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds, networks, steps, most = (2, 4, 100, 3) if args.smoke else (args.rounds, 48, 200, 64)
    command = spelled('python -m benchmarks.latency', sys.argv[1:] if argv is None else argv)
    record = dict(benchmark='latency', **provenance(command), smoke=args.smoke, clock=args.clock, rounds=rounds,
                  unit='ns; stairs and landings ms', models=[], stairs=[], tried=[], landings=[])
    h = record['hardware']
    print(f"{h['cpu']}, {h['cores']} cores, {h['threads']} threads, load {h['load_before']}", flush=True)
    record['stairs'] = stairs(rounds, args.clock, most)
    for model in args.models:
        name, make, n, shape, of, _ = MODELS[model]
        record['models'].append(dict(model=model, name=name, samples=n, multiple=of))
        for multiple in (1, of):
            latency = Latency(make(), torch.randn(n, *shape), multiple=multiple, networks=networks,
                              timed=timed_by(args.clock, rounds))
            record['tried'] += [dict(model=model, multiple=multiple, **r) for r in latency.tried]
            print(f'{name}, multiples of {multiple}: {latency}', flush=True)
        record['landings'].append(landing(model, latency, steps, 3 if args.smoke else 300, args.clock))
    print(*tables_of(record), sep='\n\n')
    if args.out: write_json(record, args.out)
    return record


if __name__ == '__main__': main()
