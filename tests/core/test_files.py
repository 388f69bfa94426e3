"Copies and files: what is saved goes on as if nothing had been."
import copy, io

import pytest, torch
from torch import nn

from tests.core.rig import staged, xs, mlp, sgd, loss, flat, start, train, state, assert_same, assert_sparse, standstill


def test_deepcopy():
    "A copy made in mid-run is a plain sparse network that trains on its own"
    model, opt, p = start()
    train(model, opt)
    twin, before = copy.deepcopy(model), state(p)
    assert type(twin) is nn.Sequential and twin.state_dict().keys() == mlp().state_dict().keys()
    assert sum((w == 0).sum() for w in (twin[0].weight, twin[2].weight, twin[4].weight)) == p.d - p.left
    train(twin, sgd(twin))
    assert not (twin[0].weight == 0).any()
    assert_same(before, state(p))
    train(model, opt)
    assert p.step == 20


def reload(obj, **kw):
    "Through a file and back"
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, **kw)


def test_save_and_load():
    """Saved in mid-run, whole or as a state_dict, the network comes back with its zeros, and the run goes on as if
    nothing was"""
    model, opt, p = start()
    train(model, opt)
    whole, weights = reload(model, weights_only=False), reload(model.state_dict(), weights_only=True)
    for o in (whole.state_dict(), weights): assert torch.equal(flat(o[n] for n in p.names), p.value*p.mask)
    assert torch.equal(whole(xs), model(xs))
    train(model, opt)
    other = start()
    train(*other[:2], 20)
    assert_same(state(p), state(other[2]))


def test_optimizer_pickles():
    "The optimiser can be copied and saved with its pruner attached; the copy is free of it"
    model, opt, p = start()
    train(model, opt)
    before = state(p)
    for o in (copy.deepcopy(opt), reload(opt, weights_only=False)): o.step()
    assert_same(before, state(p))


def test_optimizer_state_loaded():
    "The optimiser's own state, loaded in mid-run, goes in, and the pruner stays"
    model, opt, p = start()
    train(model, opt)
    opt.load_state_dict(reload(opt.state_dict(), weights_only=True))
    train(model, opt)
    other = start()
    train(*other[:2], 20)
    assert p.step == 20
    assert_same(state(p), state(other[2]))


def test_dense_weights_loaded():
    """A dense checkpoint loaded in mid-run gives the values; the presences stay, and absent weights are zero after the
    next step"""
    model, opt, p = start()
    train(model, opt)
    before, dense = state(p), mlp().state_dict()
    model.load_state_dict(dense)
    standstill(model, opt, p)
    assert torch.equal(p.value, flat(dense[n] for n in p.names))
    assert_same(before, state(p), 'presence', 'mask')
    assert_sparse(p)


def test_sparse_weights_loaded():
    "An earlier sparse checkpoint gives the values of what it held; what is absent in both keeps its value"
    model, opt, p = start()
    train(model, opt)
    early = copy.deepcopy(model.state_dict())
    train(model, opt, 20)
    before, theirs = state(p), flat(early[n] for n in p.names)
    assert ((theirs == 0) & (before['mask'] == 1)).any() and ((theirs != 0) & (before['mask'] == 0)).any()
    model.load_state_dict(early)
    standstill(model, opt, p)
    assert torch.equal(p.value, torch.where((before['mask'] == 0) & (theirs == 0), before['value'], theirs))
    assert_same(before, state(p), 'presence', 'mask')
    assert_sparse(p)


def test_weights_written_behind_the_version_counter():
    "Weights written through .data, as vector_to_parameters does, are kept as those of load_state_dict are"
    model, opt, p = start()
    train(model, opt)
    nn.utils.vector_to_parameters(torch.full((sum(w.numel() for w in model.parameters()),), .5), model.parameters())
    standstill(model, opt, p)
    assert (p.value[p.mask > 0] == .5).all()


@pytest.mark.parametrize('meter', [False, True], ids=['', 'meter'])
@pytest.mark.parametrize('stop, stage', [(23, 'prune'), (51, 'regrow'), (70, 'settle')])
def test_resume(stop, stage, meter):
    "A run stopped and continued in a new process equals the one that was not, bit for bit"
    fresh = lambda: start(steps=80, pressure=None, sparsity=.8, settings=staged, meter=meter)
    whole, first, second = fresh(), fresh(), fresh()
    train(*whole[:2], 80)
    train(*first[:2], stop)
    assert first[2].stage == stage
    for o, s in zip(second, reload([o.state_dict() for o in first], weights_only=True)): o.load_state_dict(s)
    assert_same(state(first[2]), state(second[2]))
    train(*second[:2], 80 - stop)
    p, q = whole[2], second[2]
    if stage != 'settle': assert_same(state(p), state(q))
    else: assert_same(state(p), state(q), 'theta', 'presence', 'mask')
    for a, b in zip(whole[0].parameters(), second[0].parameters()): assert torch.equal(a, b)
    assert (p.step, p.gamma, p.landed, p.history) == (q.step, q.gamma, q.landed, q.history) and q.left == q.keep
    if meter: assert torch.equal(p.meter.mean, q.meter.mean) and p.meter.layers() == q.meter.layers()


def test_looking_is_free():
    "Taking the pruner's state, printing it and reading its rows changes nothing, even between a loss and its backward"
    model, opt, p = start()
    other = start()
    for _ in range(10):
        opt.zero_grad()
        value = loss(model)
        p.state_dict(), str(p), p._repr_markdown_(), p.layers(), p.density
        value.backward()
        opt.step()
    train(*other[:2])
    assert not p.value.requires_grad
    assert_same(state(p), state(other[2]))
