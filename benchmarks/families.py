"""What `compact` makes of networks that nobody here wrote: a small one of each family of torchvision and timm.

    python -m benchmarks.families --out nbs/results/families.json
    python -m benchmarks.families --groups --out nbs/results/families_groups.json

A family is a module of timm, and a name without its size in torchvision's classifiers. Its network is the smallest
variant, with fewer and narrower blocks where its arguments allow that, on the smallest pictures it takes. Nothing is
trained: norms, biases and scales move a little at random, half of the rows of every linear and convolutional weight
become zeros, and so does half of their biases (seed 0); batch norms then get the statistics of random pictures.
`compact` takes out what nobody needs.

Equal: the smaller network gives the same on four inputs, to 1e-5 of the largest output; in double precision if rounding
alone takes them further. Refused: `compact` says itself why not. All else that is raised is a fault. `spread` is how
far the outputs of two inputs differ: were it no larger than 1e-5, equal would say little. Each family has a process and
a time limit of its own; the record grows row by row, and the same command goes on where it was stopped.

With --groups nothing is made zero by hand: `channels` finds the channels and heads that can go, and `layers` residual
branches, where the others do not save half of the operations. Hyperflux prunes to that half in 100 steps on random
pictures, and `compact` makes the small network, whose operations are counted again. `reached` is their share of the
dense network's; above the budget by more than a millionth is a fault.
"""
import argparse, re, sys, time, traceback, warnings
from pathlib import Path

import timm, torch, torchvision
from torch import nn

import hyperflux
from hyperflux import Hyperflux
from hyperflux.helpers import first_line
from hyperflux.structure import channels, flops, flops_by_module, layers
from hyperflux.deploy.branches import relative_gap
from hyperflux.deploy.compact import compact

from .common import fresh_process, provenance, resume, spelled, table, write_json

SHRUNK = dict(embed_dim=64, depth=2, num_heads=2), dict(embed_dim=64, depth=2), dict(depths=(1, 1, 1, 1)), dict(depth=2)
SIZES = 64, 128
# Its second classifier, which only training has, finds no place on smaller pictures
LARGEST = {'torchvision inception_v3': 299}
# These cannot be built without values, to be weighed
SMALLEST = {'torchvision regnet_x': 'regnet_x_400mf', 'torchvision regnet_y': 'regnet_y_400mf'}
SMOKE = 'torchvision squeezenet', 'timm mambaout'


# The networks

def family_of(name):
    "A classifier of torchvision without its size: swin_v2_t is of swin_v2, vgg11_bn of vgg_bn"
    return re.match(r'(wide_)?[a-z]+(_v\d|_[xy](?=_))?', name)[0] + '_bn'*name.endswith('_bn')


def families():
    "Names of variants by family, 'torchvision NAME' or 'timm NAME'"
    found = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        found.setdefault(f'torchvision {family_of(name)}', []).append(name)
    return found | {f'timm {m}': timm.list_models(module=m) for m in timm.list_modules()}


def make(source, name, **kw):
    "A network for five classes, with random weights"
    if source == 'timm': return timm.create_model(name, num_classes=5, **kw)
    return torchvision.models.get_model(name, weights=None, num_classes=5, **kw)


def parameters(net): return sum(p.numel() for p in net.parameters())


def weigh(source, name, kw):
    "Its parameters, counted without values; infinite if there is no such network"
    try:
        with torch.device('meta'): return parameters(make(source, name, **kw))
    except Exception: return float('inf')                                       # it has no such argument


def shrunk(source, name):
    "The ways to make a network smaller that its arguments allow, and to leave it as it is; the smallest first"
    sizes = [(weigh(source, name, kw), i, kw) for i, kw in enumerate(SHRUNK)] if source == 'timm' else []
    return [kw for size, _, kw in sorted(sizes) if size < float('inf')] + [{}]


def built(source, family, variants):
    "The smallest network that runs, and what it runs on: name, arguments, network, input; ValueError if none does"
    trouble = ''
    tiny = [v for v in variants if v.startswith('test_')]                       # timm's own for tests
    name = SMALLEST.get(f'{source} {family}') or min(tiny or variants, key=lambda v: weigh(source, v, {}))
    for kw in shrunk(source, name):
        default = timm.get_pretrained_cfg(name).input_size[1] if source == 'timm' else 224
        only = LARGEST.get(f'{source} {family}')
        for size in [only] if only else sorted({*SIZES, default}):
            for more in ({'img_size' if source == 'timm' else 'image_size': size}, {}):
                try:
                    torch.manual_seed(0)
                    net, x = make(source, name, **kw, **more).eval(), torch.randn(2, 3, size, size)
                    with torch.no_grad(): net(x)
                    return name, kw | more, net, x
                except Exception as e: trouble = f'{type(e).__name__}: {e}'.splitlines()[0]
    raise ValueError(f'{variants[0]} and its like do not run: {trouble[:200]}')


def norms(net):
    "Batch norms that keep statistics"
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def settle(net, shape):
    "Statistics of random pictures for all batch norms, no variance below 0.01: signals keep their size through layers"
    for m in norms(net):
        m.reset_running_stats()
        m.momentum = None                                               # the average of all batches
    net.train()
    for seed in range(2): net(torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(seed)))
    for m in norms(net): m.running_var.clamp_(min=.01)
    return net.eval()


@torch.no_grad()
def prune(net, shape):
    "Norms, biases and scales move, so that none is 0 or 1 by its making; half of all rows become zeros"
    g = torch.Generator().manual_seed(0)
    noise = lambda t: torch.randn(t.shape, generator=g)
    for p in net.parameters():
        if p.ndim < 2 or p.numel() == max(p.shape): p.add_(.1*noise(p))
    for m in net.modules():
        if not isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)): continue
        if not m.weight.any(): m.weight.add_(.05*noise(m.weight))       # a last layer of zeros would hide all before it
        gone = torch.rand(len(m.weight), generator=g) < .5
        gone[0] = False
        m.weight.masked_fill_(gone.view(-1, *[1]*(m.weight.ndim - 1)), 0)
        if m.bias is not None and len(m.bias) == len(gone):
            m.bias.masked_fill_(gone & (torch.rand(len(gone), generator=g) < .5), 0)
    return settle(net, shape) if norms(net) else net


# One family

def own_refusal(e):
    "Whether `compact` itself says that it cannot"
    raised = Path(traceback.extract_tb(e.__traceback__)[-1].filename)
    return isinstance(e, (RuntimeError, ValueError)) and Path(hyperflux.__file__).parent in raised.parents


def compacted(net, x):
    "What `compact` makes of a network half of whose rows are zeros"
    prune(net, x.shape)
    begin = time.perf_counter()
    small, report = compact(net, x)
    return dict(gap=report.gap, rounding=report.rounding, left=parameters(small)/parameters(net), weights=report.before,
                weights_left=report.after, views=report.views, seconds=round(time.perf_counter() - begin, 1))


def half_pruned(net, x, share, steps):
    "Hyperflux on channels; and on branches, where channels alone do not save so much"
    opt = torch.optim.SGD(net.parameters(), 1e-3)
    def pruner(found): return Hyperflux(net, opt, sparsity=1 - share, steps=steps, cost=flops, groups=found)
    found = None
    try:
        found = channels(net, x)
        return pruner(found), opt
    except ValueError as e:
        if not str(e).startswith(('a budget of', 'no channel')): raise
    return pruner(found + layers(net, x) if found else layers(net, x)), opt


def kinds(pruner):
    "Of its gates, in words"
    branch = [b.name.startswith('branch ') for b in pruner.groups.banks]
    return '+'.join(['channels']*(not all(branch)) + ['layers']*any(branch))


def grouped(net, x, share=.5, steps=100):
    "What is left of a network whose channels and heads Hyperflux prunes, on random pictures"
    if norms(net): settle(net, x.shape)
    begin = time.perf_counter()
    pruner, opt = half_pruned(net, x, share, steps)
    net.train()
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        out = net(torch.randn(x.shape, generator=g))
        out = out if isinstance(out, torch.Tensor) else out[0]
        opt.zero_grad()
        out.float().square().mean().backward()
        opt.step()
    net.eval()
    small, report = compact(net, x)
    dense, left = (flops_by_module(m, example=(x,))[''] for m in (net, small))
    row = dict(gap=report.gap, rounding=report.rounding, reached=left/dense, asked=pruner.budget/pruner.groups.whole,
               reported=pruner.density, gates=pruner.groups.n, banks=len(pruner.groups.sizes), views=report.views,
               groups=kinds(pruner), graph=report.graph, gone=len(report.gone),
               left=parameters(small)/parameters(net), seconds=round(time.perf_counter() - begin, 1))
    if row['reached'] > row['asked'] + 1e-6: raise AssertionError(f"{row['reached']:.4f} of the operations are left")
    return row


def one(key, variants, groups=False):
    "The row of a family"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.simplefilter('ignore')
    source, family = key.split()
    row = dict(source=source, family=family)
    try: name, kw, net, x = built(source, family, variants)
    except Exception as e: return row | dict(outcome='not built', reason=str(e)[:300])
    row |= dict(model=name, arguments=kw, input=list(x.shape), parameters=parameters(net))
    try: row |= dict(outcome='equal') | (grouped if groups else compacted)(net, x)
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        if own_refusal(e): row |= dict(outcome='refused', reason=str(e)[:400])
        else: row |= dict(outcome='fault', reason=f'{first_line(e)[:300]} at {Path(at.filename).name}:{at.lineno}')
    try:
        with torch.no_grad(): a, b = (net(x*s) for s in (1, -1))
        return row | dict(spread=relative_gap(a, b))
    except Exception as e: return row | dict(spread=None, note=f'{type(e).__name__}: {e}'[:200])


def child(pipe, key, variants, groups):
    try: pipe.send(one(key, variants, groups))
    except Exception as e:
        pipe.send(dict(zip(('source', 'family'), key.split()), outcome='fault', reason=first_line(e)[:300]))
        raise


def within(context, limit, key, variants, groups):
    "The row of a family, made in a process of its own; stopped after `limit` seconds"
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, key, variants, groups))
    process.start()
    theirs.close()
    row = dict(zip(('source', 'family'), key.split()))
    late = dict(outcome='time', reason=f'not done after {limit} seconds')
    try: return ours.recv() if ours.poll(limit) else row | late
    except EOFError: return row | dict(outcome='fault', reason='the process ended without a word')
    finally:
        process.join(1)
        if process.is_alive(): process.kill()
        process.join()


# All of them

FORMATS = dict(reached='.1%', left='.1%', gap='.0e', spread='.0e', seconds='')

def table_of(rows):
    show = lambda r, k, form: format(r[k], form) if r.get(k) is not None else ''
    cells = [(r['source'], r['family'], r.get('model', ''), r['outcome'], r.get('groups', ''),
              *(show(r, k, form) for k, form in FORMATS.items()), r.get('reason', '')[:100]) for r in rows]
    head = ('source', 'family', 'model', 'outcome', 'groups', 'operations', 'weights', 'gap', 'spread', 'seconds',
            'reason')
    return table(head, cells, left=5)


def totals(rows):
    "How many there were of each outcome"
    return {k: sum(r['outcome'] == k for r in rows) for k in ('equal', 'refused', 'fault', 'time', 'not built')}


def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.families', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--families', help="only these, separated by commas: 'torchvision vgg,timm beit'")
    p.add_argument('--groups', action='store_true', help='prune channels and heads with Hyperflux first')
    p.add_argument('--limit', type=int, default=300, help='seconds for a family, with building it (300)')
    p.add_argument('--smoke', action='store_true', help=f'two families: {" and ".join(SMOKE)}')
    p.add_argument('--out', help='a JSON file for the record; one that is there is gone on with')
    p.add_argument('--fresh', action='store_true', help='begin anew')
    argv = sys.argv[1:] if argv is None else argv
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    todo = families()
    chosen = list(SMOKE) if a.smoke else a.families.split(',') if a.families else list(todo)
    unknown = [k for k in chosen if k not in todo]
    if unknown: p.error(f'no family {unknown[0]!r}; there are {", ".join(todo)}')
    command = spelled('python -m benchmarks.families', [x for x in argv if x != '--fresh'])
    record = dict(benchmark='families', **provenance(command), torchvision=torchvision.__version__,
                  timm=timm.__version__, smoke=a.smoke, limit=a.limit, groups=a.groups, rows=[])
    if not a.fresh:
        try: record = resume(a.out, record, ('torchvision', 'timm', 'limit'))
        except ValueError as e: p.error(str(e))
    done = {f"{r['source']} {r['family']}" for r in record['rows']}
    context = fresh_process(['timm', 'torchvision', 'hyperflux.deploy.compact'])
    for key in chosen:
        if key in done: continue
        row = within(context, a.limit, key, todo[key], a.groups)
        record['rows'].append(row)
        print(table_of([row]).splitlines()[1], flush=True)
        if a.out: write_json(record, a.out)
    print(table_of(record['rows']), totals(record['rows']), sep='\n')
    return record


if __name__ == '__main__': main()
