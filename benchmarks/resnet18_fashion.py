"""ResNet-18 on the shipped part of Fashion-MNIST: does the loop learn on a CPU, and land exactly on 95 %?

    python -m benchmarks.resnet18_fashion            # an hour or so on two cores; go on with the same line after a stop

The recipe is `resnet18-quick`, one seed, as it stands. The accuracy is that of the last epoch.
"""
import argparse
import json
from pathlib import Path

import torch

from benchmarks.common import provenance, write_json
from hyperflux.lab.checkpoint import checkpoints
from hyperflux.study.recipes import recipe
from hyperflux.study.train import fit


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--threads', type=int, default=torch.get_num_threads())
    ap.add_argument('--epochs', type=int, nargs=3, metavar=('DENSE', 'PRUNE', 'REGROW'),
                    help="in place of the recipe's")
    ap.add_argument('--runs', default='runs/resnet18_fashion', help='where the run is kept')
    ap.add_argument('--out', default='nbs/results/resnet18_fashion.json')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    origin = provenance('python -m benchmarks.resnet18_fashion')     # now: the commit that runs, not the one at the end
    config = recipe('resnet18-quick', **dict(zip(('dense_epochs', 'prune_epochs', 'regrow_epochs'), a.epochs or ())))
    folder = Path(a.runs)
    first = folder/'origin.json'                                                # a resumed run says where it began
    if checkpoints(folder): origin = json.loads(first.read_text())
    else: write_json(origin, first)
    run = fit(config, folder, resume=bool(checkpoints(folder)), progress=True, save_steps=20)
    s = json.loads((folder/'summary.json').read_text())
    write_json(dict(origin, n=1, images='fashion-small: 10,000 to train on, 2,000 to test',
                    **{k: v for k, v in s.items() if k != 'layers'}, layers=s['layers'], history=run.history), a.out)
    print(run)


if __name__ == '__main__': main()
