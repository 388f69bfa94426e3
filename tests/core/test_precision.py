"Compilers, low precision, scaling and clipping leave the pruner as it is."

import pytest, torch
from torch import nn

from tests.core.rig import mlp, sgd, adam, loss, start, train, state, assert_same, assert_sparse


def test_compiled_model():
    "torch.compile(model) trains as the plain model does, and computes with zeros"
    plain, opt, p = start()
    train(plain, opt, 30)
    model, opt, q = start()
    train(torch.compile(model), opt, 30)
    assert_sparse(q)
    torch.testing.assert_close(p.value, q.value, rtol=0, atol=1e-3)
    assert (p.mask != q.mask).sum() <= 2


def test_autocast():
    "bf16 autocast: weights, values and presences stay float32, and the run goes as in float32"
    def loss16(model, i):
        with torch.autocast('cpu', torch.bfloat16): return loss(model)
    model, opt, p = start()
    train(model, opt, 30, loss16)
    full = start()
    train(*full[:2], 30)
    assert p.presence.dtype == p.params[0].dtype == torch.float32
    assert_sparse(p)
    assert not torch.equal(p.value, full[2].value) and (p.mask == full[2].mask).float().mean() > .8


def test_bfloat16_model():
    "A model in bf16 keeps its zeros; presences are kept in float32"
    model, opt, p = start(build=lambda: mlp().to(torch.bfloat16))
    train(model, opt)
    assert p.params[0].dtype == torch.bfloat16 and p.presence.dtype == torch.float32
    assert_sparse(p)


def fused_sgd(model): return sgd(model, fused=True)
def fused_adam(model): return adam(model, fused=True)
scaled = pytest.mark.parametrize('optimizer', [sgd, adam, fused_sgd, fused_adam])
clipped = pytest.mark.parametrize('clip', [False, True], ids=['', 'unscaled and clipped'])


def scaled_step(model, opt, scaler, clip, overflow=False):
    opt.zero_grad()
    scaler.scale(loss(model)).backward()
    if overflow: model[2].weight.grad[0, 0] = torch.inf
    if clip:
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), .1)
    scaler.step(opt)
    scaler.update()


@scaled
@clipped
def test_grad_scaler(optimizer, clip):
    "With a GradScaler, gates see the true gradients, even if the optimiser unscales inside its step"
    model, opt, p = start(optimizer)
    other, opt2, q = start(optimizer)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    for _ in range(10):
        scaled_step(model, opt, scaler, clip)
        opt2.zero_grad()
        loss(other).backward()
        if clip: nn.utils.clip_grad_norm_(other.parameters(), .1)
        opt2.step()
    assert_sparse(p)
    for k in ('presence', 'value'): torch.testing.assert_close(state(p)[k], state(q)[k], rtol=1e-5, atol=1e-5)


@scaled
@clipped
def test_overflow(optimizer, clip):
    """A step that the GradScaler skips leaves weights and gates as they were, and no trace in the meter; the next one
    goes on"""
    model, opt, p = start(optimizer, meter=True)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    for _ in range(8): scaled_step(model, opt, scaler, clip)
    before, step = state(p), p.step
    scaled_step(model, opt, scaler, clip, overflow=True)
    assert scaler.get_scale() == 2.**9
    assert_same(before, state(p))
    assert 'found_inf' not in vars(p.gate_optimizer)
    # the hooks were not even called
    if not getattr(opt, '_step_supports_amp_scaling', False): assert p.step == step
    scaled_step(model, opt, scaler, clip)
    assert (state(p)['steps'] == 9).all()
    assert not torch.equal(before['presence'], p.presence) and p.meter.mean.isfinite().all()
    assert_sparse(p)


def test_clipping():
    "Gradients clipped before the step bound what the step changes"
    model, opt, p = start(lambda m: torch.optim.SGD(m.parameters(), lr=.1), pressure=.0003)
    for _ in range(10):
        before = p.value.clone()
        opt.zero_grad()
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), .01)
        opt.step()
        assert 0 < (p.value - before).norm() <= .1*.01*1.001
    assert_sparse(p)
