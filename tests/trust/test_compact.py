"Compaction: whatever an operation meets or is switched on, the smaller network is equal, or `compact` says why not."
import contextlib, copy, json, logging, sys, threading, warnings

import pytest, torch, torch.nn.functional as F
from torch import nn

from hyperflux.structure.walk import Channels
from hyperflux.deploy.branches import relative_gap
from hyperflux.deploy.compact import compact
from hyperflux.structure.rules import RULES, Value, rule

def noise(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
IMAGE, ROW = noise(1, 2, 3, 8, 8), noise(2, 4, 6)


def kill(net, seed=0):
    "Half of all rows become zeros, and half of their biases"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and not m.weight.is_complex() and m.weight.numel():
                gone = torch.rand(len(m.weight), generator=g) < .5
                gone[:2] = torch.tensor([False, True])
                m.weight[gone] = 0
                if m.bias is not None: m.bias[gone & (torch.rand(len(gone), generator=g) < .5)] = 0
    return net.eval()


def through(a, b, c): return nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c))


def rows(): return kill(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)))


def pictures():
    return kill(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
                              nn.PReLU(8), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              *through(6, 10, 3)))


def equal(net, x, smaller=True):
    "The compacted network and its report, after a look whether it computes the same on other inputs"
    before = copy.deepcopy(net.state_dict())
    small, report = compact(net, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    other = noise(3, *x.shape).to(x)
    with torch.no_grad(): assert relative_gap(net.eval()(other), small(other)) < 1e-5
    assert (report.after < report.before) or not smaller, report
    assert str(report)
    return small, report


# Operands that are computed

class Around(nn.Module):
    "A convolution and a linear layer on both sides of an odd operation"
    def __init__(self, odd):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 2)
        for name, shape in dict(four=(4,), eight=(8,), kernel=(8, 1, 3, 3), square=(8, 8), cube=(8, 8, 1, 1)).items():
            self.register_parameter(name, nn.Parameter(torch.randn(*shape)))
        self.register_buffer('mean', torch.randn(8))
        self.register_buffer('var', torch.rand(8) + .5)
        self.norm = nn.LayerNorm(8)
        self.odd = odd
    def two(self): return torch.cat([self.four, self.four*2])
    def forward(self, x):
        x = self.odd(self, self.b(self.a(x).relu()))
        return self.d(self.c(x.mean((2, 3))))


ODD = {'bias of a convolution': lambda m, x: F.conv2d(x, m.cube, m.two()),
       'bias of a depthwise convolution': lambda m, x: F.conv2d(x, m.kernel, m.two(), groups=8),
       'bias of a transposed convolution': lambda m, x: F.conv_transpose2d(x, m.cube, m.two()),
       'bias of a linear layer': lambda m, x: F.linear(x.movedim(1, -1), m.square, m.two()).movedim(-1, 1),
       'weight of a convolution': lambda m, x: F.conv2d(x, m.cube - m.cube.mean(1, keepdim=True)),
       'weight of a depthwise convolution': lambda m, x: F.conv2d(x, m.kernel.abs(), m.eight, groups=8),
       'weight of a transposed convolution': lambda m, x: F.conv_transpose2d(x, m.cube.abs(), m.eight),
       'weight of a linear layer': lambda m, x: F.linear(x.movedim(1, -1), m.square.abs(), m.eight).movedim(-1, 1),
       'weight of a batch norm': lambda m, x: F.batch_norm(x, m.mean, m.var, m.two(), m.eight),
       'bias of a batch norm': lambda m, x: F.batch_norm(x, m.mean, m.var, m.eight, m.two()),
       'statistics of a batch norm': lambda m, x: F.batch_norm(x, m.mean*2, m.var + m.four.norm(), m.eight),
       'batch norm without weights': lambda m, x: F.batch_norm(x, m.mean, m.var),
       'batch norm by the batch': lambda m, x: F.batch_norm(x, None, None, training=True),
       'weight of a layer norm': lambda m, x: F.layer_norm(x.movedim(1, -1), (8,), m.two()).movedim(-1, 1),
       'weight of a group norm': lambda m, x: F.group_norm(x, 4, m.two(), m.eight),
       'weight of a PReLU': lambda m, x: F.prelu(x, m.two().abs()),
       'a gate that is a parameter': lambda m, x: x*m.eight.view(1, 8, 1, 1),
       'a gate that is computed': lambda m, x: x*m.two().sigmoid().view(1, 8, 1, 1),
       'an addend that is computed': lambda m, x: x + m.two().view(8, 1, 1),
       'a sum of parameters only': lambda m, x: x*(m.eight + m.mean).view(1, 8, 1, 1),
       'a number before the tensor': lambda m, x: 2 - (3*x + 1)/2,
       'a number that is computed': lambda m, x: x.clamp(max=m.four.sum()),
       'an exponent that is a tensor': lambda m, x: x.abs().pow(m.four.abs().sum()),
       'parameters behind channels': lambda m, x: torch.cat([x[:, :4], m.four.view(4, 1, 1).expand(2, 4, 6, 6)], 1),
       'a parameter that is moved and padded': lambda m, x: x + F.pad(m.square.t().mean(1).view(1, 8, 1, 1), (0, 0))}


@pytest.mark.parametrize('odd', ODD)
def test_an_operand_that_is_computed_costs_no_more_than_its_own_channels(odd):
    "Layers before and after the odd operation lose channels all the same"
    small, _ = equal(kill(Around(ODD[odd])), IMAGE)
    assert small.a.out_channels < 8 and small.c.out_features < 8, odd


def test_the_bias_of_projections_whose_middle_one_has_none():
    "As in BEiT: queries and values have a bias, keys have zeros; what the projection reads may still go"
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.qkv, self.out = nn.Linear(6, 12), nn.Linear(12, 24, bias=False), nn.Linear(8, 3)
            self.q, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        def forward(self, x):
            bias = torch.cat([self.q, torch.zeros_like(self.q), self.v])
            q, k, v = F.linear(self.a(x).relu(), self.qkv.weight, bias).view(4, 3, 2, 4).unbind(1)
            return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))
    torch.manual_seed(0)
    net = kill(Attention())
    small, _ = equal(net, ROW)
    assert small.qkv.in_features < 12 and small.qkv.out_features == 24 and small.qkv.bias is None
    assert 'has a bias that is computed' in {why for _, why in Channels(net, ROW).pins}


@pytest.mark.parametrize('how', ['without its bias', 'with another bias', 'with its bias doubled',
                                 'whose bias is read twice'])
def test_a_constant_goes_into_no_bias_that_the_layer_does_not_add(how):
    "A layer's weight is used by a function: the constant that it reads cannot be folded into the layer"
    class Borrowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)
            self.plus = nn.Parameter(torch.randn(6))
        def forward(self, x):
            a = self.a(x).relu()
            if how == 'whose bias is read twice': return self.head(self.b(a).relu()) + self.b.bias.sum()
            bias = {'without its bias': None, 'with another bias': self.plus}.get(how, self.b.bias*2)
            return self.head(F.linear(a, self.b.weight, bias).relu())
    torch.manual_seed(0)
    net = kill(Borrowed())
    with torch.no_grad(): net.a.weight[3:6], net.a.bias[3:6] = 0, torch.tensor([2., 1., -1.])
    equal(net, ROW)


# Rules that break

@contextlib.contextmanager
def rules(**replaced):
    "Rules by these names, for a moment"
    before = dict(RULES)
    try:
        for name, f in replaced.items(): rule(name)(f)
        yield
    finally:
        RULES.clear()
        RULES.update(before)


class Frac(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    def forward(self, x): return self.d(self.c(self.b(self.a(x).relu()).frac()).relu())


def raises(self, node, *args, **kw): raise KeyError('no such thing')
def first_weight(self, node): return self.weight(node.graph.find_nodes(op='placeholder')[0])
def half_said(self, node, x):
    self.pin('was pinned in between', x)
    self.equal(self.value(x).ids, self.new(8))
    self.claim(first_weight(self, node), 0, self.value(x).ids)
    return 1/0
def too_few(self, node, x): return Value(1, self.new(3), torch.zeros(3).numpy())
def no_value(self, node, x): return 'channels'
def unequal(self, node, x): self.equal(self.value(x).ids, self.new(3)); return self.value(x)
def wrong_weight(self, node, x): return self.weight(x)
def wrong_size(self, node, x): self.claim(first_weight(self, node), 1, self.value(x).ids); return self.value(x)


@pytest.mark.parametrize('broken,said', [(raises, 'KeyError'), (half_said, 'ZeroDivisionError'),
                                         (too_few, 'gave 3 channels'),
                                         (no_value, 'str instead of a Value'), (unequal, '8 channels cannot equal 3'),
                                         (wrong_weight, 'a weight that is computed'), (wrong_size, 'a.weight has 6')])
def test_a_rule_that_breaks_pins_its_operation_and_nothing_else(broken, said):
    "The reason names the operation and what went wrong, and all other layers lose their channels"
    with rules(frac=broken): small, report = equal(kill(Frac()), ROW)
    why = {r['name']: r['why'] for r in report.left}['b']
    assert why.startswith('is read by frac, ') and said in why
    assert small.a.out_features < 8 and small.b.out_features == 8 and small.d.in_features < 8


@pytest.mark.parametrize('name', ['conv2d', 'native_batch_norm_legit_no_training', 'getitem', 'prelu', 'view', 'linear',
                                  'all'])
def test_each_rule_may_break(name):
    "Of a convolutional network; with all rules broken at once nothing can go, and nothing is wrong"
    with rules(**dict.fromkeys(RULES if name == 'all' else [name], raises)):
        assert name in RULES or name == 'all'
        equal(pictures(), IMAGE, smaller=name not in ('linear', 'all'))


# What is switched on around

AROUND = {'default dtype float64': (torch.set_default_dtype, torch.float64, torch.float32),
          'default dtype float16': (torch.set_default_dtype, torch.float16, torch.float32),
          'default device meta': (torch.set_default_device, 'meta', None),
          'deterministic algorithms': (torch.use_deterministic_algorithms, True, False)}
WITHIN = {'inference mode': torch.inference_mode, 'device meta': lambda: torch.device('meta'),
          'autocast': lambda: torch.autocast('cpu', torch.bfloat16)}


@pytest.fixture(scope='module')
def plain():
    "A convolutional network, and what it becomes"
    net = pictures()
    return net, *compact(net, IMAGE)


@pytest.mark.parametrize('around', [*AROUND, *WITHIN])
def test_settings_around_change_nothing(around, plain):
    "Every number of the smaller network, and all that the report says, is as without them; and it can be trained"
    net, small, report = plain
    switch, on, off = AROUND.get(around, (lambda _: None, None, None))
    switch(on)
    try:
        with WITHIN.get(around, contextlib.nullcontext)(): other, again = compact(net, IMAGE)
    finally: switch(off)
    assert repr(report) == repr(again) and report.gap == again.gap
    for a, b in zip(small.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b) and (a.dtype, a.device) == (b.dtype, b.device)
    other(IMAGE).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_a_network_made_in_inference_mode():
    "Its weights can take no gradients; those of the smaller one can"
    with torch.inference_mode(): net, x = rows(), ROW.clone()
    small, report = compact(net, x)
    assert report.after < report.before and not any(p.is_inference() for p in small.parameters())


def test_threads_do_not_hear_of_each_other(capsys):
    """Three threads compact one network, a fourth prints, logs, warns and looks at its mode: nothing is lost or stays
    off"""
    net, found, heard, stop, modes = rows().train(), [], [], threading.Event(), set()
    class Hear(logging.Handler):
        def emit(self, record): heard.append(record.getMessage())
    logger, handler = logging.getLogger('another'), Hear()
    logger.addHandler(handler)
    said = 0
    def work():
        for _ in range(2): found.append(compact(net, ROW))
    threads = [threading.Thread(target=work) for _ in range(3)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for t in threads: t.start()
        while any(t.is_alive() for t in threads):
            print('word')
            print('word', file=sys.stderr)
            logger.error('word')
            warnings.warn('word')
            modes.add(net.training)
            said += 1
            stop.wait(.002)
    logger.removeHandler(handler)
    assert len(found) == 6 and said > 50
    small, report = found[0]
    assert all(repr(r) == repr(report) and torch.equal(s[2].weight, small[2].weight) for s, r in found)
    assert capsys.readouterr() == ('word\n'*said, 'word\n'*said) and heard == ['word']*said
    assert sum(str(w.message) == 'word' for w in warned) > .9*said  # torch.export keeps warnings for itself at moments
    assert modes == {True} and logging.root.manager.disable == 0 and torch.backends.mha.get_fastpath_enabled()


# Odd networks

class Parts(nn.Module):
    "A layer that reads no features, beside one that does; and one of complex numbers behind both"
    def __init__(self, nothing=True, complex_=False):
        super().__init__()
        torch.manual_seed(0)
        self.z, self.a, self.h = nn.Linear(0, 8) if nothing else None, nn.Linear(6, 8), nn.Linear(8, 3)
        self.c = nn.Linear(8, 8, dtype=torch.complex64) if complex_ else None
        self.front = nn.Linear(6, 6)
    def forward(self, x):
        y = self.a(self.front(x).relu())
        if self.z is not None: y = y + self.z(x[:, :0])
        if self.c is not None: y = self.c(y.relu().to(torch.complex64)).abs()
        return self.h(y)


@pytest.mark.filterwarnings('ignore:Initializing zero-element')
@pytest.mark.parametrize('make,x', [(lambda: kill(Parts()), ROW), (lambda: through(0, 32, 4), torch.zeros(3, 0)),
                                    (lambda: through(6, 0, 4), ROW)],
                         ids=['beside another', 'first', 'last'])
def test_layers_without_weights(make, x):
    "Nothing goes in, or nothing comes out"
    equal(make(), x, smaller=False)


@pytest.mark.filterwarnings('error')
def test_complex_weights_stay_and_real_ones_before_them_go():
    net = kill(Parts(nothing=False, complex_=True))
    small, _ = equal(net, ROW)
    assert small.front.out_features < 6 and small.c.weight.shape == (8, 8)
    assert any('whose numbers are complex' in w for _, w in Channels(net, ROW).pins)


def test_a_complex_network_is_compared_in_both_parts():
    "The gap of numbers that differ by their imaginary parts only"
    assert relative_gap(torch.tensor([1 + 1j, 2]), torch.tensor([1 + 1.5j, 2])) == .25
    net = nn.Sequential(nn.Linear(6, 8, dtype=torch.complex64), nn.Linear(8, 3, dtype=torch.complex64))
    equal(net, ROW.to(torch.complex64), smaller=False)


@pytest.mark.parametrize('kind', ['weight', 'bias', 'layer'])
def test_what_is_shared_stays_shared(kind):
    """Two layers with one weight or one bias, or one layer at two places, stay as they are, and those before lose
    channels"""
    torch.manual_seed(0)
    net = nn.Sequential(*through(6, 12, 8), nn.ReLU(), *through(8, 8, 8), nn.ReLU(), nn.Linear(8, 3))
    if kind == 'layer': net[6] = net[4]
    else: setattr(net[6], kind, getattr(net[4], kind))
    small, _ = equal(kill(net), ROW)
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert small[0].out_features < 12 and small[6].weight.shape == (8, 8)


@pytest.mark.filterwarnings('ignore:.*deprecated', 'ignore:The tensor attribute')
@pytest.mark.parametrize('how', ['masks', 'masks, trained', 'weight norm', 'weight norm by a hook', 'spectral norm'])
def test_weights_that_are_computed_from_others(how):
    "Masks and parametrisations of PyTorch: such a layer stays as it is, and those around it lose channels"
    net = kill(nn.Sequential(*through(6, 16, 16), nn.ReLU(), *through(16, 8, 3)))
    layer = nn.Linear(16, 16)
    if 'masks' in how: nn.utils.prune.l1_unstructured(layer, 'weight', .5)
    elif how == 'weight norm': nn.utils.parametrizations.weight_norm(layer)
    elif how == 'weight norm by a hook': nn.utils.weight_norm(layer)
    else: nn.utils.parametrizations.spectral_norm(layer)
    net[2] = layer
    if 'trained' in how: net.train()(ROW).sum().backward()
    small, _ = equal(net.eval(), ROW)
    assert small[4].out_features < 8


def test_the_network_is_not_touched():
    "What forward leaves in attributes and counters is left by the network's own calls only, and its mode is its own"
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last, self.calls = rows(), None, 0
        def forward(self, x):
            self.last, self.calls = self.net(x), self.calls + 1
            return self.last
    net = Leaves().train()
    net.net[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _, report = compact(net, ROW)
    assert report.after < report.before and net.last is None and net.calls == 0
    assert net.training and not net.net[1].training


class Chaos(nn.Module):
    def __init__(self, wrong=False, fixed=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.wrong, self.fixed = through(6, 16, 3), wrong, fixed
        with torch.no_grad(): self.net[0].weight[:6], self.net[0].bias[:6] = 0, torch.linspace(.3, 1.2, 6)
    def forward(self, x):
        x = self.net(x.float() if self.fixed else x).sigmoid()
        for _ in range(12): x = 4*x*(1 - x)
        return x + self.wrong*1e-3*self.net[0].out_features


def test_a_network_that_magnifies_rounding():
    """Its outputs differ by more than is allowed in its own precision, by nothing in double precision, and the report
    says so"""
    small, report = compact(Chaos(), ROW)
    assert small.net[0].out_features == 10 and report.gap < 1e-10 and 1e-5 < report.rounding < .1
    assert 'In double precision' in str(report)


@pytest.mark.parametrize('how', ['wrong', 'fixed'])
def test_rounding_is_no_excuse_for_what_is_wrong(how):
    """Wrong: the number of channels goes into the output. Fixed: one type of numbers is written into the code, so
    nothing can be known"""
    with pytest.raises(RuntimeError, match='outputs differ by'): compact(Chaos(**{how: True}), ROW)


# Refusals

class Quiet(nn.Module):
    def __init__(self, out): super().__init__(); self.a, self.out = nn.Linear(6, 2), out
    def forward(self, x): self.a(x); return self.out


def nan():
    net = rows()
    net[0].weight.data[0, 0] = float('nan')
    return net


@pytest.mark.parametrize('make,x,kind,words', [
    (rows, {}, ValueError, 'got an empty dict'),
    (rows, [ROW], ValueError, 'got a list'),
    (rows, None, ValueError, 'got a NoneType'),
    (rows, (), ValueError, 'got an empty tuple'),
    (rows, ROW[:0], ValueError, r'at least one sample.*\(0, 6\)'),
    (rows, ROW[:, :5], RuntimeError, 'cannot be copied and run on the example'),
    (rows, (ROW, ROW), RuntimeError, 'cannot be copied and run on the example.*2 positional'),
    (nan, ROW, ValueError, 'NaN or infinity'),
    (lambda: nn.LazyLinear(3), ROW, ValueError, 'weight has no values yet'),
    (lambda: rows().to('meta'), ROW, ValueError, '0.weight has no values yet'),
    (lambda: Quiet(3), ROW, ValueError, 'gives no tensors')],
    ids=['dict', 'list', 'nothing', 'empty', 'no sample', 'wrong size', 'too many', 'nan', 'lazy', 'meta',
         'no tensors'])
def test_refusals_say_what_was_given_and_what_to_do(make, x, kind, words):
    with pytest.raises(kind, match=words): compact(make(), x)


def test_a_network_that_is_not_followed_is_refused_without_a_page_of_graphs(capfd):
    class Asks(nn.Module):
        def __init__(self): super().__init__(); self.a = nn.Linear(6, 2)
        def forward(self, x): return self.a(x) if x.sum().item() > 0 else self.a(-x)
    with pytest.raises(RuntimeError, match='torch.export cannot follow this model'): compact(Asks(), ROW)
    assert capfd.readouterr() == ('', '')


# Networks of others

# In the usual run the program that compacts whole families is not asked whether it works
@pytest.mark.long
def test_families_leave_a_record(tmp_path, capsys):
    "Two small families; a second run finds them done; a fault and a refusal are told apart"
    pytest.importorskip('timm')
    from benchmarks import families
    out = tmp_path/'deep'/'families.json'
    keys = 'torchvision squeezenet,timm mambaout'
    families.main(['--smoke', '--out', str(out)])
    r = json.loads(out.read_text())
    assert r['smoke'] and {'command', 'date', 'commit', 'torch', 'timm', 'torchvision', 'hardware'} <= r.keys()
    assert [f"{x['source']} {x['family']}" for x in r['rows']] == keys.split(',')
    for x in r['rows']:
        assert x['outcome'] == 'equal' and x['gap'] < 1e-5 and 0 < x['left'] < 1
        assert x['seconds'] > 0 and x['spread'] > 1e-3
    assert families.main(['--smoke', '--out', str(out)])['rows'] == r['rows']
    assert "'equal': 2" in capsys.readouterr().out
    names = dict(swin_v2_t='swin_v2', vgg11_bn='vgg_bn', regnet_x_1_6gf='regnet_x', wide_resnet50_2='wide_resnet')
    assert {n: families.family_of(n) for n in names} == names
    with pytest.raises(ValueError) as refused: compact(rows(), {})
    with pytest.raises(TypeError) as fault: compact(rows())
    assert families.own_refusal(refused.value) and not families.own_refusal(fault.value)
