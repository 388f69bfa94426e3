"What the rivals refuse, and what they say."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperflux.rivals.scores import GMP, Baseline, LayerMagnitude, Magnitude, Progressive, Random
from hyperflux.rivals.imp import IMP
from hyperflux.rivals.gradients import GraSP, SNIP, Taylor
from hyperflux.rivals.rigl import RigL
from tests.rivals.rig import (
    xs, ys, Swift, METHODS, every_method, mlp, Heads, sgd, make, start, loss, train, mask, weights,
    refuses, through_a_file)


# What is refused

sparsities = pytest.mark.parametrize('sparsity, error, says', [
    (None, ValueError, 'a sparsity is needed: the fraction of weights to remove, such as 0.98'),
    (98, ValueError, r'fraction in \[0, 1\): got 98; did you mean 0.98'),
    (1., ValueError, 'leaves no weight at all'), ('0.9', TypeError, "got '0.9'")])


@sparsities
@pytest.mark.parametrize('kind', METHODS[:-1], ids=lambda k: k.__name__)
def test_sparsity(kind, sparsity, error, says):
    with refuses(says, error): start(kind, sparsity=sparsity)


@sparsities
def test_sparsity_imp(sparsity, error, says):
    with refuses(says, error): start(IMP, sparsity=sparsity, levels=None)


@every_method
def test_sparsity_too_high(kind):
    with refuses('got -0.1'): start(kind, sparsity=-.1)
    with refuses('leaves no weight of 255: ask for at most 0.996'): start(kind, sparsity=.999)


@every_method
@pytest.mark.parametrize('how, says', [
    (dict(steps=0), 'steps counts the optimiser steps to come'), (dict(steps=1.5), 'got 1.5'),
        (dict(updates=0), 'updates is a whole number, 1 or more: got 0'),
    (dict(updates=2.5), 'got 2.5'), (dict(targets='9.weight'), "'9.weight' matches no weight")])
def test_arguments(kind, how, says):
    with refuses(says): start(kind, **how)


@pytest.mark.parametrize('span', [(-.1, .5), (.6, .5), (.5, 1.1), (float('nan'), .5)])
@pytest.mark.parametrize('kind', [k for k in METHODS if k is not IMP], ids=lambda k: k.__name__)
def test_span(kind, span):
    with refuses(r'span gives two shares of the run, 0 <= begin <= end <= 1: got \('): start(kind, span=span)


@pytest.mark.parametrize('kind', [GMP, Progressive, Taylor])
@pytest.mark.parametrize('how', [dict(span=(.5, .5)), dict(steps=1, span=(0., .4)), dict(steps=10, span=(.5, .51))])
def test_too_few_steps(kind, how):
    "A gradual method without a step to prune in; the model stays free for another"
    torch.manual_seed(0)
    model = mlp()
    opt = sgd(model)
    with refuses(f'{kind.__name__} prunes step by step, and was given none: .* train longer, or widen the span'):
        make(kind, model, opt, **how)
    assert (model[0].weight != 0).all() and make(kind, model, opt, steps=60).left == 255


def test_rigl_too_short():
    with refuses('RigL moves weights every 100 steps until step 75 of 100: it would never do so; train longer'):
        start(RigL, steps=100)


def test_rigl_that_would_never_move():
    with refuses('it would never do so'): start(RigL, steps=133)     # end = 100: the move at step 100 is not made


def test_rigl_refuses_before_it_prunes():
    torch.manual_seed(0)
    model = mlp()
    with refuses('it would never do so'): RigL(model, sgd(model), sparsity=.8, steps=100)
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize('fused', [False, True])
def test_rigl_under_a_grad_scaler(fused):
    "A step that is skipped moves no weight; the next move sees sound gradients"
    model, opt, p = start(Swift, lambda m: sgd(m, fused=fused))
    scaler, masks = torch.amp.GradScaler('cpu', init_scale=2.**10), [mask(p)]
    for i in range(25):
        opt.zero_grad()
        scaler.scale(loss(model, i)).backward()
        if i == 9: model[0].weight.grad[0, 0] = torch.inf
        before = p.step
        scaler.step(opt), scaler.update()
        masks.append(mask(p))
        assert (p.step == before) == (i == 9 and not fused)          # a plain optimiser's step is not even called
    moved = [i for i in range(25) if not torch.equal(masks[i], masks[i + 1])]
    assert moved == ([19] if fused else [10, 20]) and (weights(p)[mask(p) == 0] == 0).all()
    assert weights(p).isfinite().all()


def test_rigl_resumes_with_its_own_pace():
    model, opt, p = start(RigL, steps=200)
    p.every = 10
    train(model, opt, 0, 15)
    other = start(RigL, steps=200)
    for o, s in zip(other, through_a_file(model, opt, p)): o.load_state_dict(s)
    assert other[2].every == 10


@pytest.mark.parametrize('kind', [Random, Magnitude, LayerMagnitude, SNIP, GraSP])
def test_one_shot_with_an_empty_span(kind):
    "What prunes at once does not care for the span: it is allowed (begin <= end), so it works"
    assert start(kind, span=(0., 0.))[2].left == 51                  # this does
    assert start(kind, span=(.5, .5))[2].left == 51


def test_a_failed_start_leaves_nothing_behind():
    "One corrects the batch and tries again; a step does not go on without the start"
    model = mlp()
    opt = sgd(model)
    p = SNIP(model, opt, sparsity=.8, steps=60, batch=(xs[:, :3], ys))
    for _ in range(2):
        with refuses('shapes cannot be multiplied', RuntimeError): p.start()
    with refuses('shapes cannot be multiplied', RuntimeError): opt.step()
    assert p.left == p.d == 255 and p.step == 0
    p.batch = xs, ys
    p.start()
    assert p.left == 51


@pytest.mark.parametrize('kind', [SNIP, GraSP])
def test_a_layer_the_loss_does_not_reach(kind):
    "Its weights are worth nothing, or it is named"
    model = Heads()
    try: p = make(kind, model, sgd(model))
    except ValueError as e: assert 'b.weight' in str(e)
    else: assert p.left == p.keep and int(p.masks[2].sum()) == 0


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(1, 24), nn.Linear(8, 5)
    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(*self.qkv(x[..., None]).view(-1, 1, 13, 24).chunk(3,
            -1)).mean((1, 2)))


def test_grasp_on_attention():
    model, opt, p = start(GraSP, build=Attentive)
    assert p.left == p.keep


@pytest.mark.parametrize('how', [dict(levels=-1), dict(levels=1.5), dict(rewind=1.5), dict(levels=0)])
def test_imp_arguments(how):
    with refuses('levels|rewind'): start(IMP, **how)


def test_imp_refuses():
    with refuses('IMP trains 5 times in 60 steps, and rewinds to step 12: it must be a whole number below 12'):
        start(IMP, rewind=12)
    with refuses('rewinds to step -1'): start(IMP, rewind=-1)
    with refuses('IMP trains 51 times in 20 steps'): start(IMP, steps=20, levels=50)
    assert start(IMP, rewind=11)[2].rewind == 11


class Missing(Baseline): "No score"
class Poisoned(Magnitude):
    def score(self): return super().score().index_fill_(0, torch.tensor([3]), math.nan)


def test_scores():
    "A score that is missing, or not a number: an error before any weight is touched"
    torch.manual_seed(0)
    model = mlp()
    with refuses(r'Missing has no score: define score\(self\), one number for each weight', NotImplementedError):
        make(Missing, model, sgd(model))
    model = mlp()
    with refuses('scores of Poisoned hold NaN or infinity at step 0: training has diverged; lower the learning rate, '
                 'or clip gradients', FloatingPointError):
        make(Poisoned, model, sgd(model))
    assert (model[0].weight != 0).all()


@pytest.mark.parametrize('kind', [GMP, Progressive, Taylor, IMP])
def test_divergence(kind):
    "Weights that are NaN in mid-run are named when masks are renewed"
    model, opt, p = start(kind)
    train(model, opt, 0, 8)
    with torch.no_grad(): model[2].weight[(model[2].weight != 0).nonzero(as_tuple=True)[0][0]] = math.nan
    with refuses(f'scores of {kind.__name__} hold NaN or infinity at step', FloatingPointError):
        train(model, opt, 8, 60)


def test_divergence_rigl():
    "Gradients that are NaN are refused when weights are to be grown by them"
    model, opt, p = start(Swift)
    train(model, opt, 0, 9)
    with torch.no_grad(): model[2].bias[0] = math.nan
    with refuses('NaN', (ValueError, FloatingPointError)): train(model, opt, 9, 10)
