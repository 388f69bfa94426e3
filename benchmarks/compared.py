"""How fast the small networks of a comparison are.

    hyperflux compare --groups channels --cost flops … --out RUNS
    python -m benchmarks.compared RUNS --out nbs/results/NAME_speed.json

Each finished run that pruned groups is compacted, and the small network takes turns with the run's own dense one, in
eager PyTorch and in ONNX Runtime. A ratio is dense time over small time in the *same* runtime, at the medians. The same
command goes on where it was stopped. Give it a machine with nothing else to do.
"""
import argparse, json, sys
from pathlib import Path

import torch

from hyperflux.deploy import deploy
from hyperflux.study.results import load_run

from .common import provenance, resume, spelled, table, write_json


def finished(folder):
    "Folders of its runs that have been pruned by groups, in the order of methods, sparsities and seeds"
    found = []
    for path in Path(folder).glob('*/summary.json'):
        s = json.loads(path.read_text(encoding='utf-8'))
        c = s['config']
        if s.get('widths') and not path.parent.name.startswith('dense-'):
            found.append((c['method'], c['sparsity'], c['seed'], path.parent))
    return sorted(found)


def rows_of(folder, how):
    "One row for each batch and runtime"
    net, s, shape = load_run(folder)
    x = torch.randn(max(how['batches']), *shape, generator=torch.Generator('cpu').manual_seed(0))
    report = deploy(net, x, compiled=False, **how)
    if report.skipped: print(f'{folder.name}: left out {report.skipped}', flush=True)
    about = {k: s['config'][k] for k in ('model', 'method', 'sparsity', 'seed')}
    about |= dict(accuracy=s['accuracy'], operations=s['cost']['flops_left']/s['cost']['flops'], gap=report.compaction.gap)
    times, rows = {(r['batch'], r['form'].split(' (')[0]): r for r in report.speed}, []
    for batch in how['batches']:
        for runtime, end in dict(eager='', onnxruntime=', ONNX Runtime').items():
            dense, small = (times.get((batch, kind + end)) for kind in ('dense', 'compacted'))
            if not (dense and small): continue
            seconds = {k: r['seconds'] for k, r in dict(dense=dense, small=small).items()}          # quartiles
            rows.append(about | dict(batch=batch, runtime=runtime, **seconds, n=small['n'],
                                     ratio=seconds['dense'][1]/seconds['small'][1]))
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.compared', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', help='the folder that `hyperflux compare` was given as --out')
    p.add_argument('--threads', type=int, default=2, help='of the CPU (2)')
    p.add_argument('--rounds', type=int, default=21, help='of turns (21)')
    p.add_argument('--smoke', action='store_true', help='three rounds of one run: measures nothing')
    p.add_argument('--out', help='a JSON file for the record')
    p.add_argument('--fresh', action='store_true', help='begin anew')
    argv = sys.argv[1:] if argv is None else argv
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads); torch.set_flush_denormal(True)
    how = dict(batches=(1, 64), rounds=3 if a.smoke else a.rounds)
    runs = finished(a.runs)[:1 if a.smoke else None]
    if not runs: p.error(f"{a.runs} has no finished run that pruned groups: run hyperflux compare --groups channels first")
    record = dict(benchmark='compared', **provenance(spelled('python -m benchmarks.compared', argv)), smoke=a.smoke,
                  rounds=how['rounds'], rows=[])
    if not a.fresh: record = resume(a.out, record, ('rounds',))
    done = {(r['method'], r['sparsity'], r['seed']) for r in record['rows']}
    for method, sparsity, seed, folder in runs:
        if (method, sparsity, seed) in done: continue
        record['rows'] += rows_of(folder, how)
        print(method, sparsity, seed, flush=True)
        if a.out: write_json(record, a.out)
    cells = [(r['method'], f"{r['operations']:.1%}", str(r['seed']), f"{r['accuracy']:.1f}", str(r['batch']), r['runtime'],
              f"{1e3*r['dense'][1]:.3f}", f"{1e3*r['small'][1]:.3f}", f"{r['ratio']:.2f}") for r in record['rows']]
    print(table(('method', 'operations', 'seed', 'accuracy', 'batch', 'runtime', 'dense, ms', 'small, ms', '×'), cells,
                left=1))
    return record


if __name__ == '__main__': main()
