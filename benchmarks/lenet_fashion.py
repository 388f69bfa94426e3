"""LeNet-300-100 on full Fashion-MNIST: does Hyperflux reach the density asked for, and what does that cost in accuracy?

    python -m benchmarks.lenet_fashion --root FOLDER        # all runs that are not there yet, then the record

10 dense + 20 pruning + 20 regrowth epochs, Adam 1e-3, batch 128, label smoothing 0.1; ours and the authors'
settings and controller, the same dense
budget and seeds. Every run has its folder under --runs and is resumed or recognised there. The accuracy is that of
the last epoch.
"""
import argparse
import csv
import json
from pathlib import Path
from statistics import mean, stdev

import torch

from benchmarks.common import provenance, write_json
from hyperflux.lab.checkpoint import checkpoints
from hyperflux.lab.datasets import load_data
from hyperflux.study.config import Config
from hyperflux.study.train import fit


def one(config, data, folder):
    "The summary of one run, made now or before"
    if not (folder/'summary.json').is_file():
        print(folder.name, flush=True)
        fit(config, folder, resume=bool(checkpoints(folder)), progress=False, data=data)
    return json.loads((folder/'summary.json').read_text())


def row(method, sparsity, runs):
    "One line of the record: n, mean and standard deviation over seeds"
    spread = lambda k: (mean(r[k] for r in runs), stdev(r[k] for r in runs) if len(runs) > 1 else 0.)
    (dense, dense_std), (acc, acc_std) = spread('dense_accuracy'), spread('accuracy')
    return dict(method=method, sparsity=sparsity, n=len(runs), dense_mean=round(dense, 3),
                dense_std=round(dense_std, 3), accuracy_mean=round(acc, 3),
                accuracy_std=round(acc_std, 3), left_asked=runs[0]['keep'], left_min=min(r['left'] for r in runs),
                left_max=max(r['left'] for r in runs),
                seconds_mean=round(mean(r['seconds'] for r in runs), 1))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--root', help="folder of Fashion-MNIST (torchvision's or Debian's layout)")
    ap.add_argument('--runs', default='runs/lenet_fashion', help='where the single runs are kept')
    ap.add_argument('--out', default='nbs/results/lenet300_fashion', help='the record: OUT.json and OUT.csv')
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--sparsities', type=float, nargs='+', default=[.98, .99])
    a = ap.parse_args()
    torch.set_num_threads(1)
    # now: the commit that runs, not the one at the end
    origin = provenance('python -m benchmarks.lenet_fashion --root FOLDER')
    data, rows, single = load_data('fashion-mnist', a.root), [], []
    for method in 'hyperflux', 'authors':
        for s in a.sparsities:
            runs = []
            for seed in range(a.seeds):
                config = Config(data='fashion-mnist', sparsity=s, dense_epochs=10, prune_epochs=20, regrow_epochs=20,
                                method=method, seed=seed)
                runs.append(one(config, data, Path(a.runs)/f'{method}-{s:g}-{seed}'))
                r = runs[-1]
                single.append(dict(method=method, sparsity=s, seed=seed,
                                   **{k: r[k] for k in ('dense_accuracy', 'accuracy', 'keep', 'left', 'seconds')}))
            rows.append(row(method, s, runs))
            print(rows[-1], flush=True)
    out = Path(a.out)
    write_json(dict(origin, rows=rows, runs=single), out.with_suffix('.json'))
    with open(out.with_suffix('.csv'), 'w', newline='') as f:
        w = csv.DictWriter(f, rows[0])
        w.writeheader()
        w.writerows(rows)


if __name__ == '__main__': main()
