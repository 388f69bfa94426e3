"""What watching costs: a training step of LeNet-300-100 under Hyperflux, alone, with a `Recorder` on 100 and on 1,000
weights, and with `Returns` on all.

    python -m benchmarks.recorder --out nbs/results/recorder.json

All take the same batches in one run, in short turns of random order. Goal: 100 weights under 1.03 of a step.
"""
import argparse

import torch

from hyperflux import Hyperflux
from hyperflux.lab.models import lenet300
from hyperflux.study.recorder import Recorder, Returns

from .common import interleave, provenance, ratios, spelled, stats, table, write_json
from .step import STEPS, adam, batches, plain_step

WATCH = {'alone': lambda p: None, 'Recorder, 100 weights': lambda p: Recorder(p, 100),
         'Recorder, 1,000 weights': lambda p: Recorder(p, 1000), 'Returns': Returns}


def make(watch, device):
    "A training step under Hyperflux, watched"
    torch.manual_seed(0)
    net = lenet300().to(device)
    opt = adam(net.parameters())
    watch(Hyperflux(net, opt, sparsity=.98, steps=STEPS))                # the optimiser's hooks hold both
    return lambda x, y: plain_step(net, opt, x, y)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rounds', type=int, default=150, help='turns of each (150)')
    p.add_argument('--device', default='cpu', help='cpu or cuda (cpu)')
    p.add_argument('--threads', type=int, default=1, help='CPU threads (1)')
    p.add_argument('--out', help='a JSON file for the record')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    torch.set_flush_denormal(True)
    asked = ['--rounds', str(a.rounds), '--device', a.device, '--threads', str(a.threads)]
    record = provenance(spelled('python -m benchmarks.recorder', asked))
    steps = {k: make(w, device) for k, w in WATCH.items()}
    times = interleave(steps, batches('lenet300', device), device, a.rounds, 10, 30)
    rows = [dict(way=k, **stats([t for r in v for t in r]), ratio=ratios(v, times['alone'])) for k, v in times.items()]
    cells = [(r['way'], str(r['n']), f"{r['median']:.3f}", f"{r['ratio']['median']:.3f}",
              f"{r['ratio']['q1']:.3f} to {r['ratio']['q3']:.3f}") for r in rows]
    print(table(('way', 'n', 'median (ms)', '× alone', 'quartiles'), cells, left=1))
    if a.out: write_json(record | dict(rows=rows), a.out)


if __name__ == '__main__': main()
