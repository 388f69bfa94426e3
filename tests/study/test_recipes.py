"""Every recipe at its full network size, on small files in the real formats: two steps dense, two pruned. And that a
recipe's settings can be had, changed and mistyped.

On a CPU, in the precision of the recipe (bf16 by autocast is at most twice as slow here as float32), in batches of two.
"""
import dataclasses, math, struct

import numpy as np
import pytest
import torch
from tests.lab.test_data import make_cifar

import hyperflux.cli, hyperflux.study.rehearsal
from hyperflux.core.pressure import cubic
from hyperflux.core.settings import Settings
from hyperflux.lab.datasets import load_data, shape_of
from hyperflux.lab.models import make_model
from hyperflux.study.measure import evaluate
from hyperflux.study.recipes import RECIPES, cost, in_epochs, recipe
from hyperflux.study.config import Config
from hyperflux.study.run import Run


pytestmark = pytest.mark.usefixtures('one_thread')


# Small sets, in the real formats

def make_idx(folder):
    "Four files of an MNIST: 120 and 20 images"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in ('train', 120), ('t10k', 20):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8).tobytes()
        (folder/f'{split}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 0x803, n, 28, 28) + images)
        labels = rng.integers(0, 10, n, dtype=np.uint8).tobytes()
        (folder/f'{split}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 0x801, n) + labels)


def make_imagenet(folder):
    "A thousand classes, one small photograph of noise in each"
    from PIL import Image
    rng = np.random.default_rng(0)
    for split in 'train', 'val':
        for c in range(1000):
            (folder/split/f'n{c:08d}').mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder/split/f'n{c:08d}'/'0.JPEG')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Loads a set by name, from files that were made up; each once"
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        def load(name, size=0):
            if name not in made:
                folder = made[name] = tmp_path_factory.mktemp(name)
                theirs = {'mnist': 'MNIST', 'fashion-mnist': 'FashionMNIST'}
                if name in theirs: make_idx(folder/theirs[name]/'raw')
                elif name.startswith('cifar'): make_cifar(name.upper(), folder, patch)
                elif name == 'imagenet': make_imagenet(folder)
            return load_data(name, None if name == 'fashion-small' else made[name], size=size)
        yield load


# Every recipe

PARAMETERS = { # (model, data) → known from the papers, torchvision or by hand; biases and norms included
    ('lenet300', 'mnist'): 266_610, ('lenet5', 'mnist'): 431_080, ('resnet18', 'cifar10'): 11_173_962,
    ('resnet50', 'cifar10'): 23_520_842, ('resnet50', 'cifar100'): 23_705_252, ('vgg19', 'cifar10'): 20_040_522,
    ('vgg19', 'cifar100'): 20_086_692, ('resnet50', 'imagenet'): 25_557_032, ('deit_t', 'imagenet'): 5_717_416,
    ('deit_s', 'imagenet'): 22_050_664}
# that are pruned; DeiT: 12 layers of 4
TENSORS = dict(lenet300=3, lenet5=4, resnet18=21, resnet50=54, vgg19=17, vgg_like=15, deit_t=48, deit_s=48)


class Watched(Run):
    "A run that says what it was, and remembers its first presences"
    made = []
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs), self.made.append(self)
    def start_pruning(self):
        super().start_pruning()
        self.first = self.pruner.presence.clone()


# The usual run has every network once, and every data set; what differs from these in the number of classes or in width
# alone has to be asked for; so has every ResNet-50, the largest, which the usual run does not train at full size.
AGAIN = ('resnet50-cifar10', 'resnet50-cifar100', 'resnet50-imagenet', 'resnet18-cifar10', 'vgg19-cifar100',
         'deit-s-cifar100', 'deit-s-imagenet')


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.long) if n in AGAIN else n for n in RECIPES])
def test_runs_at_full_size(name, images, monkeypatch):
    monkeypatch.setattr(hyperflux.study.rehearsal, 'Run', Watched)
    c = recipe(name, batch_size=2, weights='')
    data = images(c.data, c.size)
    assert name == f'{c.model}-{c.data}'.replace('_', '-') or name.endswith('quick') and c.data == 'fashion-small'
    assert (data.in_shape, data.n_classes) == shape_of(c.data, c.size)[:2]
    r = hyperflux.study.rehearsal.rehearse(c, data, steps=2)
    run = Watched.made.pop()
    p = run.pruner
    assert len(r['losses']) == 4 and all(map(math.isfinite, r['losses']))
    assert all(r[k] > 0 for k in ('dense', 'prune', 'seconds'))
    assert abs(r['losses'][0] - math.log(data.n_classes)) < 1.5                     # it begins as ignorant as it should
    parameters = sum(o.numel() for o in run.model.parameters())
    assert parameters == PARAMETERS.get((c.model, c.data), parameters) == cost(c)['weights']
    assert len(p.params) == TENSORS[c.model] and p.step == 2
    assert p.keep == round((1 - c.sparsity)*p.d) and .9 < p.d/parameters < 1
    skipped = ('conv_proj.weight', 'heads.head.weight') if c.model.startswith('deit') else ()
    assert not set(skipped) & set(p.names) and set(skipped) <= {n for n, _ in run.model.named_parameters()}
    moved = [bool((t != f).any()) for t, f in zip(p.layout.views(p.presence), p.layout.views(run.first))]
    assert all(moved) and p.presence.isfinite().all(), [n for n, m in zip(p.names, moved) if not m]
    assert all(o.isfinite().all() for o in run.model.parameters())
    kinds = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW, sgd=torch.optim.SGD)
    assert type(run.optimizer) is kinds[c.optimizer] and run.optimizer.param_groups[0]['weight_decay'] == c.weight_decay
    spared = run.optimizer.param_groups[-1]
    assert c.decay_all or spared['weight_decay'] == 0 and all(o.ndim < 2 for o in spared['params'])
    conv = next((m.weight for m in run.model.modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels > 3), None)
    layout = torch.channels_last if c.channels_last else torch.contiguous_format
    assert conv is None or conv.is_contiguous(memory_format=layout)


# Their settings

def shell(*args, code=0):
    "Runs the command here, without the process; what it said comes from capsys"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('sys.argv', ['hyperflux', *map(str, args)])
        try: hyperflux.cli.main()
        except SystemExit as e:
            if code == 0: raise
            assert (e.code if isinstance(e.code, int) else 1) == code
            return '' if isinstance(e.code, int) else e.code
        assert code == 0, 'it ended well'


def test_the_command_lists_them(capsys):
    shell('recipes')
    out = capsys.readouterr().out
    for name, c in RECIPES.items():
        row = next(line.split() for line in out.splitlines() if line.split()[:1] == [name])
        epochs = f'{c.dense_epochs}+{c.prune_epochs}+{c.regrow_epochs}'
        assert row[1:6] == [c.model, c.data, f'{c.sparsity:.4g}', epochs, str(c.batch_size)]
    assert 'hyperflux prune --recipe NAME' in out


OTHER = dict(
    model='lenet5', data='mnist', weights='dense.pt', method='l0', task=None, sparsity=.75, ignore='fc',
    groups='channels', cost='latency', latency_batch=4, multiple=2, metric='top5',
    seed=11, dense_epochs=3, prune_epochs=5, regrow_epochs=7, batch_size=99, accumulate=3, optimizer='adamw',
    dense_lr=.11,
    dense_final_lr=.012, prune_lr=.013, prune_final_lr=.014, regrow_lr=.015, regrow_final_lr=.016, schedule='step',
    warmup_epochs=1.5, momentum=.7, weight_decay=.017, decay_all=None, clip=.5, label_smoothing=.2, size=36, crop=3,
    flip=None, cutout=5, valid=.25, trajectory='cubic', controller='authors', dip=.5, updates=33, settle=.11,
    temperature=.003, exact=True, travel=21., regrow_travel=.4, regrow_decay=.3, slope=.5, low=.1, high=.4, gate_lr=.021,
    gate_regrow_lr=.022, gate_eps=1e-9, gate_sgd=False, precision='fp16', channels_last=None)
NEEDS = dict(cost=dict(groups='channels'), multiple=dict(groups='channels'),            # what is for groups, or for time
             latency_batch=dict(groups='channels', cost='latency'))
OF_THE_GATES = list(OTHER)[list(OTHER).index('trajectory'):list(OTHER).index('precision')]


@pytest.mark.parametrize('name', ['resnet18-quick', 'resnet50-imagenet'])
def test_every_setting_can_be_overridden(name, images, monkeypatch):
    "In Python and by the option of its name, alone and all together"
    seen = []
    monkeypatch.setattr(hyperflux.cli, 'load_data', lambda *a, **k: images('fashion-small'))
    monkeypatch.setattr(hyperflux.cli, 'rehearse', lambda config, *a, **k: seen.append(config))
    monkeypatch.setattr(hyperflux.cli, 'rehearsal_text', lambda *a: '')
    base = RECIPES[name]
    other = {k: not getattr(base, k) if v is None else v for k, v in OTHER.items()}
    other['task'] = 'lenet' if base.task == 'cifar' else 'cifar'
    assert list(other) == [f.name for f in dataclasses.fields(Config)]
    assert all(getattr(base, k) != v for k, v in other.items())
    option = lambda k, v: ['--' + 'no-'*(v is False) + k.replace('_', '-')] + [str(v)]*(not isinstance(v, bool))
    for k, v in other.items():
        own = {k: v} | NEEDS.get(k, {})
        shell('prune', '--dry-run', '--recipe', name, *(o for each in own.items() for o in option(*each)))
        assert seen.pop() == recipe(name, **own) == dataclasses.replace(base, **own), k
    shell('prune', '--dry-run', '--recipe', name, *(o for k, v in other.items() for o in option(k, v)))
    assert seen.pop() == Config(**other)
    shell('prune', '--dry-run', '--recipe', name, '--epochs', 50, '--sparsity', .5)
    c = seen.pop()
    assert c.epochs == 50 and c.sparsity == .5 and (c.dense_epochs == 0) == (base.dense_epochs == 0)
    s, usual = Config(**other).settings(), recipe(name).settings()
    for k in OF_THE_GATES[2:]: assert getattr(s, k.removeprefix('gate_')) == other[k], k          # they reach the gates
    assert s.trajectory is cubic and s.controller().step == dict(lenet=.3, cifar=.2)[other['task']]
    assert {f.name for f in dataclasses.fields(s)} - {'prune'} == {k.removeprefix('gate_') for k in OF_THE_GATES}
    assert usual == dataclasses.replace(Settings(), prune=usual.prune, settle=usual.settle)
    with pytest.raises(ValueError, match='expected . or more'): in_epochs(1, base)


def test_wrong_names_say_so(capsys):
    wrong = {
        ('--recipe', 'resnet50-cifar1'): "no recipe 'resnet50-cifar1'; did you mean resnet50-cifar10",
        ('--optimizer', 'adan'): "optimizer is one of adam, adamw, sgd: got 'adan'; did you mean adam",
        ('--method', 'author'): 'did you mean authors', ('--model', 'resnet-18'): 'did you mean resnet18',
        ('--data', 'cifar-10'): 'did you mean cifar10',
        ('--recipe', 'lenet5-quick', '--ignore', 'conv1'): "'conv1' matches no weight of the model",
        ('--batch-size', '0'): 'batch_size is 1 or more: got 0', ('--trajectory', 'cubik'): 'did you mean cubic',
        ('--dip', '2'): 'dip is a share of the target density', ('--metric', 'loss'): "no metric 'loss'"}
    for args, says in wrong.items():
        assert says in shell('prune', '--quiet', '--dry-run', *args, code=1)
    shell('prune', '--sparcity', '.9', code=2)
    assert 'unrecognized arguments: --sparcity' in capsys.readouterr().err
    shell('prune', '--batch-size', '12.5', code=2)
    assert "--batch-size: invalid int value: '12.5'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no recipe 'lenet300'; did you mean lenet300-mnist"): recipe('lenet300')
    with pytest.raises(ValueError, match="no setting 'epoch'; did you mean prune_epochs"): recipe('quick', epoch=3)


# A dense network to start from

def timm_names(state):
    "A vision transformer's tensors under timm's names, made without the package's own table"
    def name(n):
        for a, b in dict(conv_proj='patch_embed.proj', class_token='cls_token').items(): n = n.replace(a, b)
        n = n.replace('encoder.pos_embedding', 'pos_embed').replace('heads.head', 'head')
        n = n.replace('encoder.layers.encoder_layer_', 'blocks.').replace('encoder.ln', 'norm')
        n = n.replace('ln_1', 'norm1').replace('ln_2', 'norm2').replace('mlp.0', 'mlp.fc1').replace('mlp.3', 'mlp.fc2')
        return n.replace('self_attention.in_proj_', 'attn.qkv.').replace('self_attention.out_proj', 'attn.proj')
    return {name(n): v for n, v in state.items()}


HEADS = [('resnet18-cifar10', 'fc'), ('deit-t-cifar100', 'heads.head'), ('deit-t-imagenet', 'heads.head')]


@pytest.mark.parametrize('name, head', HEADS)
def test_starts_from_a_dense_checkpoint(name, head, images, tmp_path, capsys):
    "It is that network: its answers, its accuracy; a head for other classes stays new, and says so"
    c = recipe(name, batch_size=2, dense_epochs=0)
    data, path = images(c.data), tmp_path/'dense.pt'
    torch.manual_seed(123)
    dense = make_model(c.model, data.n_classes, data.in_shape)
    with torch.no_grad(): dense.get_parameter(f'{head}.weight').normal_(), dense.get_parameter(f'{head}.bias').normal_()
    state = dense.state_dict()
    torch.save(dict(model=timm_names(state)) if 'deit' in name else state, path)
    run = Run(dataclasses.replace(c, weights=str(path)), data)
    for n, v in run.model.state_dict().items(): assert torch.equal(v, state[n]), n
    x, y = next(iter(run.test_loader))
    dense.eval(), run.model.eval()
    # not the same layout in memory
    with torch.no_grad(): torch.testing.assert_close(run.model(x[:2]), dense(x[:2]), rtol=1e-4, atol=1e-4)
    assert 'not taken' not in capsys.readouterr().out
    if c.data != 'imagenet':
        with torch.no_grad(): right = torch.cat([dense(x).argmax(1) == y for x, y in data.loader('test', 1000)])
        assert abs(evaluate(run.model, run.test_loader)['accuracy'] - 100*right.float().mean()) < 1e-4
    run.start_pruning()
    present = dict(zip(run.pruner.names, run.pruner.values))
    assert all(torch.equal(present[n], state[n]) for n in present)    # gates begin open: what is pruned is that network

    other = {n: v for n, v in state.items() if not n.startswith(head)}
    other |= {f'{head}.weight': torch.ones(7, 5), f'{head}.bias': torch.ones(7)}
    torch.save(timm_names(other) if 'deit' in name else other, path)
    run = Run(dataclasses.replace(c, weights=str(path)), data)
    said = capsys.readouterr().out
    assert said.startswith(f'{path}: not taken: ') and 'shape (7, 5)' in said and said.count('\n') == 1
    assert all(torch.equal(v, state[n]) for n, v in run.model.state_dict().items() if not n.startswith(head))
    assert run.model.get_parameter(f'{head}.weight').std() < .5


def test_a_start_that_cannot_be_says_so(images, tmp_path):
    c = recipe('resnet50-imagenet')
    for weights, says in {'FILE': 'starts from a dense network: give its checkpoint with --weights',
                          str(tmp_path/'none.pt'): f'no checkpoint at {tmp_path}/none.pt'}.items():
        with pytest.raises((ValueError, OSError), match=says):
            Run(dataclasses.replace(c, weights=weights), images('imagenet'))
    torch.save(make_model('lenet300').state_dict(), tmp_path/'lenet.pt')
    with pytest.raises(ValueError, match='no weight of .*lenet.pt fits this ResNet'):
        Run(dataclasses.replace(c, weights=str(tmp_path/'lenet.pt')), images('imagenet'))
