"Stages and landing: the target to the weight, from any state."
import warnings

import pytest, torch
from torch import nn

from hyperflux import Hyperflux, Settings, authors
from hyperflux.core.control import LogController
from tests.core.rig import quick, staged, flat, start, train


@pytest.mark.parametrize('sparsity', [.5, .9, .98, .995])
def test_lands_exactly(sparsity):
    "The network has exactly the weights asked for, from the landing to the end"
    model, opt, p = start(sparsity=sparsity, pressure=None, steps=120, settings=staged)
    nonzeros, stages = [], []
    for _ in range(120):
        stages.append(p.stage)
        train(model, opt, 1)
        nonzeros.append(int(flat(p.params).count_nonzero()))
    keep = round((1 - sparsity)*255)
    assert keep == p.keep and nonzeros[89:] == [keep]*31
    assert stages == ['prune']*60 + ['regrow']*30 + ['settle']*30 and p.stage == 'done'
    rows = p.history
    # so few steps may need a lift
    assert [s for s in dict.fromkeys(r['stage'] for r in rows) if s != 'refloated'] == ['prune', 'regrow', 'settle',
        'landing']
    assert [r['step'] for r in rows] == sorted(r['step'] for r in rows) and rows[-1]['step'] == 90
    assert all(r['pressure'] == 0 for r in rows if r['step'] > 60)
    assert all(0 <= r['density'] <= 1 and r['planned'] <= 1 for r in rows)
    assert f'{keep:,} of 255 weights left, {keep:,} asked' in str(p) and 'total' in str(p)


def test_pressure_alone():
    "With a pressure and no sparsity there is nothing to land on"
    model, opt, p = start(steps=120, settings=staged)
    train(model, opt, 90)
    mask = p.mask.clone()
    train(model, opt, 30)
    assert torch.equal(mask, p.mask)                                      # the settle stage
    assert not p.landed and all(r['planned'] == 1. and r['stage'] != 'landing' for r in p.history)
    assert {r['pressure'] for r in p.history} == {.03, 0.} and p.stage == 'done' and p.density < .95
    assert 'asked' not in str(p)


def test_authors():
    "authors(...) runs the authors' plan: their controller once an epoch, regrowth, and no exact landing"
    model, opt, p = start(sparsity=.8, pressure=None, steps=1200, settings=authors(10, 10))
    train(model, opt, 1200)
    assert not p.landed and p.stage == 'done' and p.density < .8
    assert [r['step'] for r in p.history] == list(range(60, 1201, 60))
    assert {r['stage'] for r in p.history} == {'prune', 'regrow', 'done'}
    assert p.gate_optimizer.param_groups[0]['eps'] == 1e-8


@pytest.mark.parametrize('settings, kw', [(staged, dict(sparsity=.8, pressure=None)),
                                          (quick, dict(sparsity=.8, pressure=None)), (quick, dict())],
                         ids=['landed', 'landed on the last step', 'never landed'])
def test_past_the_end(settings, kw):
    "Steps past the announced end warn once, at the user's line, and leave the topology as it is"
    model, opt, p = start(steps=60, settings=settings, **kw)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', '.*under half of the planned')
        train(model, opt, 60)
    mask, theta = p.mask.clone(), flat(p.params)
    with pytest.warns(UserWarning, match='step 61 of 60 announced: the topology stays as it is') as caught:
        train(model, opt, 5)
    assert [w.filename for w in caught] == [train.__code__.co_filename]
    now = flat(p.params)
    assert torch.equal(p.mask, mask) and torch.equal(now != 0, mask > 0) and not torch.equal(now, theta)


def test_refloats_before_the_network_is_empty():
    "A controller that presses far too hard empties no network: one warning, back to the plan, and the landing is exact"
    class Press(LogController):
        def __call__(self, density, planned, progress): return 1e6
    model, opt, p = start(pressure=None, sparsity=.9, steps=200, settings=Settings(controller=Press))
    with pytest.warns(UserWarning, match='under half of the planned'): train(model, opt, 200)
    assert sum(r['stage'] == 'refloated' for r in p.history) > 1
    assert p.left == p.keep and min(r['density'] for r in p.history if r['stage'] == 'regrow') > 0


def test_vectors_follow_the_weights_order_in_memory():
    """In channels_last: the same presence for the same weight, flat views without gaps, and a state that is not read in
    the wrong order"""
    def make(layout):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1), nn.Flatten(),
                            nn.Linear(2*4*4, 3)).to(memory_format=layout)
        opt = torch.optim.SGD(net.parameters(), lr=.05, momentum=.9)
        return net, opt, Hyperflux(net, opt, sparsity=.5, steps=200, seed=3)
    (a, oa, pa), (b, ob, pb) = make(torch.contiguous_format), make(torch.channels_last)
    assert b[0].weight.stride() != a[0].weight.stride()
    assert [v.stride() for v in pb.gate_params] == [p.stride() for p in pb.params]
    assert all(s.equal(t) for s, t in zip(pa.gate_params, pb.gate_params)) and not pa.presence.equal(pb.presence)
    assert all(v.equal(p) for v, p in zip(pb.values, pb.params))
    state = pa.state_dict()
    with pytest.raises(ValueError, match='lie in memory in another order'): pb.load_state_dict(state)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        x = torch.randn(8, 4, 6, 6, generator=g)
        for net, opt in (a, oa), (b, ob): opt.zero_grad(); net(x).square().mean().backward(); opt.step()
    assert pa.left == pb.left == pa.keep
    same = sum(int((s == t).sum()) for s, t in zip(pa.masks, pb.masks))
    assert same > .95*pa.d, 'only rounding may tell the two runs apart'


def test_a_wrapped_optimizer_is_named_and_a_failed_attempt_leaves_nothing_behind():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer): self.optimizer = optimizer
    net = nn.Linear(20, 20)
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    with pytest.raises(TypeError,
                       match='Wrapper wraps an optimiser and fires no hooks of its own: give the pruner the inner one'):
        Hyperflux(net, Wrapper(opt), sparsity=.5, steps=400)
    Hyperflux(net, opt, sparsity=.5, steps=400)


def test_an_average_on_another_device_is_masked():
    net = nn.Linear(20, 20)
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    pruner = Hyperflux(net, opt, sparsity=.5, steps=400)
    pruner.mask[:100] = 0
    average = nn.Linear(20, 20, device='meta')
    pruner.apply_mask(average)                                             # no CUDA is needed to see that masks move
    assert average.weight.device.type == 'meta'
