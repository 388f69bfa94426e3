"""Many processes prune as one does: under DDP nothing is needed, under FSDP2 a pruner works on shards. Real processes,
gloo, CPU."""
import warnings
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux, Settings
from hyperflux.core.landing import land_
from hyperflux.core.shards import Shards, sharded
from hyperflux.core.layout import local
from hyperflux.lab.processes import World, first, join, leave, wrap
from tests.helpers import together

# 21, 7 and 5 rows: cut unevenly, and over four processes with an empty part
LENET, ODD = (784, 300, 100, 10), (37, 21, 7, 5)


def build(dims=ODD, dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(dims, dims[1:])]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1].to(dtype)


def data(dims=ODD, dtype=torch.float32, n=256):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, dims[0], generator=g).to(dtype), torch.randint(dims[-1], (n,), generator=g)


def sgd(model): return torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=5e-4)
def adam(model): return torch.optim.Adam(model.parameters(), lr=1e-3)


def cut(model, mesh=None, each=True, **kw):
    "fully_shard, layer by layer and the rest"
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = mesh or init_device_mesh('cpu', (dist.get_world_size(),))
    if each:
        for m in model:
            if isinstance(m, nn.Linear): fully_shard(m, mesh=mesh, **kw)
    return fully_shard(model, mesh=mesh, **kw)


def start(dims=ODD, dtype=torch.float32, optimizer=sgd, shard=None, steps=300, sparsity=.9, temperature=0., **kw):
    model = build(dims, dtype)
    if shard: shard(model)
    opt = optimizer(model)
    settings = Settings(updates=50, temperature=temperature)
    return model, opt, Hyperflux(model, opt, sparsity=sparsity, steps=steps, settings=settings, **kw)


def train(model, opt, steps, batches, look=lambda: None):
    "`batches` holds one (x, y) a step, and begins again at its end"
    for i in range(steps):
        x, y = batches[i % len(batches)]
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
        look()


def batches(xs, ys, size): return list(zip(xs.split(size), ys.split(size)))


def whole(pruner, flat):
    "A flat vector of all processes, as one process has it"
    return torch.cat([pruner.layout.whole(i, v).flatten() for i, v in enumerate(flat.split(pruner.sizes))])


def state(pruner): return {k: whole(pruner, getattr(pruner, k)) for k in ('mask', 'presence', 'value')}


def same(world, *tensors):
    return all(torch.equal(a, b) for others in world.gather(tensors) for a, b in zip(others, tensors))


def raises(error, match, do):
    "pytest.raises, in words that reach the parent"
    with pytest.raises(error, match=match): do()


# The processes themselves

def test_alone(monkeypatch):
    "Without torchrun there is one process, and nothing to do"
    for k in 'RANK', 'WORLD_SIZE', 'LOCAL_RANK': monkeypatch.delenv(k, raising=False)
    world, model, x = join(), build(), torch.ones(3)
    assert world == World(0, 1, 0) and world.main
    assert wrap(model, world) is model and world.sum(x) is x and world.gather('a') == ['a']
    with first(world): world.barrier()
    leave()
    assert not torch.distributed.is_initialized()


def test_half_set(monkeypatch):
    "An environment in which only a part of torchrun's variables is set"
    for k in 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT': monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RuntimeError,
                       match=r'missing: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; set: WORLD_SIZE.*'
                                           r'torchrun --nproc-per-node.*unset WORLD_SIZE'):
        join()


def test_join(tmp_path): together(3, works_together, tmp_path)


def works_together(world, folder):
    # a second join finds the group that is there
    assert world == join() and world.size == 3 and world.rank == world.local_rank
    x = torch.arange(2)*world.rank
    assert world.sum(x).tolist() == [0, 3] and x.tolist() == [0, world.rank]
    assert world.gather(dict(rank=world.rank)) == [dict(rank=i) for i in range(3)]
    seen = Path(folder)/'seen'
    with first(world):
        assert seen.exists() != world.main
        seen.touch()
    world.barrier()
    def fail():
        with first(world):
            if world.main: raise OSError('disk full')
    if world.main: raises(OSError, 'disk full', fail)                # the others are not left waiting
    else: fail()
    raises(ValueError, "cpu .gloo. or cuda .nccl.: got 'meta'", lambda: join('meta'))
    model = build()
    assert type(wrap(model, world)) is nn.parallel.DistributedDataParallel


# DDP

def test_ddp(): together(2, prunes_under_ddp)


def prunes_under_ddp(world):
    xs, ys = data(LENET)
    halves = [(x.chunk(2)[world.rank], y.chunk(2)[world.rank]) for x, y in batches(xs, ys, 64)]
    model, opt, p = start(LENET, steps=200, meter=True)
    called = wrap(model, world)
    seen, one = ([], []), start(LENET, steps=200, meter=True)
    look = lambda p, seen: lambda: seen.append([torch.cat([w.grad.flatten() for w in p.params]), p.sensitivity.clone(),
                                                p.presence.clone(), p.meter.total.clone()])
    train(called, opt, 20, halves, look(p, seen[0]))
    train(*one[:2], 20, batches(xs, ys, 64), look(one[2], seen[1]))
    for a, b in zip(*seen):
        # Adam divides by a gradient's size, so presences feel the last bits of small ones
        for u, v, tolerance in zip(a, b, (1e-6, 1e-6, 1e-3, 1e-6)):
            torch.testing.assert_close(u, v, rtol=1e-4, atol=tolerance)
    train(called, opt, 180, halves)
    assert same(world, p.mask, p.presence, p.value, *p.params)
    assert same(world, *(torch.tensor([r['density'], r['pressure']]) for r in p.history))
    assert p.left == p.keep == int(world.sum(p.mask.count_nonzero()))/2 and p.stage == 'done'


# FSDP2

@pytest.mark.parametrize('dims', [LENET, ODD], ids=['lenet', 'odd'])
def test_fsdp_equals_one_process(dims): together(2, prunes_as_one, dims)


def prunes_as_one(world, dims):
    """Both processes get the same batch, so that the mean gradient is that of one process to the last bit. Weights
    follow bit for bit. Presences may not: the fused Adam takes several numbers at once and those left over one by one,
    which rounds otherwise, and shards end elsewhere. Differences of 1e-6 in a presence decide nothing here: masks are
    equal"""
    steps, both = 100, batches(*data(dims), 32)
    one, many = start(dims, steps=steps, meter=True), start(dims, steps=steps, meter=True,
                                                            shard=lambda m: cut(m, each=dims == LENET))
    p, q = one[2], many[2]
    assert torch.equal(p.presence, whole(q, q.presence))             # the first presences are those of one process
    assert q.names == p.names and q.d == p.d and q.keep == p.keep and sum(q.sizes) < q.d
    for n in (steps//4, steps//2, steps - steps//4 - steps//2):
        train(*one[:2], n, both), train(*many[:2], n, both)
        a, b = state(p), state(q)
        assert torch.equal(a['mask'], b['mask']) and torch.equal(a['value'], b['value'])
        torch.testing.assert_close(a['presence'], b['presence'], rtol=0, atol=2e-5)
        assert q.layers() == p.layers() and (q.left, q.density, q.stage) == (p.left, p.density, p.stage)
        assert str(q) == str(p)
    assert q.left == q.keep and p.history == q.history and p.stage == 'done'
    for w, v in zip(one[0].parameters(), many[0].parameters()): assert torch.equal(w, v.full_tensor())
    for a, b in zip(p.meter.layers(), q.meter.layers()):
        for k in a: assert a[k] == b[k] if k[:5] != 'flux_' else a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-9), k
    assert q.meter.minimum(.3) == pytest.approx(p.meter.minimum(.3), rel=1e-3)
    assert p.meter.histogram()['edges'] == q.meter.histogram()['edges']
    assert str(q.meter).splitlines()[0] == str(p.meter).splitlines()[0]


def test_noise(): together(2, draws_alike)


def draws_alike(world):
    """Gates are drawn as by one process, though each process has a part of them; and where each has all, the same in
    both"""
    one, many, all_of_them = (start(steps=120, temperature=.02, shard=shard)
                              for shard in (None, lambda m: cut(m, each=False), None))
    p, q, r = one[2], many[2], all_of_them[2]
    both = batches(*data(), 32)
    halves = [(x.chunk(2)[world.rank], y.chunk(2)[world.rank]) for x, y in both]
    called, odd = wrap(all_of_them[0], world), 0
    for i in range(100):
        train(*one[:2], 1, both[i % len(both):]), train(*many[:2], 1, both[i % len(both):])
        train(called, all_of_them[1], 1, halves[i % len(both):])
        assert torch.equal(p.gate, whole(q, q.gate)) and torch.equal(p.mask, whole(q, q.mask))
        odd += int((p.gate != p.mask).sum())
    assert odd > 100 and same(world, r.gate, r.presence, *r.params) and q.left == q.keep


def test_fsdp_resumes(tmp_path): together(2, resumes, tmp_path)


def resumes(world, folder):
    "Each process saves its own shards; what goes on from them equals what was not stopped, bit for bit"
    both, fresh = batches(*data(), 32), lambda: start(shard=lambda m: cut(m, each=False), steps=160, meter=True,
                                                      sparsity=.8, temperature=.02)
    path, stops = lambda stop: Path(folder)/f'{stop}-{world.rank}.pt', {70: 'prune', 100: 'regrow', 150: 'settle'}
    rest = lambda stop: both[stop % len(both):] + both[:stop % len(both)]
    model, opt, p = fresh()
    def save():
        if p.step in stops: torch.save([o.state_dict() for o in (model, opt, p)], path(p.step))
    train(model, opt, 160, both, save)
    for stop, stage in stops.items():
        second = fresh()
        for o, s in zip(second, torch.load(path(stop), weights_only=True)): o.load_state_dict(s)
        assert second[2].stage == stage and second[2].step == stop
        train(*second[:2], 160 - stop, rest(stop))
        for a, b in zip((p.mask, p.presence, *map(local, model.parameters())), (second[2].mask, second[2].presence,
                                                                                *map(local, second[0].parameters()))):
            assert torch.equal(a, b)
        assert p.history == second[2].history and second[2].left == second[2].keep
        assert p.meter.layers() == second[2].meter.layers()
    mine, p = second[2].state_dict(), start()[2]
    theirs = world.gather(mine)[1 - world.rank]
    other = (r"one process's part of another sharding: there .*part \d of 2 along dimension 0, "
             r"here .*part \d of 2.*that it saved itself")
    raises(ValueError, other, lambda: second[2].load_state_dict(theirs))
    raises(ValueError, "there .*part . of 2 along dimension 0, here whole", lambda: p.load_state_dict(mine))
    raises(ValueError, "there whole, here .*part . of 2", lambda: second[2].load_state_dict(p.state_dict()))


def test_fsdp_in_practice(): together(2, lives_with_others)


def lives_with_others(world):
    "Mixed precision, clipped gradients, tied weights, checkpoints in mid-run, an evaluation in between"
    from torch.distributed.fsdp import MixedPrecisionPolicy
    xs, ys = data()
    mine = [(x.chunk(2)[world.rank], y.chunk(2)[world.rank]) for x, y in batches(xs, ys, 64)]
    model, opt, p = start(shard=lambda m: cut(m, each=False, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32)), steps=100)
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), .5)
    opt.register_step_pre_hook(lambda *_: clip() and None)
    train(model, opt, 100, mine)
    assert p.presence.dtype == torch.float32
    assert p.left == p.keep == sum(int((w.full_tensor() != 0).sum()) for w in p.params)

    model, opt, p = start(shard=lambda m: cut(m, each=False), steps=200)
    train(model, opt, 30, mine)
    def look():                                                      # after this the root holds its weights whole
        with torch.no_grad(): return model(xs[:1].expand(2, -1))
    before = look()
    assert not any(map(sharded, model.parameters()))
    p.mask.zero_(), p.apply_mask()
    assert not torch.equal(look(), before) and (look() == model[-1].bias).all()
    p.mask.copy_(p.presence >= 0), p.restore()
    assert torch.equal(look(), before)
    p.detach(), raises(ValueError, r'not in the optimiser: .*or after model.reshard\(\)',
                       lambda: Hyperflux(model, sgd(model), sparsity=.9, steps=200))
    # the optimiser was made in time: a pruner may come any time
    look(), Hyperflux(model, opt, sparsity=.9, steps=200).detach()
    p.attach()

    train(model, opt, 1, mine)
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for v in dense.values(): v.fill_(.25)
    for load in (lambda: model.load_state_dict(dense), lambda: [local(w).fill_(.5) for w in p.params]):
        load()
        presence, value = p.presence.clone(), torch.cat([local(w).flatten() for w in p.params])
        for g in (*opt.param_groups, *p.gate_optimizer.param_groups): g['lr'] = 0.
        train(model, opt, 1, mine)
        assert torch.equal(p.value, value) and torch.equal(p.presence, presence) and (value == value[0]).all()
        assert torch.equal(torch.cat([local(w).flatten() for w in p.params]), value*p.mask)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(37, 37), nn.Linear(37, 37), nn.Linear(37, 5)
            self.b.weight = self.a.weight
        def forward(self, x): return self.head(self.b(self.a(x).tanh()).tanh())
    runs = []
    for shard in (lambda m: m, lambda m: cut(m, each=False)):
        torch.manual_seed(0)
        model = shard(Twice())
        opt = adam(model)
        runs.append(Hyperflux(model, opt, sparsity=.9, steps=100, compile=bool(runs)))      # and a compiled update
        train(model, opt, 100, batches(xs, ys, 32))
    p, q = runs
    # fewer where presences rested
    assert q.names == ['a.weight', 'head.weight'] and q.left == q.keep and 0 < q._count <= 75
    assert (p.mask != whole(q, q.mask)).sum() <= 4


def test_four_processes(): together(4, works_on_a_mesh)


def works_on_a_mesh(world):
    """HSDP (shards and copies) and, by the way, tensor parallelism: counts are those of one process, every weight
    counted once"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    both = batches(*data(), 32)
    one = start(steps=100)
    train(*one[:2], 100, both)
    p = one[2]
    grid = init_device_mesh('cpu', (2, 2), mesh_dim_names=('copy', 'shard'))
    line = lambda m: cut(m, each=False)
    for shard in (lambda m: cut(m, grid, each=False), line):
        model, opt, q = start(steps=100, shard=shard)
        train(model, opt, 100, both)
        assert torch.equal(whole(q, q.mask), p.mask) and torch.equal(whole(q, q.value), p.value)
        assert q.layers() == p.layers()
        if shard is not line:
            assert [s.split(', ')[-1] for s in q.layout.place] == [f'part {world.rank % 2} of 2 along dimension 0']*3
        else: assert world.gather(q.sizes)[3] == [3*37, 1*21, 0]     # 21 = 6+6+6+3, 7 = 2+2+2+1, 5 = 2+2+1+0 rows

    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
    model.load_state_dict(twin.state_dict())
    parallelize_module(model, grid['shard'], {'0': ColwiseParallel(), '2': RowwiseParallel()})
    fully_shard(model, mesh=grid['copy'])
    runs = [(m, o, Hyperflux(m, o, sparsity=.8, steps=100)) for m in (twin, model) for o in [adam(m)]]
    x, y = data((12, 6))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for m, o, _ in runs: train(m, o, 100, batches(x, y, 32))
    p, q = (r[2] for r in runs)
    assert q.left == q.keep == p.left and (whole(q, q.mask) != p.mask).sum() <= 4


def test_landing_over_shards(): together(4, lands)


def lands(world):
    "Any cut, any number of equal presences, any count to keep: the same weights stay as in one process"
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    line, grid = init_device_mesh('cpu', (4,)), init_device_mesh('cpu', (2, 2))
    shapes = (10, 3), (1, 7), (6, 4, 2), (5,), (3, 3)
    # the last is plain: the same in every process
    ways = (line, [Shard(0)]), (line, [Shard(0)]), (grid, [Replicate(), Shard(1)]), (grid,
        [Shard(0), Replicate()]), None
    plain = [torch.empty(s) for s in shapes]
    cuts = Shards([distribute_tensor(t, *w) if w else t for t, w in zip(plain, ways)])
    assert len(cuts.cuts) == 3 and sum(world.gather(sum(cuts.sizes))) > sum(t.numel() for t in plain)
    g, n = torch.Generator().manual_seed(0), sum(t.numel() for t in plain)
    for dtype, levels, keeps in (torch.float32, 3, (0, 1, 29, 40, 61, n)), (torch.float32, 1,
            (30, 31, 88, n - 1)), (torch.float32, 10**6, (50,)), (torch.float64, 5, (60,)):
        flat = torch.randint(levels, (n,), generator=g).to(dtype)/levels - .5
        pieces = [cuts.piece(i, v) for i, v in enumerate(flat.split([t.numel() for t in plain]))]
        for keep in keeps:
            one, mine = flat.clone(), torch.cat([x.flatten() for x in pieces])
            assert land_(one, keep) == cuts.land_(mine, keep)
            assert torch.equal(torch.cat([cuts.whole(i, v).flatten() for i, v in enumerate(mine.split(cuts.sizes))]),
                               one)
            assert int(cuts.sum(mine >= 0)) == keep
    raises(ValueError, f'of {n} weights one can keep 0 to {n}: got {n + 1}', lambda: cuts.land_(mine, n + 1))
    if world.rank == 2: mine[0] = torch.nan
    raises(ValueError, 'NaN or infinite', lambda: cuts.land_(mine, 3))                     # in all four


# What is refused

def test_refusals(): together(2, refuses)


def refuses(world):
    "What cannot work is said in every process, and nobody is left waiting"
    both = batches(*data(), 32)
    model, opt, p = start()
    before = [w.clone() for w in p.params]
    cut(model)
    raises(RuntimeError, r"0.weight is no longer the model's.*shard first, then make the optimiser, then the pruner",
           lambda: train(model, opt, 1, both))
    assert all(map(torch.equal, before, p.params))

    model = build()
    early = sgd(model)
    cut(model)
    raises(ValueError, 'not in the optimiser: 0.weight.*with fully_shard: shard, then make the optimiser',
           lambda: Hyperflux(model, early, sparsity=.9, steps=200))

    from torch.distributed.fsdp import FullyShardedDataParallel
    for original in (True, False):
        old = FullyShardedDataParallel(build(), use_orig_params=original, device_id=torch.device('cpu'))
        raises(TypeError, 'FSDP1.*use torch.distributed.fsdp.fully_shard', lambda: Hyperflux(old, sgd(old), sparsity=.9,
            steps=200))

    model, opt, p = start(shard=cut, steps=200, meter=True)
    train(model, opt, 10, both)
    def poison(*_):
        if p.step == 11 and world.rank == 1: local(p.params[1].grad)[0, 0] = torch.nan      # in one process only
    opt.register_step_pre_hook(poison)
    p.detach(), p.attach()                                           # the pruner's hook now comes after
    raises(FloatingPointError, 'at step 12: .*NaN or infinity; lower the learning rate', lambda: train(model, opt, 50,
        both))
    raises(FloatingPointError, 'NaN or infinite flux in 1 weights of 2.weight', lambda: p.meter.mean)
    assert p.presence.isnan().any() == (world.rank == 1)

