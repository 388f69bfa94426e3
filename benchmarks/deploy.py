"""What pruned networks weigh and how fast they are, in all forms.

    python -m benchmarks.deploy lenet      LeNet-300-100 from the main job at 99 %
    python -m benchmarks.deploy vgg        VGG-19, trained for 100 steps on the shipped images, deep layers at 99 %
    python -m benchmarks.deploy sizes      files of LeNet-300-100 at 90, 95, 98 and 99 %

Networks are trained unless they are there: runs/deploy-lenet300-SPARSITY, runs/deploy-vgg19.sparse.

Give it a machine with nothing else to do. Records go to nbs/results/deploy_NAME.json.
"""
import argparse, subprocess, sys
from pathlib import Path

import torch
from torch import nn

from hyperflux.rivals.scores import GMP
from hyperflux.lab.datasets import load_data
from hyperflux.deploy.forms import deploy, deploy_run
from hyperflux.study.results import load_run
from hyperflux.deploy.loading import load_sparse
from hyperflux.deploy.files import save_sparse
from hyperflux.lab.models import vgg19
from hyperflux.helpers import no_denormals

from benchmarks.common import provenance, root as repository, spelled, write_json

RUN, VGG = Path('runs/deploy-lenet300'), Path('runs/deploy-vgg19.sparse')


def picture(x):
    "A grey image of 28 × 28 as VGG takes it: three channels of 32 × 32"
    return nn.functional.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()


def train_vgg(steps):
    "VGG-19, everything from 256 channels on pruned to 99 % by magnitude, along a cubic path"
    torch.manual_seed(0)
    data = load_data('fashion-small')
    net = vgg19(10, (3, 32, 32))
    opt = torch.optim.SGD(net.parameters(), .02, momentum=.9, weight_decay=5e-4)
    deep = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.out_channels >= 256]
    pruner = GMP(net, opt, sparsity=.99, steps=steps, targets=deep, span=(.1, .7), updates=steps//2)
    for i, (x, y) in zip(range(steps), data.loader('train', 64, seed=0)):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(net(picture(x)), y)
        loss.backward()
        opt.step()
        if i % 10 == 0: print(f'step {i} of {steps}, loss {loss:.3f}, density {pruner.density:.3f}', flush=True)
    pruner.detach()
    return net.eval()


def accuracy(net):
    data, right = load_data('fashion-small'), 0
    with torch.inference_mode():
        for x, y in data.loader('test', 250): right += (net(picture(x)).argmax(1) == y).sum().item()
    return 100*right/len(data.test.images)


def run_of(sparsity):
    folder = RUN.with_name(f'{RUN.name}-{sparsity}')
    prune = sys.executable, '-m', 'hyperflux', 'prune', '--quiet', '--sparsity', str(sparsity), '--out', str(folder)
    if not (folder/'summary.json').is_file(): subprocess.run(prune, check=True)
    return folder


def lenet(a):
    report = deploy_run(run_of(.99), rounds=a.rounds, say=print)
    return report, {}


def vgg(a):
    if not VGG.exists():
        VGG.parent.mkdir(exist_ok=True)
        save_sparse(train_vgg(a.steps), VGG, plain_zeros=True)
    net = load_sparse(VGG, vgg19(10, (3, 32, 32))).eval()
    convs = {n: m.weight for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    layers = [dict(name=n, shape=list(w.shape), density=(w != 0).float().mean().item()) for n, w in convs.items()]
    torch.manual_seed(0)
    report = deploy(net, torch.randn(64, 3, 32, 32), rounds=a.rounds, name='VGG-19, deep layers at 99 %', say=print)
    return report, dict(accuracy=accuracy(net), layers=layers)


def sizes(a):
    rows = []
    for s in (.9, .95, .98, .99):
        net, summary, _ = load_run(run_of(s))
        path = RUN.with_name('size.sparse')
        size = save_sparse(net, path).bytes
        dense = 4*sum(p.numel() for p in net.parameters())
        back = load_sparse(path)
        assert all(torch.equal(v, back[k]) for k, v in net.state_dict().items())
        reached = {k: summary[k] for k in ('left', 'accuracy')}
        rows.append(dict(sparsity=s, **reached, dense=dense, bytes=size, share=size/dense))
        path.unlink()
    return None, dict(files=rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('lenet', 'vgg', 'sizes'))
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=25, help='of timing (25)')
    p.add_argument('--steps', type=int, default=100, help="of VGG-19's training, 64 images each (100)")
    p.add_argument('--out', help='the record (nbs/results/deploy_WHAT.json)')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    no_denormals()
    head = provenance(spelled(f'python -m benchmarks.deploy {a.what}', []))
    report, more = globals()[a.what](a)
    out = Path(a.out or repository/f'nbs/results/deploy_{a.what}.json')
    record = head | more | (dict(report=report.record()) if report else {})
    write_json(record, out)
    print(report or '\n'.join(f"{r['sparsity']:.0%}: {r['bytes']:,} bytes, {r['share']:.2%}" for r in more['files']))


if __name__ == '__main__': main()
