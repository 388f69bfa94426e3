"""The one line inside Accelerate, Lightning and timm: it counts optimiser steps, lands on the target, and does what it
does in a plain loop, bit for bit."""
import functools, logging, warnings

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hyperflux import Hyperflux
from hyperflux.lab.processes import leave
from tests.helpers import Group

torch.manual_seed(0)
# 15 micro-batches of 12: two at a time, the last step of an epoch has one
xs, ys = torch.randn(180, 1, 6, 6), torch.randint(5, (180,))
epochs, batches = 14, 15
keep = 207                                                          # of 2,074 weights, at a sparsity of 0.9


@pytest.fixture(autouse=True)
def quiet():
    "One thread, and no word from the frameworks; warnings of the pruner are errors"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.filterwarnings('error', '.*(planned|announced)')
        yield
    torch.set_num_threads(threads)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(),
                         nn.Linear(20, 5))


def adamw(model): # Biases and norms first and without decay, as timm has them
    few, many = [p for p in model.parameters() if p.ndim < 2], [p for p in model.parameters() if p.ndim >= 2]
    return torch.optim.AdamW([dict(params=few, weight_decay=0.), dict(params=many)], lr=3e-3, weight_decay=.05)


def trained(opt): return [p for g in opt.param_groups for p in g['params']]
def cosine(opt, steps): return torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
def loader(): return DataLoader(TensorDataset(xs, ys), 12)
def loss(out, y): return F.cross_entropy(out.float(), y, label_smoothing=.1)
def steps_of(every): return epochs*-(-batches//every)


@functools.cache
def plain(every=1, precision=None, layout=torch.contiguous_format):
    "The loop that the others are compared with"
    model = network().to(memory_format=layout)
    opt, steps = adamw(model), steps_of(every)
    p, schedule = Hyperflux(model, opt, sparsity=.9, steps=steps), cosine(opt, steps)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader(), 1):
            with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16', cache_enabled=False):
                out = model(x.to(memory_format=layout))
            (loss(out, y)/every).backward()
            if i % every and i < batches: continue
            nn.utils.clip_grad_norm_(trained(opt), .5)
            opt.step(), schedule.step(), opt.zero_grad()
    return model, p


def assert_landed(model, p, steps):
    "On the target to the weight, in the model itself, after just as many steps as there were"
    assert p.step == steps == p.steps and p.landed and p.stage == 'done'
    assert p.left == keep == sum(int(m.weight.count_nonzero()) for m in model.modules()
                                 if isinstance(m, (nn.Conv2d, nn.Linear)))


def assert_equal(model, p, other, q):
    "The same mask, the same weights and the same history"
    assert torch.equal(p.mask, q.mask) and torch.equal(p.presence, q.presence) and p.history == q.history
    for (n, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), n


# Accelerate

@pytest.fixture
def accelerator():
    "Makes accelerators; their settings are global, and forgotten after each test"
    accelerate = pytest.importorskip('accelerate')
    from accelerate.state import AcceleratorState, GradientState
    def forget(): AcceleratorState._reset_state(reset_partial_state=True), GradientState._reset_state()
    forget()
    yield lambda **kw: accelerate.Accelerator(cpu=True, **kw)
    forget()


def accelerated(acc, every=1, first=False):
    "Model, pruner, and a function that trains from one epoch to another"
    model = network()
    opt, steps = adamw(model), steps_of(every)
    schedule, data = cosine(opt, steps), loader()
    if first: p = Hyperflux(model, opt, sparsity=.9, steps=steps)
    model, opt, schedule, data = acc.prepare(model, opt, schedule, data)
    if not first: p = Hyperflux(model, opt.optimizer, sparsity=.9, steps=steps)
    acc.register_for_checkpointing(p)
    def train(begin, end):
        for _ in range(begin, end):
            for x, y in data:
                before = p.step
                with acc.accumulate(model):
                    acc.backward(loss(model(x), y))
                    if acc.sync_gradients: acc.clip_grad_norm_(trained(opt), .5)
                    opt.step(), schedule.step(), opt.zero_grad()
                    assert p.step == before + acc.sync_gradients
    return model, p, train


@pytest.mark.parametrize('every, precision, first', [(1, 'no', False), (2, 'no', False), (2, 'no', True),
                                                     (2, 'bf16', False)])
def test_accelerate(accelerator, every, precision, first):
    """Accelerate trains the network of the plain loop; skipped steps of accumulation do not count; before or after
    prepare is the same on a CPU"""
    model, p, train = accelerated(accelerator(gradient_accumulation_steps=every, mixed_precision=precision), every,
                                  first)
    train(0, epochs)
    assert_landed(model, p, steps_of(every))
    assert_equal(model, p, *plain(every, precision))


@pytest.mark.parametrize('stop, stage', [(3, 'prune'), (9, 'regrow'), (12, 'settle')])
def test_accelerate_resumes(accelerator, tmp_path, stop, stage):
    "save_state and load_state carry a registered pruner: the run goes on as if nothing had been"
    make = lambda: accelerator(gradient_accumulation_steps=2)
    model, p, train = accelerated(make(), 2)
    train(0, epochs)
    acc = make()
    _, q, train = accelerated(acc, 2)
    train(0, stop)
    assert q.stage == stage
    acc.save_state(tmp_path)
    acc = make()
    other, q, train = accelerated(acc, 2)
    acc.load_state(tmp_path)
    assert q.stage == stage and q.step == 8*stop
    train(stop, epochs)
    assert_landed(other, q, steps_of(2))
    assert_equal(model, p, other, q)


@pytest.mark.parametrize('first', [False, True])
def test_accelerate_overflow(accelerator, first):
    "A step that Accelerate's GradScaler skips does not count, and the target is met all the same"
    acc = accelerator()
    from accelerate.optimizer import AcceleratedOptimizer
    model, x, y = network(), xs[:90], ys[:90]
    opt = adamw(model)
    make = lambda: Hyperflux(model, opt, sparsity=.9, steps=400)
    if first: p = make()
    # with fp16 on a GPU, prepare does this
    wrapped = AcceleratedOptimizer(opt, scaler=torch.amp.GradScaler('cpu', init_scale=2.**8))
    if not first: p = make()
    skipped = 0
    for i in range(400):
        wrapped.scaler.scale(loss(model(x), y)).backward()
        if i % 50 == 20: model[4].weight.grad[0, 0] = torch.inf
        wrapped.step()
        wrapped.zero_grad()
        skipped += wrapped.step_was_skipped
    assert skipped == 8 and p.step == 392 and p.stage == 'settle' and acc.sync_gradients
    assert p.left == keep == sum(int(w.count_nonzero()) for w in p.params)


def on_two():
    "What each of two processes does: DDP, accumulation, a schedule that counts for both"
    from accelerate import Accelerator
    acc = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    opt = adamw(model)
    model, opt, data, schedule = acc.prepare(model, opt, loader(), cosine(opt, 224))
    assert type(model).__name__ == 'DistributedDataParallel' and acc.num_processes == 2
    assert len(data) == 8                                           # half of 15, rounded up
    steps = 112
    p = Hyperflux(acc.unwrap_model(model), opt.optimizer, sparsity=.9, steps=steps)
    assert p.names[0] == '0.weight'
    for _ in range(steps*2//len(data)):
        for x, y in data:
            with acc.accumulate(model):
                acc.backward(loss(model(x), y))
                opt.step(), schedule.step(), opt.zero_grad()
    assert schedule.scheduler.last_epoch == 224                     # once for each process
    assert_landed(acc.unwrap_model(model), p, steps)
    mine = torch.cat([p.presence, p.value, p.mask])
    for theirs in acc.gather(mine[None]): assert torch.equal(theirs, mine)
    print('both agree')
    acc.wait_for_everyone()
    leave()


def test_accelerate_two_processes():
    "Two processes with DDP keep the same presences and masks, count the steps that each takes, and land on the target"
    pytest.importorskip('accelerate')
    with Group(2, on_two) as g: assert g.wait().count('both agree') == 2


# Lightning

@pytest.fixture(scope='module')
def lightning():
    L = pytest.importorskip('lightning')
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    return L


def trainer(L, every=1, callbacks=(), **kw):
    return L.Trainer(max_epochs=epochs, accumulate_grad_batches=every, gradient_clip_val=.5, accelerator='cpu',
                     callbacks=list(callbacks), logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **kw)


def module(L, own=False):
    "A LightningModule; with `own`, it makes its pruner itself and keeps its state"
    class Net(L.LightningModule):
        saved = pruner = None
        def __init__(self):
            super().__init__()
            self.net = network()
        def training_step(self, batch, i): return loss(self.net(batch[0]), batch[1])
        def validation_step(self, batch, i): pass
        def configure_optimizers(self):
            opt, steps = adamw(self.net), self.trainer.estimated_stepping_batches
            if own:
                self.pruner = Hyperflux(self.net, opt, sparsity=.9, steps=steps)
                if self.saved: self.pruner.load_state_dict(self.saved)
            return dict(optimizer=opt, lr_scheduler=dict(scheduler=cosine(opt, steps), interval='step'))
        def on_save_checkpoint(self, state): state.update(pruner=self.pruner.state_dict() if own else None)
        def on_load_checkpoint(self, state): self.saved = state['pruner']
    return Net()


def prune(L, wrapped=False):
    "The callback of the page; with `wrapped`, it takes the optimiser that Lightning wraps around the module's"
    class Prune(L.Callback):
        def __init__(self, **kw): self.kw, self.pruner, self.saved = kw, None, None
        def on_fit_start(self, trainer, module):
            opt = module.optimizers() if wrapped else trainer.optimizers[0]
            self.pruner = Hyperflux(module, opt, steps=trainer.estimated_stepping_batches, **self.kw)
            if self.saved: self.pruner.load_state_dict(self.saved)
        def on_train_end(self, trainer, module): self.pruner.apply_mask()
        def state_dict(self): return self.pruner.state_dict() if self.pruner else {}
        def load_state_dict(self, state): self.saved = state
    return Prune(sparsity=.9)


@pytest.mark.parametrize('every, precision, how', [(1, 'no', 'callback'), (2, 'no', 'callback'),
                                                   (2, 'bf16', 'callback'), (2, 'no', 'module'), (2, 'no', 'wrapped')])
def test_lightning(lightning, tmp_path, every, precision, how):
    """Lightning trains the network of the plain loop: closures, accumulation, clipping and bf16 included, wherever the
    pruner is made"""
    net, callback = module(lightning, how == 'module'), prune(lightning, how == 'wrapped')
    t = trainer(lightning, every, [] if how == 'module' else [callback],
                precision={'no': '32-true', 'bf16': 'bf16-mixed'}[precision], default_root_dir=tmp_path)
    t.fit(net, loader())
    p = net.pruner or callback.pruner
    assert t.global_step == t.estimated_stepping_batches == p.step
    assert_landed(net.net, p, steps_of(every))
    assert_equal(net.net, p, *plain(every, precision))


@pytest.mark.parametrize('own', [False, True], ids=['callback', 'module'])
def test_lightning_resumes(lightning, tmp_path, own):
    "A checkpoint of any stage, continued by a new trainer, ends as the run that was not stopped"
    class Keep(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch + 1 in (3, 9, 12):
                trainer.save_checkpoint(tmp_path/f'{trainer.current_epoch + 1}.ckpt')
    def run(path=None, callbacks=()):
        net, callback = module(lightning, own), prune(lightning)
        trainer(lightning, 2, [*callbacks] if own else [callback, *callbacks], default_root_dir=tmp_path).fit(net,
            loader(), ckpt_path=path, weights_only=True)
        return net.net, net.pruner or callback.pruner
    model, p = run(callbacks=[Keep()])
    for stop in 3, 9, 12:
        other, q = run(tmp_path/f'{stop}.ckpt')
        assert_landed(other, q, steps_of(2))
        assert_equal(model, p, other, q)


def test_lightning_average(lightning, tmp_path):
    """Lightning's average of weights is swapped in for every validation and replaces the model at the end: pruning does
    not notice, and the callback masks it"""
    net, callback = module(lightning), prune(lightning)
    count, seen = lambda: sum(int(w.count_nonzero()) for w in callback.pruner.params), []
    class Look(lightning.Callback):
        def on_train_end(self, trainer, module): seen.append(count())
    average = lightning.pytorch.callbacks.EMAWeightAveraging(decay=.9)
    trainer(lightning, 2, [average, Look(), callback], default_root_dir=tmp_path, num_sanity_val_steps=0).fit(net,
        loader(), loader())
    p, (_, q) = callback.pruner, plain(2)
    assert torch.equal(p.mask, q.mask) and torch.equal(p.presence, q.presence)
    assert seen[0] > keep == count()


# timm

def timm_loop(every=1, overflow=False, criterion=loss):
    "A loop in the manner of timm's own training script; returns model, pruner, average and scaler"
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler
    model = network().to(memory_format=torch.channels_last)
    opt, steps = create_optimizer_v2(model, 'adamw', lr=3e-3, weight_decay=.05), steps_of(every)
    scaler, average = NativeScaler(device='cpu'), ModelEmaV3(model, decay=.9)
    schedule = CosineLRScheduler(opt, t_initial=steps, t_in_epochs=False)
    p = Hyperflux(model, opt, sparsity=.9, steps=steps)
    updates = 0
    for epoch in range(epochs):
        for i, (x, y) in enumerate(loader(), 1):
            need = i % every == 0 or i == batches
            out = model(x.to(memory_format=torch.channels_last))
            value = criterion(out, y)/every
            if overflow and i == 3: value = value*torch.inf
            scaler(value, opt, clip_grad=.5, parameters=trained(opt), need_update=need)
            if not need: continue
            opt.zero_grad()
            updates += 1
            average.update(model, step=updates)
            schedule.step_update(updates)
    return model, p, average, scaler


@pytest.fixture
def timm(): return pytest.importorskip('timm')


@pytest.mark.parametrize('every', [1, 2])
def test_timm(timm, every):
    """timm's scaler, clipping, parameter groups, schedule and channels_last change nothing, and its average takes the
    mask"""
    model, p, average, _ = timm_loop(every)
    assert_landed(model, p, steps_of(every))
    assert_equal(model, p, *plain(every, layout=torch.channels_last))
    assert [len(g['params']) for g in p.optimizer.param_groups] == [5, 3]
    assert p.optimizer.param_groups[0]['weight_decay'] == 0
    weights = lambda: [dict(average.module.named_parameters())[n] for n in p.names]
    assert sum(int(w.count_nonzero()) for w in weights()) > keep
    p.apply_mask(average)
    assert sum(int(w.count_nonzero()) for w in weights()) == keep
    for w, mine in zip(weights(), p.params): assert torch.equal(w != 0, mine != 0)


def test_timm_overflow(timm):
    "Updates that the scaler skips do not count: once an epoch here, and the target is met all the same"
    from timm.loss import LabelSmoothingCrossEntropy
    model, p, _, scaler = timm_loop(overflow=True, criterion=LabelSmoothingCrossEntropy(.1))
    assert scaler.state_dict()['scale'] == 2.**(16 - epochs)
    assert p.step == epochs*(batches - 1) and p.landed
    assert p.left == keep == sum(int(w.count_nonzero()) for w in p.params)
