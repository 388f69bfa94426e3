"""What each form of structure buys: one network, a quarter of its operations, in every runtime.

    python -m benchmarks.small --out nbs/results/small.json

The residual network of `tutorials/making_it_small`, four times as wide, learns the images that ship with the package,
and is pruned to a quarter of its operations by gates on single weights, on 4 × 4 blocks, on channels, and on channels in
steps of 8. Each result is compacted and measured by `deploy` in eager PyTorch, compiled, and in ONNX Runtime, in turns
with the dense network. A ratio is against the dense network in the *same* runtime. One seed: accuracies are an example.
"""
import argparse, copy, sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hyperflux import Hyperflux
from hyperflux.deploy import compact, deploy
from hyperflux.lab import load_data
from hyperflux.structure import blocks, channels, flops, flops_by_module, single

from .common import provenance, spelled, table, write_json

FORMS = {'single weights': lambda net, x: single(net, x), 'blocks 4 × 4': lambda net, x: blocks(net, 4, 4, x),
         'channels': channels, 'channels, by 8': lambda net, x: channels(net, x, multiple=8)}


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.one, self.two = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.Conv2d(n, n, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(n), nn.BatchNorm2d(n)
    def forward(self, x): return (x + self.norm2(self.two(self.norm1(self.one(x)).relu()))).relu()


class Net(nn.Module):
    "A stem, a residual block, a strided layer, another block, a mean"
    def __init__(self, wide=64):
        super().__init__()
        self.stem, self.block1 = nn.Conv2d(1, wide, 5, stride=2), Block(wide)
        self.down, self.block2 = nn.Conv2d(wide, 2*wide, 3, stride=2), Block(2*wide)
        self.head = nn.Linear(2*wide, 10)
    def forward(self, x):
        x = self.block1(self.stem(x).relu())
        x = self.block2(self.down(x).relu())
        return self.head(x.mean((2, 3)))


def train(model, loader, epochs, lr, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs*len(loader))
    model.train()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, test): return sum((model(x).argmax(1) == y).sum().item() for x, y in test)/20


def pruned(dense, form, loader, epochs, x):
    "A copy, a quarter of whose operations are left"
    net = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9, weight_decay=5e-4)
    pruner = Hyperflux(net, optimizer, sparsity=.75, steps=epochs*len(loader), groups=FORMS[form](net, x), cost=flops)
    return train(net, loader, epochs, .05, optimizer), pruner


def rows_of(form, net, x, test, how):
    "Accuracy, operations and times of a network in all runtimes"
    report, (small, _) = deploy(net, x, **how), compact(net, x[:2])
    count = lambda m: flops_by_module(m, example=(x[:1],))['']
    about = dict(form=form, accuracy=accuracy(net, test), operations=count(small)/count(net))
    times = {(r['batch'], r['form'].split(' (')[0]): r for r in report.speed}
    rows = []
    for (batch, name), r in times.items():
        kind, _, runtime = name.partition(', ')
        dense = times.get((batch, f'dense{", " + runtime if runtime else ""}'))
        if dense is None or kind == 'dense' and form != 'dense': continue
        rows.append(about | dict(batch=batch, runtime=runtime or 'eager', network=kind, seconds=r['seconds'],
                                 ratio=dense['seconds'][1]/r['seconds'][1], n=r['n']))
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m benchmarks.small', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='a narrow network, one form, eager only: measures nothing')
    p.add_argument('--threads', type=int, default=2, help='of the CPU (2)')
    p.add_argument('--out', help='a JSON file for the record')
    argv = sys.argv[1:] if argv is None else argv
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads); torch.set_flush_denormal(True); torch.manual_seed(0)
    data = load_data()
    loader, test = data.loader('train', batch_size=128), data.loader('test', batch_size=1000)
    x = next(iter(test))[0][:64]
    how = dict(batches=(1, 64), compiled=not a.smoke, onnx=not a.smoke, rounds=3 if a.smoke else 41)
    dense = train(Net(8 if a.smoke else 64), loader, 1 if a.smoke else 3, .1)
    record = dict(benchmark='small', **provenance(spelled('python -m benchmarks.small', argv)), smoke=a.smoke,
                  rows=rows_of('dense', dense, x, test, how))
    for form in ['channels'] if a.smoke else FORMS:
        net, pruner = pruned(dense, form, loader, 1 if a.smoke else 8, x[:2])
        record['rows'] += rows_of(form, net, x, test, how)
        print(form, f'{pruner.density:.4f}', flush=True)
        if a.out: write_json(record, a.out)
    cells = [(r['form'], f"{r['accuracy']:.1f}", f"{r['operations']:.1%}", str(r['batch']), r['runtime'], r['network'],
              f"{1e3*r['seconds'][1]:.3f}", f"{r['ratio']:.2f}") for r in record['rows']]
    print(table(('form', 'accuracy', 'operations', 'batch', 'runtime', 'network', 'ms', '× dense there'), cells, left=1))
    return record


if __name__ == '__main__': main()
