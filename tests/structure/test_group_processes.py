"Many processes prune channels as one does. Real processes, gloo, CPU."
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux, Settings
from hyperflux.lab.processes import wrap
from hyperflux.structure import channels, features, flops
from tests.helpers import together


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 21), nn.ReLU(), nn.Linear(21, 15), nn.ReLU(), nn.Linear(15, 5))


g = torch.Generator().manual_seed(1)
xs, ys = torch.randn(256, 37, generator=g), torch.randint(5, (256,), generator=g)


def cut(model):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    return fully_shard(model, mesh=init_device_mesh('cpu', (dist.get_world_size(),)))


def both(model, example): return features(model, example) + channels(model, example)


def start(shard=None, steps=160, found=channels, temperature=0.):
    model = build()
    groups = found(model, xs[:2])                                   # before it is sharded: then it can be looked at
    if shard: shard(model)
    opt = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=5e-4)
    return model, opt, Hyperflux(model, opt, sparsity=.6, steps=steps, groups=groups, cost=flops, meter=True,
                                 settings=Settings(updates=50, temperature=temperature))


def train(model, opt, steps, part=lambda v: v, first=0):
    for i in range(first, first + steps):
        b = slice(32*(i % 8), 32*(i % 8) + 32)
        opt.zero_grad()
        F.cross_entropy(model(part(xs[b])), part(ys[b])).backward()
        opt.step()


def same(world, *tensors):
    return all(torch.equal(a, b) for others in world.gather(tensors) for a, b in zip(others, tensors))


warm = pytest.mark.parametrize('temperature', [0., .02])


@warm
def test_ddp(temperature): together(2, prunes_under_ddp, temperature)


def prunes_under_ddp(world, temperature):
    "Gates are the same in both processes, to the last bit, and those of one process that sees the whole batch"
    model, opt, p = start(temperature=temperature)
    train(wrap(model, world), opt, 160, lambda v: v.chunk(2)[world.rank])
    alone, opt1, q = start(temperature=temperature)
    train(alone, opt1, 160)
    assert same(world, p.gate, p.presence, p.mask, *p.params) and p.stage == 'done'
    assert torch.equal(p.gate, q.gate) and p.remaining <= p.budget
    torch.testing.assert_close(p.presence, q.presence, rtol=1e-3, atol=1e-3)


@warm
def test_fsdp_equals_one_process(temperature): together(2, prunes_as_one, temperature)


def prunes_as_one(world, temperature):
    """Both processes get the same batch, and its features have gates, too. The sum over a column adds its parts in
    another order, so presences may differ in their last bits; gates are the same in both processes, and those of
    one"""
    alone, opt1, p = start(found=both, temperature=temperature)
    model, opt, q = start(cut, found=both, temperature=temperature)
    assert torch.equal(p.presence, q.presence) and q.names == p.names and sum(q.sizes) < q.d
    for first, n in (0, 40), (40, 80), (120, 40):
        train(alone, opt1, n, first=first), train(model, opt, n, first=first)
        assert same(world, q.gate, q.presence) and torch.equal(p.gate, q.gate)
        torch.testing.assert_close(p.presence, q.presence, rtol=0, atol=1e-4)
        assert str(p) == str(q) and p.density == q.density
    for a, b in zip(alone.parameters(), model.parameters()): torch.testing.assert_close(a, b.full_tensor())


def test_fsdp_resumes(tmp_path): together(2, resumes, tmp_path)


def resumes(world, folder):
    "Each process saves its own part; what goes on equals what was not stopped, bit for bit"
    model, opt, p = start(cut, temperature=.02)
    path = Path(folder)/f'{world.rank}.pt'
    train(model, opt, 70)
    torch.save([o.state_dict() for o in (model, opt, p)], path)
    train(model, opt, 90, first=70)
    model2, opt2, q = start(cut, temperature=.02)
    for o, s in zip((model2, opt2, q), torch.load(path, weights_only=True)): o.load_state_dict(s)
    train(model2, opt2, 90, first=70)
    assert torch.equal(p.presence, q.presence) and torch.equal(p.gate, q.gate) and p.history == q.history
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), model2.parameters()))
