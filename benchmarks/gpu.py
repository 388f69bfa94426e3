"""A GPU's step time and peak memory: dense training, Hyperflux eager and compiled, gates in the graph; with
--accuracy, what pruning costs.

bf16 autocast, SGD with momentum 0.9 and decay 5e-4, fused; random images and labels made on the device; cuDNN may
choose its algorithms by trial.
All ways train in one run, in short turns of random order, timed by CUDA events; a ratio is the median, over rounds,
of the way's median step over the
dense one's in the same round, an overhead the median of their differences. All weights stay present while it is
measured (the announced run is so long
that no presence reaches zero): arithmetic on zeros draws less power. The controller's look, a few hundred times in
a run, is not in these times.

How little could it be? Each vector below has one float32 number per weight: g gradient, p parameter, b momentum of
SGD, ω kept weight, t presence,
m and v Adam's moments of t, h mask, s the pull c·ω·g + γ/d on its way. SGD alone reads p g b and writes p b, 20
bytes. The least that gates ask for in
addition, if one kernel does all and knows the optimiser: read g ω t m v b (the mask is in t's sign), write ω t m v
b p, 48 bytes, 28 more than SGD alone:
the floor. Around any optimiser, one kernel before it (read g ω t m v, write t m v, g·h and ω for p) and one after
(read p t, write ω and p·h)
move 56 more than SGD alone. What runs is in `TRAFFIC`, pass by pass: 112 more eager, 92 compiled, 94 with gates in
the graph (which keep no second copy of the
weights but launch some ten kernels a layer). The floor in milliseconds is 28 bytes a weight at the bandwidth with
which this device copies a large tensor,
bytes read and bytes written, measured in the same run. It counts bytes from memory; where vectors fit the cache,
less is moved.

Memory is the allocator's peak above that of the dense way. Predicted at the end of the forward pass, where it is:
Hyperflux keeps ω t m v s h, 24 bytes a weight;
gates in the graph t m v, and h and θ = ω·h until the backward pass, 20.

Each case is written to --out when it is done; cases that are there already are left out, so that a run that was
stopped goes on.
"""
import argparse, functools, gc, os, sys, time
from typing import NamedTuple

os.environ.setdefault('KINETO_LOG_LEVEL', '6')          # or torch's profiler talks
import torch

from hyperflux import Hyperflux, select
from hyperflux.lab.models import authors_ignore, make_model

from .common import differences, interleave, peak, provenance, ratios, resume, spelled, stats, table, write_json
from .gpu_profile import profile
from .step import gated_step, plain_step

# BUDGET in seconds, TURN: milliseconds of one way in a round
STEPS, SPARSITY, BUDGET, TURN, ROUNDS = 10_000_000, .98, 240, 150, (5, 300)
WAYS = {'dense': 'dense', 'eager': 'Hyperflux eager', 'compiled': 'Hyperflux compiled', 'graph': 'gates in the graph'}
LAYOUTS = dict(contiguous=torch.contiguous_format, channels_last=torch.channels_last)
# × dense; how many times less overhead than gates in the graph: of ResNet-50/32 in batches of 128
GOALS, LESS = dict(eager=1.05, compiled=1.03), 3.

# Pass → vectors it reads, vectors it writes
SGD = {'SGD': ('p g b', 'p b')}
BEFORE = {'s ← g': ('g', 's'), 's ← s·ω': ('s ω', 's'), 'p ← ω': ('ω', 'p'), 'g ← g·h': ('g h', 'g')}
AFTER = {'ω ← p': ('p', 'ω'), 'p ← p·h': ('p h', 'p'), 'p ← p + 0': ('p', 'p')}       # or what is absent could be -0
TRAFFIC = dict(
    dense=SGD,
    eager=BEFORE | SGD | {'s ← c·s': ('s', 's'), 's ← s + γ/d': ('s', 's'), 'Adam of t': ('t s m v', 't m v'),
                          'h ← t ≥ 0': ('t', 'h')} | AFTER,
    compiled=BEFORE | SGD | {'s, Adam of t, h': ('s t m v', 't m v h')} | AFTER,
    graph={'bool ← t ≥ 0': ('t', 'bool'), 'h ← bool': ('bool', 'h'), 'θ ← ω·h': ('ω h', 'θ'), 'Σt': ('t', ''),
           '∂ω ← g·h': ('g h', '∂ω'), '∂h ← g·ω': ('g ω', '∂h'),
           '∂t ← c·∂h': ('∂h', '∂t'), '∂t ← ∂t + γ/d': ('∂t', '∂t'), 'Adam of t': ('t ∂t m v', 't m v')} | SGD,
    fused={'all': ('g ω t m v b', 'ω t m v b p')},
    around={'before': ('g ω t m v', 't m v g p')} | SGD | {'after': ('p t', 'ω p')})
KEPT = dict(dense=0, eager=24, compiled=24, graph=20)     # bytes a weight at the peak, above the dense way's


def bytes_per_weight(way):
    return sum(1 if v == 'bool' else 4 for passes in TRAFFIC[way].values() for side in passes for v in side.split())


class Case(NamedTuple):
    "What is trained"
    model:str
    side:int # Pixels
    batch:int
    layout:str='contiguous'
    network:str='eager' # or compiled, by torch.compile

    @property
    def name(self):
        return f'{self.model}-{self.side}-b{self.batch}' + '-channels_last'*(self.layout != 'contiguous') + '-compiled'*(self.network == 'compiled')
    @property
    def shape(self): return 3, self.side, self.side
    @property
    def classes(self): return 10 if self.side < 64 else 1000
    @property
    def goal(self): return self[:3] == ('resnet50', 32, 128) and self.network == 'eager'


def cases(*all): return {c.name: c for c in all}


# In the order in which they run: first what has a goal, in the layout of the recipes and in the other
CASES = cases(Case('resnet50', 32, 128, 'channels_last'), Case('resnet50', 32, 128),
              Case('resnet50', 32, 512, 'channels_last'), Case('vgg19', 32, 128, 'channels_last'),
              Case('deit_s', 224, 128), Case('resnet50', 224, 128, 'channels_last'))
MORE = cases(Case('resnet50', 32, 512), Case('vgg19', 32, 128), Case('resnet50', 224, 128))          # on request
SMALL = cases(Case('lenet5', 32, 4, 'channels_last'), Case('lenet300', 32, 1))


# The four ways

def batches(case, device):
    "Makes random images and labels, fresh ones each time"
    g = torch.Generator(device).manual_seed(0)
    layout = LAYOUTS[case.layout]
    return lambda: (torch.randn(case.batch, *case.shape, device=device, generator=g).to(memory_format=layout),
                    torch.randint(case.classes, (case.batch,), device=device, generator=g))


def make(case, way, device):
    "A training step, a function of images and labels, and its pruner if it has one"
    torch.manual_seed(0)
    net = make_model(case.model, case.classes, case.shape).to(device, memory_format=LAYOUTS[case.layout])
    opt = torch.optim.SGD(net.parameters(), lr=.01, momentum=.9, weight_decay=5e-4, fused=True)
    context, ignore = functools.partial(torch.autocast, device.type, torch.bfloat16), authors_ignore[case.model]
    if way == 'graph': return gated_step(net, opt, device, select(net, ignore=ignore), STEPS, context), None
    pruner = None if way == 'dense' else Hyperflux(net, opt, sparsity=SPARSITY, steps=STEPS, ignore=ignore,
                                                   compile=way == 'compiled')
    run = torch.compile(net) if case.network == 'compiled' else net
    return lambda x, y: plain_step(run, opt, x, y, context), pruner


def weights_of(case):
    "How many weights are gated, and how many parameters there are"
    with torch.device('meta'): net = make_model(case.model, case.classes, case.shape)
    return sum(p.numel() for p in select(net, ignore=authors_ignore[case.model]).values()), sum(p.numel()
        for p in net.parameters())


def copy_rate(device, n):
    "Bytes read and written a second by a copy of `n` float32 numbers, the median of many"
    a = torch.rand(n, device=device)
    b = torch.empty_like(a)
    times = interleave(dict(copy=lambda: b.copy_(a)), tuple, device, rounds=10, burst=5, warmup=3)['copy']
    return 8*n/stats(sum(times, []))['median']*1e3


# One case

def memory(case, way, device, n):
    def run():
        step, _ = make(case, way, device)
        batch = batches(case, device)
        return lambda: step(*batch())
    return peak(run, device, n)


def measure(case, device, seconds, rate, smoke=False):
    "The case's row, one row for each way, and what could not run; takes about `seconds`"
    began, batch, steps, failed = time.perf_counter(), batches(case, device), {}, []
    ways = [w for w in WAYS if case.network == 'eager' or w != 'graph']
    for way in ways:
        try:
            step, _ = make(case, way, device)
            step(*batch())                                            # compiles, if it must, and cuDNN makes its choice
            steps[way] = step
        except Exception as e:
            if way == 'dense': raise
            failed.append(dict(case=case.name, way=way, error=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"))
    # a second network would be compiled anew
    taken = {w: memory(case, w, device, 1 if smoke else 5) for w in steps} if case.network == 'eager' else {}
    sizes = (2, 1) if smoke else plan(steps, batch, device, began + seconds)
    times = interleave(steps, batch, device, *sizes, warmup=0)
    d, params = weights_of(case)
    floor = {k: (bytes_per_weight(k) - bytes_per_weight('dense'))*d/rate*1e3 for k in (*WAYS, 'fused', 'around')}
    row = dict(case=case.name, **case._asdict(), device=device.type, weights=d, parameters=params, rounds=sizes[0],
               turn=sizes[1], copy_gb_s=rate/1e9,
               floor_ms=floor['fused'], floor_around_ms=floor['around'], seconds=round(time.perf_counter() - began, 1))
    rows = []
    for way in steps:
        over = differences(times[way], times['dense'])
        more = (taken[way] - taken['dense'])/1e6 if taken.get(way) is not None else None
        rows.append(dict(case=case.name, way=way, unit='ms', **stats(sum(times[way], [])),
                         ratio=ratios(times[way], times['dense']), overhead_ms=over,
                         moved_ms=floor[way], overhead_in_floors=over['median']/floor['fused'],
                         memory_mb=taken[way]/1e6 if taken.get(way) is not None else None,
                         memory_above_dense_mb=more, predicted_above_dense_mb=KEPT[way]*d/1e6,
                         goal=GOALS.get(way) if case.goal else None))
    return row, rows, failed


def plan(steps, batch, device, end):
    "Rounds and timed steps in a turn, so that all is done by `end`; everything has run twice before it is timed"
    trial = interleave(steps, batch, device, 1, 3, 2)
    turn = min(max(round(TURN/max(stats(r[0])['median'] for r in trial.values())), 5), 50)
    start = time.perf_counter()
    interleave(steps, batch, device, 1, turn, 0)
    now = time.perf_counter()
    return min(max(int((end - now)/(now - start)), ROUNDS[0]), ROUNDS[1]), turn


def profiled(case, way, device, smoke=False):
    step, pruner = make(case, way, device)
    return dict(case=case.name, way=way, **profile(step, pruner, batches(case, device), device,
                                                   *((1, 1) if smoke else (3, 10))))


def goals_of(rows):
    "What was asked and what was found; met is None where an overhead is within noise of nothing"
    found, by = [], {(r['case'], r['way']): r for r in rows}
    for (case, way), r in by.items():
        if r['goal'] is None: continue
        found.append(dict(case=case, way=way, what='step, × dense', goal=r['goal'], found=r['ratio']['median'],
                          met=r['ratio']['median'] <= r['goal']))
        if (graph := by.get((case, 'graph'))) is None: continue
        less = graph['overhead_ms']['median']/r['overhead_ms']['median'] if r['overhead_ms']['q1'] > 0 else None
        found.append(dict(case=case, way=way, what='times less overhead than gates in the graph', goal=LESS, found=less,
                          met=None if less is None else less >= LESS))
    return found


# The command

def table_of(rows):
    num = lambda x, f='.2f': '–' if x is None else format(x, f)
    cells = [(r['case'], WAYS[r['way']], num(r['median'], '.3f'), f"{r['q1']:.3f}–{r['q3']:.3f}",
              num(r['ratio']['median'], '.3f'),
              f"{r['ratio']['q1']:.3f}–{r['ratio']['q3']:.3f}", num(r['goal']), num(r['overhead_ms']['median'], '+.3f'),
              num(r['moved_ms'], '.3f'),
              num(r['overhead_in_floors'], '.1f'), num(r['memory_above_dense_mb'], '+.0f'),
              num(r['predicted_above_dense_mb'], '+.0f')) for r in rows]
    return table(('case', 'way', 'median ms', 'IQR', '× dense', 'IQR', 'goal', 'overhead ms', 'its bytes ms',
                  'in floors', 'MB vs dense', 'predicted'), cells, left=2)


def tell(case, rows, failed, profiles, goals):
    print(f"\n{case['case']}: {case['weights']:,} weights, {case['rounds']} rounds of {case['turn']} steps, copies at "
          f"{case['copy_gb_s']:,.0f} GB/s, "
          f"floor {case['floor_ms']:.3f} ms, around an optimiser {case['floor_around_ms']:.3f} ms; took "
          f"{case['seconds']} s", table_of(rows), sep='\n')
    for f in failed: print(f"{WAYS[f['way']]}: {f['error']}")
    for g in goals:
        if g['case'] == case['case']:
            print(f"{WAYS[g['way']]}, {g['what']}: {'–' if g['found'] is None else format(g['found'], '.3f')}, goal "
                  f"{g['goal']:g}, "
                  + {True: 'met', False: 'missed', None: 'cannot be told from noise'}[g['met']])
    for p in profiles:
        print(f"{WAYS[p['way']]}: a step's {p['launches']} kernels take {p['kernels_ms']:.3f} ms" +
              (f"; hooks wait for {p['pre_hook']:.3f} + {p['post_hook']:.3f} ms, of these on the host "
               f"{p['pre_host']:.3f} + {p['post_host']:.3f}; "
               f"a controller's look {p['look']:.3f} ms" if 'look' in p else ''))
        for k in ('pre_kernels', 'post_kernels'):
            for o in p.get(k, ())[:6]:
                print(f"    {k[:-8]:<5}{o['us']:>9.1f} µs {o['calls']:>6.1f} × {o['name'][:110]}")
    sys.stdout.flush()


def arguments(argv):
    p = argparse.ArgumentParser(prog='python -m benchmarks.gpu', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--accuracy', action='store_true', help='the other benchmark: accuracy against sparsity; see '
                                                           '--accuracy --help')
    p.add_argument('--smoke', action='store_true', help='small networks, a few steps, on the CPU: checks that '
                                                        'everything runs, measures nothing')
    p.add_argument('--cases', help=f"comma-separated, of {', '.join(CASES | MORE)} (default: the first {len(CASES)})")
    p.add_argument('--compiled-networks', action='store_true',
                   help='then also each case with its network compiled by torch.compile')
    p.add_argument('--profile', action='store_true', help='also the parts of a step and the longest kernels of the '
                                                          'hooks; half the time goes to it')
    p.add_argument('--budget', type=float, default=BUDGET, metavar='SECONDS',
                   help=f'for all cases together (default: {BUDGET}); chooses the rounds')
    p.add_argument('--device', choices=('cpu', 'cuda'), help='default: cuda; with --smoke cpu')
    p.add_argument('--commit', help='for the record, where git cannot tell')
    p.add_argument('--out', metavar='FILE.json', help='the record; cases that are in it are left out')
    p.add_argument('--fresh', action='store_true', help='begin the record anew')
    args = p.parse_args(argv)
    known = SMALL if args.smoke else CASES | MORE
    names = args.cases.split(',') if args.cases else list(SMALL if args.smoke else CASES)
    if unknown := [n for n in names if n not in known]: p.error(f"no case {unknown[0]!r}; there are {', '.join(known)}")
    args.cases = [known[n] for n in names]
    if args.compiled_networks: args.cases += [c._replace(network='compiled') for c in args.cases]
    args.device = args.device or ('cpu' if args.smoke else 'cuda')
    if args.device == 'cpu' and not args.smoke: p.error("--device cpu goes with --smoke: this benchmark is of a GPU")
    if args.device == 'cuda' and not torch.cuda.is_available():
        p.error("torch finds no CUDA device here; --smoke checks on the CPU that everything runs")
    if args.budget <= 0: p.error(f"--budget is a number of seconds above 0: got {args.budget:g}")
    return p, args


def main(argv=None):
    "Runs what the arguments ask for, prints it, and returns the record"
    argv = sys.argv[1:] if argv is None else list(argv)
    if '--accuracy' in argv:
        from . import gpu_accuracy
        return gpu_accuracy.main([a for a in argv if a != '--accuracy'])
    began = time.perf_counter()
    p, args = arguments(argv)
    device = torch.device(args.device)
    if args.smoke and args.device == 'cpu': torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True                               # the dense baseline as fast as it goes
    record = dict(benchmark='gpu', **provenance(spelled('python -m benchmarks.gpu', argv)), smoke=args.smoke,
                  precision='bf16 autocast', sparsity=SPARSITY, steps=STEPS,
                  bytes_per_weight={k: bytes_per_weight(k) for k in TRAFFIC}, goals=[], cases=[], rows=[], failed=[],
                  profile=[])
    record['commit'] = args.commit or record['commit']
    if not args.fresh:
        try: record = resume(args.out, record, ())
        except ValueError as e: p.error(str(e))
    h = record['hardware']
    print(f"{h['gpu'] or 'no GPU'}; {h['cpu']}, {h['cores']} cores, load {h['load_before']}; torch {record['torch']}; "
          f"commit {(record['commit'] or 'unknown')[:10]}", flush=True)
    left, record['skipped'] = [c for c in args.cases if c.name not in {r['case'] for r in record['cases']}], []
    rate = copy_rate(device, 2**20 if args.smoke else 2**28) if left else None
    for i, case in enumerate(left):
        free = args.budget - (time.perf_counter() - began)
        if i and free <= 0:
            record['skipped'] = [dict(case=c.name, why='no time left') for c in left[i:]]
            print(f"no time left for {', '.join(c.name for c in left[i:])}: the same command goes on with them")
            break
        row, rows, failed = measure(case, device, free/(len(left) - i)/(1 + args.profile), rate, args.smoke)
        release()
        profiles = [profiled(case, r['way'], device, args.smoke) for r in rows] if args.profile else []
        release()
        for k, new in dict(cases=[row], rows=rows, failed=failed, profile=profiles).items(): record[k] += new
        record['goals'] = goals_of(record['rows']) if device.type == 'cuda' else []
        tell(row, rows, failed, profiles, record['goals'])
        if args.out: write_json(record, args.out)
    if args.out and record['skipped']: write_json(record, args.out)
    return record


def release():
    "Networks, compiled code and cached memory of a case that is done"
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


if __name__ == '__main__': main()
