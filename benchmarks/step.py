"""Step time and peak memory: dense training, Hyperflux eager, warm and compiled, gates in the graph, fixed masks.

All ways train the same network on the same random batches in one run, in short turns of random order, so that drift
hits all alike.
A ratio is the median, over rounds, of the way's median step over the dense one's in the same round. Memory is the
most that ten steps use above
what was in use before the network was made: on the CPU the resident memory of a process for each way (libraries and
compiler loaded beforehand),
on CUDA the allocator's count. --against FOLDER has the Hyperflux of another checkout take part, before a change,
say. Goals, eager and compiled, on two CPU cores: LeNet-300-100 1.6 and 1.25, ResNet-18 1.15 (eager).
"""
import argparse, contextlib, importlib, statistics, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from hyperflux.core.gates import Gated, initial_presence
from hyperflux.lab.models import lenet300
from hyperflux.core.pressure import presence_lr
from hyperflux import Hyperflux, Settings, prunable

from .common import fresh_process, interleave, peak, provenance, ratios, stats, table, write_json

STEPS, SPARSITY = 100_000, .98          # the announced length keeps every measured step in the pruning stage
WAYS = {'dense': 'dense', 'eager': 'Hyperflux eager', 'warm': 'Hyperflux eager, gates drawn',
        'compiled': 'Hyperflux compiled', 'graph': 'gates in the graph', 'masks': 'torch.nn.utils.prune',
        'other': 'Hyperflux eager, other checkout'}
GOALS = {('lenet300', 'eager'): 1.6, ('lenet300', 'compiled'): 1.25, ('resnet18', 'eager'): 1.15}


def resnet18():
    "torchvision's, with a stem for 32×32 images: a 3×3 convolution of stride 1, and no max-pool"
    from torchvision.models import resnet18
    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def adam(params): return torch.optim.Adam(params, lr=1e-3)
def sgd(params): return torch.optim.SGD(params, lr=.1, momentum=.9, weight_decay=5e-4)


# Name → network, batch size, image shape, optimiser, (rounds, turn) on the CPU and on CUDA
MODELS = dict(lenet300=(lenet300, 128, (1, 28, 28), adam, (100, 10), (100, 20)),
              resnet18=(resnet18, 32, (3, 32, 32), sgd, (15, 2), (50, 20)))


# The ways

def other_hyperflux(folder):
    "The `Hyperflux` of another checkout, beside this one's"
    own = {k: sys.modules.pop(k) for k in list(sys.modules) if k.partition('.')[0] == 'hyperflux'}
    sys.path.insert(0, str(folder))
    try: found = importlib.import_module('hyperflux')
    finally:
        sys.path.pop(0)
        for k in [k for k in sys.modules if k.partition('.')[0] == 'hyperflux']: del sys.modules[k]
        sys.modules.update(own)
    if Path(found.__file__).parents[1] != Path(folder).resolve():
        raise ValueError(f"{folder} holds no checkout of hyperflux: give the folder in which hyperflux/ and nbs/ lie")
    return found.Hyperflux


def batches(model, device):
    "Makes random images and labels, fresh ones each time: a network that knows its batch by heart computes with denormal numbers"
    _, n, shape, *_ = MODELS[model]
    g = torch.Generator(device).manual_seed(0)
    return lambda: (torch.randn(n, *shape, device=device, generator=g),
                    torch.randint(10, (n,), device=device, generator=g))


def mask_at_random(net):
    "torch.nn.utils.prune on the layers that Hyperflux would prune, at the same sparsity"
    g = torch.Generator().manual_seed(0)
    for name in prunable(net):
        module, _, weight = name.rpartition('.')
        module = net.get_submodule(module)
        w = getattr(module, weight)
        prune.custom_from_mask(module, weight, (torch.rand(w.shape, generator=g) >= SPARSITY).to(w))


def make(model, way, device, against=None):
    "A training step, a function of images and labels, and its pruner if it has one"
    torch.manual_seed(0)
    net, _, _, optimizer, *_ = MODELS[model]
    net = net().to(device)
    if way == 'masks': mask_at_random(net)
    opt, pruner = optimizer(net.parameters()), None
    step = lambda x, y: plain_step(net, opt, x, y)
    if way == 'other': pruner = against(net, opt, sparsity=SPARSITY, steps=STEPS)
    if way in ('eager', 'warm', 'compiled'):
        pruner = Hyperflux(net, opt, sparsity=SPARSITY, steps=STEPS, compile=way == 'compiled',
                           settings=Settings(temperature=.005*(way == 'warm')))
    if way == 'graph': step = gated_step(net, opt, device)
    return step, pruner


def plain_step(net, opt, x, y, context=contextlib.nullcontext):
    opt.zero_grad()
    with context(): out = net(x)
    F.cross_entropy(out.float(), y).backward()
    opt.step()


def gated_step(net, opt, device, weights=None, steps=STEPS, context=contextlib.nullcontext):
    "What Hyperflux does, written as layers: presences are parameters with an Adam of their own, pressure is a term of the loss"
    S, weights = Settings(), weights or prunable(net)
    d = sum(p.numel() for p in weights.values())
    starts = initial_presence(d, S.low, S.high).split([p.numel() for p in weights.values()])
    # in memory as the weight is
    laid_out = lambda t, p: torch.empty_like(p, device='cpu', requires_grad=False).copy_(t.view_as(p))
    gated = Gated(net, {n: laid_out(t, p) for (n, p), t in zip(weights.items(), starts)}, S.slope).to(device)
    gates = torch.optim.Adam(gated.gates.parameters(), lr=presence_lr(round(S.prune*steps), S.travel, S.high),
                             eps=1e-8/d, fused=True)
    gamma = S.controller().first
    def step(x, y):
        opt.zero_grad(); gates.zero_grad()
        with context(): out = gated(x)
        (F.cross_entropy(out.float(), y) + gated.pressure(gamma)).backward()
        opt.step(); gates.step()
    return step


# Memory, time, parts

def memory(model, way, device, threads, n):
    "`peak` of one way; on the CPU to be called in a fresh process"
    torch.set_num_threads(threads)
    device = torch.device(device)
    def run():
        step, _ = make(model, way, device)
        batch = batches(model, device)
        return lambda: step(*batch())
    run()()                              # libraries and the compiler, loaded when first used, are no part of the answer
    return peak(run, device, n)


def all_memory(model, ways, device, n):
    "Way → bytes, or None where they could not be read"
    args = [(model, w, device.type, torch.get_num_threads(), n) for w in ways]
    if device.type != 'cpu': return {a[1]: memory(*a) for a in args}
    found = {}
    for a in args:                                                 # a pool each: a process that has worked is not fresh
        with ProcessPoolExecutor(1, mp_context=fresh_process(['hyperflux', 'torchvision'])) as pool:
            found[a[1]] = pool.submit(memory, *a).result()
    return found


def measure(model, device, rounds, burst, warmup, memory_steps, against=None):
    "One row per way, and what could not run"
    steps, failed = {}, {}
    for way in [w for w in WAYS if w != 'other' or against]:
        try:
            step, _ = make(model, way, device, against)
            step(*batches(model, device)())                             # compiles, if it must
            steps[way] = step
        except Exception as e:
            if way != 'compiled': raise
            failed[way] = f"{type(e).__name__}: {str(e).splitlines()[0]}"    # no C++ compiler, say
    taken = dict(all_memory(model, [w for w in steps if w != 'other'], device, memory_steps), other=None)
    times = interleave(steps, batches(model, device), device, rounds, burst, warmup)
    rows = []
    for way in steps:
        more = None if taken[way] is None else (taken[way] - taken['dense'])/1e6
        rows.append(dict(model=model, device=device.type, way=way, unit='ms', **stats(sum(times[way], [])),
                         ratio=ratios(times[way], times['dense']),
                         against=ratios(times[way], times['other']) if against and way == 'eager' else None,
                         against_eager=ratios(times[way], times['eager']) if way == 'warm' else None,
                         memory_mb=taken[way] and taken[way]/1e6, memory_above_dense_mb=more,
                         goal=GOALS.get((model, way)) if device.type == 'cpu' else None))
    return rows, [dict(model=model, device=device.type, way=w, error=e) for w, e in failed.items()]


def parts_of(step, pruner, batch, device, n, warmup):
    "Median milliseconds of `n` steps and of their parts, with the device waited for after each; *_host: until the hook returned, without waiting"
    now, parts = {}, []
    def wait():
        if device.type == 'cuda': torch.cuda.synchronize()
        return time.perf_counter_ns()
    def timed(owner, name):
        inner = getattr(owner, name)
        def f(*args, **kwargs):
            start = wait()
            out = inner(*args, **kwargs)
            now[name + '_host'] = (time.perf_counter_ns() - start)/1e6
            now[name] = (wait() - start)/1e6
            return out
        setattr(owner, name, f)
    if pruner:
        pruner.detach()                         # the optimiser holds the hooks themselves, so they are handed over anew
        for name in ('_pre', '_post', 'before_step', 'after_step', 'move'): timed(pruner, name)
        pruner.attach()
        timed(pruner.optimizer, 'step')
    for i in range(warmup + n):
        b, start = batch(), wait()
        step(*b)
        total = (wait() - start)/1e6
        if i >= warmup: parts.append(dict(now, total=total))
    return {k: statistics.median(p[k] for p in parts) for k in parts[0]}


def profile(model, way, device, n, warmup):
    "Median milliseconds of the parts of a step; on CUDA the device is waited for after each part, so parts add up to more than a step"
    m = parts_of(*make(model, way, device), batches(model, device), device, n, warmup)
    return dict(model=model, device=device.type, way=way, n=n, unit='ms', **shares(m))


def shares(m):
    "What `parts_of` found, as parts that add up"
    return dict(total=m['total'], forward_backward=m['total'] - m['step'],
                optimiser=m['step'] - m['_pre'] - m['_post'], pre_hook=m['_pre'], post_hook=m['_post'],
                of_pre_before=m['before_step'],
                of_post_presences=m['move'], of_post_weights=m['after_step'] - m['move'])


# The command

def table_of(rows):
    num = lambda x, f='.2f': '–' if x is None else format(x, f)
    cells = [(r['model'], r['device'], WAYS[r['way']], num(r['median'], '.3f'), f"{r['q1']:.3f}–{r['q3']:.3f}",
              num(r['ratio']['median']),
              f"{r['ratio']['q1']:.2f}–{r['ratio']['q3']:.2f}", num(r['goal']), num(r['memory_mb'], '.1f'),
              num(r['memory_above_dense_mb'], '+.1f')) for r in rows]
    return table(('model', 'device', 'way', 'median ms', 'IQR', '× dense', 'IQR', 'goal', 'peak MB', 'vs dense'), cells,
                 left=3)


def profile_of(rows):
    keys = ('total', 'forward_backward', 'optimiser', 'pre_hook', 'post_hook', 'of_pre_before', 'of_post_presences',
            'of_post_weights')
    cells = [(r['model'], r['device'], WAYS[r['way']], *(f'{r[k]:.3f}' for k in keys)) for r in rows]
    return table(('model', 'device', 'way', *(k.replace('_', ' ') for k in keys)), cells, left=3)


def arguments(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.step', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='a few steps of LeNet-300-100: checks that everything runs, '
                                                        'measures nothing')
    p.add_argument('--device', choices=('cpu', 'cuda', 'auto'), default='auto',
                   help='auto: the CPU, and CUDA too where there is one')
    p.add_argument('--models', help=f"comma-separated, of {', '.join(MODELS)} (default: all; with --smoke the first)")
    p.add_argument('--rounds', type=int, help='turns of every way (default: 100 for LeNet-300-100; 15 for ResNet-18, '
                                              '50 on CUDA)')
    p.add_argument('--threads', type=int, help="of the CPU (default: torch's)")
    p.add_argument('--profile', action='store_true', help="also time the parts of Hyperflux's steps")
    p.add_argument('--against', metavar='FOLDER', help='another checkout, whose Hyperflux takes part; what this one '
                                                       'takes is also told as a multiple of it')
    p.add_argument('--out', metavar='FILE.json', help='write a record')
    args = p.parse_args(argv)
    args.models = args.models.split(',') if args.models else list(MODELS)[:1 if args.smoke else None]
    if unknown := [m for m in args.models if m not in MODELS]:
        p.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    if args.device == 'cuda' and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    for name in ('rounds', 'threads'):
        if (n := getattr(args, name)) is not None and n < 1: p.error(f"--{name} is a whole number above 0: got {n}")
    return args


def main(argv=None):
    "Runs what the arguments ask for, prints it, and returns the record"
    args = arguments(argv)
    if args.threads: torch.set_num_threads(args.threads)
    record = dict(benchmark='step', **provenance(' '.join(['python -m benchmarks.step',
                                                           *(sys.argv[1:] if argv is None else argv)])),
                  sparsity=SPARSITY, smoke=args.smoke, goals_are_for='two CPU cores', rows=[], failed=[], profile=[])
    h = record['hardware']
    print(f"{h['cpu']}, {h['cores']} cores, {h['threads']} threads, load {h['load_before']}; GPU {h['gpu'] or 'none'}; "
          f"torch {record['torch']}; "
          f"commit {(record['commit'] or 'unknown')[:10]}", flush=True)
    if (h['load_before'] or 0) > 1 and not args.smoke:
        print("others are using this machine (load above 1): times below are noise")
    for device in [torch.device(d) for d in ('cpu', 'cuda') if args.device in (d,
        'auto') and (d == 'cpu' or torch.cuda.is_available())]:
        for model in args.models:
            rounds, burst = MODELS[model][4 if device.type == 'cpu' else 5]
            sizes = (args.rounds or 3, 2, 1, 2) if args.smoke else (args.rounds or rounds, burst, 2*burst, 10)
            rows, failed = measure(model, device, *sizes, against=args.against and other_hyperflux(args.against))
            record['rows'] += rows; record['failed'] += failed
            print(table_of(rows), *(f"{WAYS[f['way']]}: {f['error']}" for f in failed), sep='\n', flush=True)
            for r in rows:
                if a := r['against_eager']:
                    print(f"{model}: drawn gates take {a['median']:.3f} × the time of those without noise "
                          f"({a['q1']:.3f}–{a['q3']:.3f})", flush=True)
                if a := r['against']:
                    print(f"{model}: Hyperflux eager takes {a['median']:.3f} × the time of the other checkout's "
                          f"({a['q1']:.3f}–{a['q3']:.3f})", flush=True)
            if args.profile:
                n = 3 if args.smoke else sizes[0]*sizes[1]
                parts = [profile(model, r['way'], device, n, sizes[2]) for r in rows if r['way'] in ('eager',
                                                                                                     'compiled')]
                record['profile'] += parts
                print('parts of a step, median ms', profile_of(parts), sep='\n', flush=True)
    if args.out: write_json(record, args.out)
    return record


if __name__ == '__main__': main()
