"""Kinds 3 and 4: others write weights after the step, or replace them. The zeros hold, or the report tells the truth,
or there is an error."""
import copy, re, warnings

import pytest, torch
from torch import nn
from torch.nn.utils import parametrizations, prune as torch_prune, weight_norm

from hyperflux import Hyperflux
from hyperflux.rivals.scores import GMP, Magnitude
from hyperflux.rivals.imp import IMP
from tests.helpers import METHODS, loss, mlp, nnz, said, train

STEPS = 120
kinds = pytest.mark.parametrize('kind', [Hyperflux, GMP])
methods = pytest.mark.parametrize('make', [m for _, m in METHODS], ids=[n for n, _ in METHODS])
quiet = pytest.mark.filterwarnings('ignore')


def sgd(model, lr=.1): return torch.optim.SGD(model.parameters(), lr=lr, momentum=.9)


def pruned(kind, model=None, lr=.1, sparsity=.9, steps=STEPS, **kw):
    model = model or mlp()
    opt = sgd(model, lr)
    return model, opt, kind(model, opt, sparsity=sparsity, steps=steps, **kw)


def reported(p):
    "Weights left, by everything that tells of them; they must agree"
    head = str(p).splitlines()[0]
    left = int(re.search(r': ([\d,]+) of', head)[1].replace(',', ''))
    total = p.layers()[-1]
    assert left == p.left == total['left'] == sum(r['left'] for r in p.layers()[:-1]) and repr(p) == head
    assert p.density == p.left/p.d == total['density']
    return left


# Written after the step

@quiet
@methods
def test_report_counts_what_is_in_the_model(make):
    """Noise on all weights after the last step: the report has all of them, says so, and apply_mask() brings the zeros
    back"""
    model = mlp()
    opt = sgd(model)
    p = make(model, opt, .9, STEPS)
    train(model, opt, STEPS)
    assert reported(p) == nnz(p) == p.present == p.keep and p.differs() == ''
    with torch.no_grad():
        for w in p.params: w.add_(1.)
    assert reported(p) == nnz(p) == 768 and p.present == p.keep
    assert '691 absent ones are not zero' in repr(p) and 'apply_mask()' in p.differs()
    p.apply_mask()
    assert reported(p) == nnz(p) == p.keep and p.differs() == ''


@quiet
@kinds
@pytest.mark.parametrize('how', ['load_state_dict', 'copy_', 'data', 'clamp'])
def test_restored_at_the_end(kind, how):
    "The best checkpoint, of an early step, is restored after the last one; or weights are written through .data"
    model, opt, p = pruned(kind)
    kept = {}
    train(model, opt, STEPS, lambda i: i == 30 and kept.update(copy.deepcopy(model.state_dict())))
    if how == 'load_state_dict': model.load_state_dict(kept)
    elif how == 'copy_':
        with torch.no_grad(): model[0].weight.copy_(kept['0.weight'])
    elif how == 'data': model[0].weight.data.copy_(kept['0.weight'])
    else:
        with torch.no_grad(): model[0].weight.clamp_(.01)               # nothing stays zero
    assert reported(p) == nnz(p) and (p.left == p.keep or 'not zero, written since the last step' in repr(p))
    assert how != 'clamp' or p.left > 600


@kinds
def test_restored_in_mid_run(kind):
    "A dense checkpoint loaded in mid-run: one warning, and the run ends exactly"
    model, opt, p = pruned(kind)
    dense = copy.deepcopy(model.state_dict())
    texts = said(train, model, opt, STEPS, lambda i: i in (50, 60, 70) and model.load_state_dict(dense))
    assert sum('absent weights were not zero before step' in t for t in texts) == 1
    assert reported(p) == nnz(p) == p.keep


@quiet
@pytest.mark.parametrize('how', ['data', 'no_grad'])
def test_clipping_reaches_hidden_weights(how):
    """Weights are clipped after each step, as in a WGAN: what a gate hides is clipped, too, so that nothing large comes
    back"""
    model, opt, p = pruned(Hyperflux, lr=.5, sparsity=.5)
    def clip(i):
        with torch.no_grad():
            for w in model.parameters(): (w.data if how == 'data' else w).clamp_(-.1, .1)
    train(model, opt, STEPS, clip)
    assert nnz(p) == p.keep and p.state_dict()['value'].abs().max() < .5        # .1 and a step; without clipping, 3


@quiet
@methods
def test_second_optimizer_on_a_shared_trunk(make):
    """Another loss trains the first layer by an optimiser of its own, with momentum: the zeros hold after each of its
    steps"""
    model = mlp()
    opt, other = sgd(model, .05), torch.optim.SGD(model[0].parameters(), lr=.05, momentum=.9, weight_decay=.01)
    p = make(model, opt, .9, STEPS)
    for _ in range(STEPS):
        train(model, opt, 1)
        before = p.present
        model.zero_grad(); loss(model).backward(); other.step()
        assert p.left == nnz(p) and p.present == before and 'absent' not in p.differs()
    assert nnz(p) == p.present == p.keep


@quiet
@kinds
def test_average_and_its_mask(kind):
    "An average of weights is dense until it is masked, and the pruner's report is not about it"
    model, opt, p = pruned(kind)
    mean = torch.optim.swa_utils.AveragedModel(model)
    train(model, opt, STEPS, lambda i: mean.update_parameters(model))
    assert sum(int(w.count_nonzero()) for w in (mean.module[0].weight, mean.module[2].weight)) > p.keep
    p.apply_mask(mean)
    assert sum(int(w.count_nonzero()) for w in (mean.module[0].weight, mean.module[2].weight)) == p.keep == reported(p)


@quiet
def test_lottery_tickets_beside_another_pruner():
    "IMP rewinds the whole model; the zeros of a layer that another pruner keeps hold"
    for first in True, False:
        model = mlp()
        opt = sgd(model)
        make = [lambda: IMP(model, opt, sparsity=.8, steps=60, levels=3, targets='2'), lambda: Magnitude(model, opt,
            sparsity=.9, steps=60, targets='0')]
        pruners = [m() for m in (make if first else make[::-1])]
        for _ in range(60):
            train(model, opt, 1)
            assert all(p.left == p.present == nnz(p) for p in pruners if isinstance(p, Magnitude))
        assert all(nnz(p) == p.keep for p in pruners)


@quiet
def test_present_and_zero():
    "Present weights that are zero are told from absent ones"
    model = mlp()
    nn.init.zeros_(model[2].weight)
    p = GMP(model, sgd(model), sparsity=.5, steps=STEPS)
    assert p.present == 768 and p.left == nnz(p) == 640 and '128 present ones are zero' in repr(p)


# Replaced in mid-run

def head(model, opt): model[2] = nn.Linear(32, 4)
def head_in_optimizer(model, opt):
    model[2] = nn.Linear(32, 4)
    opt.add_param_group(dict(params=list(model[2].parameters())))
def assign(model, opt): model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
def assign_in_optimizer(model, opt):
    assign(model, opt)
    for w in model.parameters(): w.requires_grad_(True)
    opt.param_groups[0]['params'] = list(model.parameters())
def converted(model, opt):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try: model.double().float()
    finally: torch.__future__.set_overwrite_module_params_on_conversion(False)
def parametrised(model, opt): parametrizations.spectral_norm(model[0])
def orthogonal(model, opt): parametrizations.orthogonal(model[2])
def normed(model, opt): weight_norm(model[0])
def masked_by_torch(model, opt): torch_prune.l1_unstructured(model[0], 'weight', .5)
def reinitialised(model, opt): model[0].weight = nn.Parameter(torch.randn(32, 20))


@quiet
@pytest.mark.parametrize('kind, when', [(Hyperflux, 37), (Hyperflux, 119), (GMP, 0), (GMP, 70)])
@pytest.mark.parametrize('how', [head, head_in_optimizer, assign, assign_in_optimizer, converted, parametrised,
                                 orthogonal, normed, masked_by_torch, reinitialised],
                         ids=lambda f: f.__name__)
def test_replaced(kind, when, how):
    """The same clear error at any step, which blames nothing that did not happen; then each further step says it again,
    and detach() ends it"""
    model, opt, p = pruned(kind)
    train(model, opt, when)
    how(model, opt)
    with pytest.raises(RuntimeError, match="weight is no longer the model's: .* after the pruner was made") as e:
        train(model, opt, STEPS - when)
    assert 'fully_shard' not in str(e.value)
    with pytest.raises(RuntimeError, match="no longer the model's"): train(model, opt, 1)
    assert isinstance(repr(p), str) and isinstance(str(p), str)
    p.detach()
    train(model, opt, 1)


@quiet
@kinds
def test_replaced_in_a_long_run(kind):
    "Between two looks, too, whoever goes on after the error is told again"
    model, opt, p = pruned(kind, steps=4000)
    train(model, opt, 30)
    head(model, opt)
    with pytest.raises(RuntimeError, match="no longer the model's"): train(model, opt, 40)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no longer the model's"): train(model, opt, 1)


@quiet
@kinds
def test_replaced_after_the_last_step(kind):
    "A new head after the run: what is counted is what the model computes with"
    model, opt, p = pruned(kind)
    train(model, opt, STEPS)
    model[2] = nn.Linear(32, 4)
    assert reported(p) == nnz([model[0].weight, model[2].weight]) > p.keep


@quiet
@kinds
def test_not_replaced(kind):
    "A parametrised bias, frozen and moved layers, a wrapper around the model, a conversion in place: no error"
    model, opt, p = pruned(kind)
    train(model, opt, 10)
    torch.nn.utils.parametrize.register_parametrization(model[0], 'bias', nn.Identity())
    holder = nn.ModuleDict(dict(inside=model))
    nn.DataParallel(model)
    model[0].bias.requires_grad
    train(holder['inside'], opt, STEPS - 10)
    assert nnz(p.params) == p.keep


def test_state_goes_into_a_new_pruner():
    "What the error advises: the state from before, loaded into a pruner of the model with its new parameters"
    model, opt, p = pruned(GMP)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train(model, opt, 60)
        state = p.state_dict()
        p.detach()
        assign_in_optimizer(model, opt)
        p = GMP(model, opt, sparsity=.9, steps=STEPS)
        p.load_state_dict(state)
        train(model, opt, 60)
    assert p.step == STEPS and nnz(p) == p.keep
