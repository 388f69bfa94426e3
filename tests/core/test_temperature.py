"Gates that are drawn: what the network computes with, who comes and goes, and that it all ends"
import io

import numpy as np, pytest, torch
from torch import nn
from torch.func import functional_call

from hyperflux import Hyperflux, Settings
from hyperflux.core.gates import heaviside
from hyperflux.core.temperature import Noise, open_share
from hyperflux.structure import channels, flops, nm
from hyperflux.study.recorder import Recorder
from tests.core.rig import adam, adamw, assert_same, flat, loss, mlp, sgd, state, train, xs

WARM = Settings(temperature=.1)


def wide(): return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))


FORMS = dict(single=lambda model: {},
             channels=lambda model: dict(sparsity=.8, groups=channels(model, xs[:2]), cost=flops),
             nm=lambda model: dict(sparsity=None, groups=nm(model, 2, 4, targets=[model[2], model[4]])))
forms = pytest.mark.parametrize('form', FORMS)


def start(optimizer=sgd, *, sparsity=.8, steps=400, settings=WARM, form='single', **kw):
    torch.manual_seed(1)
    model = mlp() if form == 'single' else wide()
    opt = optimizer(model)
    kw = dict(sparsity=sparsity) | kw | FORMS[form](model)
    return model, opt, Hyperflux(model, opt, steps=steps, settings=settings, **kw)


def cold(p): return (p.presence >= 0).to(p.dtype)


@pytest.mark.parametrize('optimizer', [sgd, adam, adamw])
def test_equals_noise_in_the_graph(optimizer):
    "Bit for bit what autograd gives for a gate whose presence has the same noise added"
    steps, share = 120, .2
    settings = Settings(prune=1., settle=0., travel=3., temperature=share)
    model, opt, p = start(optimizer, sparsity=None, steps=steps + 1, settings=settings, pressure=.03, seed=5)
    torch.manual_seed(1)
    twin = mlp()
    own, noise = dict(twin.named_parameters()), Noise(5)
    presence = {n: t.clone().requires_grad_() for n, t in zip(p.names, p.gate_params)}
    opts = optimizer(twin), torch.optim.Adam(presence.values(), lr=p.plan.lr, eps=1e-8/p.d, fused=True)
    drawn = {n: torch.zeros_like(t) for n, t in presence.items()}               # no noise yet in the first step
    T = share*p.plan.lr*p.plan.end
    assert p.temperature == pytest.approx(T)
    for i in range(steps):
        theta = {n: own[n]*heaviside(t + drawn[n], .25) for n, t in presence.items()}
        assert torch.equal(flat(p.params), flat(theta.values()))
        for o in (opt, *opts): o.zero_grad()
        loss(model, i).backward()
        gated = lambda x: functional_call(twin, theta, (x,))
        gated.parameters = twin.parameters
        (loss(gated, i) + p.gamma/p.d*sum(t.sum() for t in presence.values())).backward()
        for o in (opt, *opts): o.step()
        drawn = {n: noise(t.numel()).view_as(t)*T for n, t in presence.items()}
    assert torch.equal(p.presence, flat(presence.values())) and 0 < p.density < 1


def test_none_is_what_it_was():
    "temperature=0 is the same object with the same state as without the word"
    (_, _, a), (_, _, b) = start(settings=Settings()), start(settings=Settings(temperature=0.))
    assert a.gate is a.mask and a.temperature == 0 and a.state_dict().keys() == b.state_dict().keys()
    assert not a.state_dict().keys() & {'gate', 'places'}


@forms
def test_ends_without_noise(form):
    "Warm while density falls, colder in regrowth, and exact at the end; the model holds what the gates say"
    model, opt, p = start(form=form)
    seen, odd = [], 0
    for _ in range(400):
        train(model, opt, 1)
        seen.append(p.temperature)
        odd += int((p.gate != p.opened).sum())
        if not p.frozen: assert torch.equal(flat(p.params), p.value*p.scale)
    assert torch.equal(flat(p.params) != 0, p.mask > 0)
    T = .1*p.plan.lr*p.plan.end
    assert odd and seen[:199] == [pytest.approx(T)]*199 and seen[249] == pytest.approx(T/2) and set(seen[299:]) == {0}
    assert torch.equal(p.gate, p.opened) and p.remaining <= p.budget and p.density > .1
    if form == 'single': assert p.left == p.keep == p.present and torch.equal(p.gate, cold(p))


@pytest.mark.parametrize('kw', [dict(sparsity=None, pressure=.02), dict(settings=Settings(temperature=.1, exact=False))])
def test_ends_without_noise_where_nothing_lands(kw):
    model, opt, p = start(**kw)
    train(model, opt, 299)
    assert p.temperature > 0
    train(model, opt, 1)
    assert p.temperature == 0 and torch.equal(p.gate, cold(p)) and p.left == p.present == int(cold(p).sum())


def test_an_early_landing():
    model, opt, p = start()
    train(model, opt, 100)
    p.land()
    assert p.left == p.keep and p.temperature == 0 and torch.equal(flat(p.params), p.value*cold(p))


def test_evaluations_are_without_noise():
    "Inside of `deterministic` it is the network without noise; outside, as before; and training is not disturbed"
    model, opt, p = start()
    twin, opt2, q = start()
    for _ in range(3):
        train(model, opt, 60), train(twin, opt2, 60)
        before = flat(p.params)
        with p.deterministic():
            assert torch.equal(flat(p.params), p.value*cold(p)) and not torch.equal(flat(p.params), before)
            with pytest.raises(RuntimeError, match='lent to an evaluation'): opt.step()
        assert torch.equal(flat(p.params), before)
    assert_same(state(p), state(q))


def test_births_and_deaths_are_as_many_as_noise_makes():
    "With gates that are open with probability p, a step has (1 - p)·p' births and p·(1 - p') deaths in the mean"
    model, opt, p = start(sparsity=.6, meter=True)
    births = deaths = 0.
    before = torch.ones(p.d)                                                    # all are open at first
    for _ in range(200):
        train(model, opt, 1)
        now = open_share(p.presence, p.temperature) if p.temperature else cold(p)
        births, deaths = births + ((1 - before)*now).sum().item(), deaths + (before*(1 - now)).sum().item()
        before = now
    counted = p.meter.layers()[-1]
    assert births > 1000 and counted['births'] == pytest.approx(births, rel=.1)
    assert counted['deaths'] == pytest.approx(deaths, rel=.1)


def test_single_weights_are_watched_as_they_were_drawn():
    "A recorder's `present` is what the network computed with in that step, and not the sign of the presence"
    model, opt, p = start()
    recorder, drawn = Recorder(p, 40), []
    for _ in range(60):
        drawn.append(p.gate[recorder.places].clone())
        train(model, opt, 1)
    trace = recorder.trace()
    assert np.array_equal(trace.present, torch.stack(drawn).numpy() > 0)
    assert (trace.present != (trace.presence >= 0)).any()
    assert np.array_equal(trace.theta != 0, trace.present)


def test_runs_of_any_length_are_as_warm():
    "Temperature is a share of the travel, and that is the same for 400 and 4,000 steps"
    warm = [start(steps=n)[2].temperature for n in (400, 4000)]
    assert warm[1] == pytest.approx(.1*56) and warm[0] == pytest.approx(.1*.4*.5*200)      # short runs travel less


@forms
@pytest.mark.parametrize('at', [70, 230])
def test_goes_on_bit_for_bit(form, at):
    "A run that was killed while it was warm, or while it cooled"
    model, opt, p = start(form=form, meter=True)
    train(model, opt, at)
    buffer = io.BytesIO()
    torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), pruner=p.state_dict()), buffer)
    train(model, opt, 400 - at)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin, opt2, q = start(form=form, meter=True, seed=9)
    twin.load_state_dict(saved['model']), opt2.load_state_dict(saved['opt'])
    q.load_state_dict(saved['pruner'])
    train(twin, opt2, 400 - at)
    for a, b in zip((p.presence, p.gate, *p.moments, *p.params), (q.presence, q.gate, *q.moments, *q.params)):
        assert torch.equal(a, b)
    assert p.history == q.history and p.meter.layers() == q.meter.layers()


def test_states_of_another_temperature_are_refused():
    _, _, p = start(settings=Settings())
    _, _, q = start()
    with pytest.raises(ValueError, match='temperature=0.*temperature=0.1'): q.load_state_dict(p.state_dict())
    with pytest.raises(ValueError, match='temperature=0.1.*temperature=0'): p.load_state_dict(q.state_dict())


def test_compiled():
    "The fused update moves presences; noise comes after it"
    model, opt, p = start(compile=True)
    twin, opt2, q = start()
    train(model, opt, 60), train(twin, opt2, 60)
    torch.testing.assert_close(p.presence, q.presence, rtol=1e-3, atol=1e-3)
    assert not torch.equal(p.gate, p.opened) and torch.equal(p.opened, cold(p))


def test_a_skipped_step_draws_and_moves_no_presence():
    "As a GradScaler's overflow does"
    model, opt, p = start(lambda model: adam(model, fused=True))
    train(model, opt, 50)
    presence, gate = p.presence.clone(), p.gate.clone()
    opt.found_inf, opt.grad_scale = torch.ones(()), None
    loss(model).backward()
    opt.step()
    assert torch.equal(p.presence, presence) and not torch.equal(p.gate, gate)
    assert torch.equal(flat(p.params), p.value*p.gate)


def test_the_noise_of_shards_is_that_of_the_whole():
    "A layer's draw is the same whoever draws it; more than the pool has is read from several places"
    a, b = Noise(3), Noise(3)
    assert torch.equal(a(10), b(10)) and torch.equal(a(2**21 + 3), b(2**21 + 3))
    assert a(2**20).unique().numel() == 2**20                                   # within a draw, none comes twice
