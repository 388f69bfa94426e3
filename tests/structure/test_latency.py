"Latency as the cost, on made-up machines whose clock counts instead of timing."
import copy, io, json, re

import pytest, torch
import torch.nn.functional as F
from torch import nn

from benchmarks import latency as benchmark
from hyperflux import Hyperflux
from hyperflux.core.settings import described
from hyperflux.structure import Latency, channels, flops, flops_by_module
from tests.helpers import program

pytestmark = pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step', 'ignore:at the landing')


# Machines: a run is what is to be run, and the clock looks at it

def kept(module, args, named): return module, args, named


def operations(run):
    module, args, named = run
    return flops_by_module(module, example=(*args, *named.values()))['']


def counting(runs): return {k: 1e-9*operations(run) for k, run in runs.items()}


def noisy(runs):
    "Up to six times as long as it should be, at random"
    rand = torch.rand(len(runs), generator=torch.Generator().manual_seed(0)).tolist()
    return {k: t*(1 + 5*r) for (k, t), r in zip(counting(runs).items(), rand)}


def measured(model, example, timed=counting, **how): return Latency(model, example, run=kept, timed=timed, **how)


# Networks

def convnet():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 4))


def separable():
    "Depthwise, with two outputs for each input, and a transposed convolution"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 6, 1),
                         nn.ReLU(), nn.ConvTranspose2d(6, 5, 3, stride=2), nn.ReLU(), nn.Conv2d(5, 2, 3))


class Residual(nn.Module):
    "A stream to which the same layers add twice, the second time at a quarter of the places"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up, self.down = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(2): x = F.avg_pool2d(x + self.down(F.relu(self.up(x))), 2)
        return self.head(x.mean((2, 3)))


NETS = dict(convnet=convnet, separable=separable, residual=Residual)
images = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def drawn(n, seed):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=g) < torch.rand(1, generator=g)).float()


def pruned(net, cost, steps=120, stop=None, sparsity=.5):
    groups = channels(net, images)
    opt = torch.optim.SGD(net.parameters(), .05)
    pruner = Hyperflux(net, opt, sparsity=sparsity, steps=steps, groups=groups, cost=cost)
    return pruner, lambda a, b: [train(net, opt, k) for k in range(a, b)]


def train(net, opt, k):
    x = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(k))
    opt.zero_grad()
    net(x).flatten(1)[:, :4].square().mean().backward()
    opt.step()


@pytest.mark.parametrize('name', NETS)
def test_where_an_operation_takes_a_nanosecond_it_is_operations(name):
    "For all samples of the example, at any open gates; what one channel more would take, too"
    net = NETS[name]()
    groups = channels(net, images)
    time, work = groups.cost(measured(net, images)), groups.cost(flops)
    fixed = work.fixed                                          # what is in no term is in none of a latency's either
    for seed in range(20):
        z = drawn(time.n, seed)
        assert time.left(z) == len(images)*(work.left(z) - fixed)
        assert torch.equal(time.marginal(z), len(images)*work.marginal(z))


def test_a_price_that_was_measured_with_noise_never_falls_when_a_channel_comes_back():
    net = convnet()
    cost = channels(net, images).cost(measured(net, images, noisy))
    for seed in range(20):
        z = drawn(cost.n, seed)
        for j in (z == 0).nonzero()[:, 0].tolist():
            more = z.clone()
            more[j] = 1
            assert cost.left(more) >= cost.left(z)
            assert cost.marginal(z)[j] == cost.left(more) - cost.left(z)
    assert cost.left(torch.ones(cost.n)) % 1 == 0 < cost.whole                          # whole nanoseconds


def test_the_price_of_each_layer_rises_along_inputs_and_along_outputs():
    net = convnet()
    groups, found = channels(net, images), measured(net, images, noisy)
    for t in groups.terms[1:3]:
        grid = torch.cartesian_prod(torch.arange(len(t.ins) + 1), torch.arange(len(t.outs) + 1))
        cost = found([t])(torch.zeros(len(grid), dtype=torch.long), *grid.double().T)
        cost = cost.view(len(t.ins) + 1, -1)
        assert (cost.diff(dim=0) >= 0).all() and (cost.diff(dim=1) >= 0).all() and cost[-1, -1] > 0
        assert (cost[0] == 0).all() and (cost[:, 0] == 0).all()


def test_a_layer_without_inputs_or_outputs_takes_no_time():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    groups = channels(net, torch.randn(2, 6))
    assert groups.cost(measured(net, torch.randn(2, 6), noisy)).left(torch.zeros(5)) == 0


def test_what_a_call_and_a_number_take_is_found_between_the_layers():
    "700 ns a layer, three for each number that a layer puts out: in no layer's time, only in that of networks"
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(9, 40), nn.Linear(40, 30), nn.Linear(30, 2)
        def forward(self, x): return self.c(F.relu(self.b(F.relu(self.a(x)))))
    def slow(runs):
        rest = {k: 3*700 + 3*4*(len(m.a.weight) + len(m.b.weight) + len(m.c.weight)) if isinstance(m, Chain) else 0
                for k, (m, *_) in runs.items()}
        return {k: t + 1e-9*rest[k] for k, t in counting(runs).items()}
    x = torch.randn(4, 9)
    found = measured(Chain(), x, slow)
    cost = channels(net := Chain(), x).cost(found)
    assert cost.whole == 4*flops_by_module(net, example=(x[:1],))[''] + 3*700 + 3*4*72
    assert max(found.error) < 1e-6 and all(r['alone'] < r['measured'] for r in found.tried)
    assert cost.left(torch.zeros(cost.n)) == 0                          # each layer lacks its inputs or its outputs


def test_networks_that_check_are_not_those_that_were_fitted():
    found = measured(convnet(), images, noisy, networks=10)
    assert [r['fitted'] for r in found.tried] == [True]*6 + [False]*5
    off = sorted(abs(r['predicted']/r['measured'] - 1) for r in found.tried[6:])
    assert found.error == (off[2], off[-1]) and f'off by {off[2]:.1%} (median; at most {off[-1]:.1%})' in repr(found)


def test_layers_that_are_alike_are_measured_once():
    seen = []
    def timed(runs):
        seen.extend(runs)
        return counting(runs)
    net = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(8, 8), nn.ReLU())])
    measured(net, torch.randn(2, 8), timed, networks=0, sizes=3)
    assert len(seen) == 1 + 3*3                                                 # the network, and 1, 4, 8 × 1, 4, 8


def test_pruning_ends_within_the_milliseconds_that_were_asked():
    cost = measured(convnet(), images, noisy, sizes=3, networks=4)
    whole = channels(convnet(), images).cost(cost).whole
    for sparsity in .3, .6:
        pruner, go = pruned(convnet(), cost, sparsity=sparsity)
        go(0, 120)
        left = pruner.groups.left(pruner.gate)
        assert left <= (1 - sparsity)*whole
        shut = pruner.groups.cost.marginal(pruner.gate)[pruner.gate == 0]
        assert len(shut) and (left + shut > (1 - sparsity)*whole).all()                 # and nothing more would fit


def test_a_run_goes_on_with_the_saved_table_as_if_it_had_not_stopped(tmp_path):
    "Nothing is measured again, and every weight is the same"
    def once(how):
        net = convnet()
        pruner, go = pruned(net, how)
        return net, pruner, go
    first = measured(convnet(), images, noisy, sizes=3, networks=4)
    first.save(tmp_path/'table.json')
    again = Latency.load(tmp_path/'table.json')
    whole, _, go = once(first)
    go(0, 120)
    net, pruner, go = once(first)
    go(0, 70)
    state, weights = copy.deepcopy(pruner.state_dict()), copy.deepcopy(net.state_dict())
    net, pruner, go = once(again)
    net.load_state_dict(weights)
    pruner.load_state_dict(state)
    go(70, 120)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), net.state_dict().values()))


def test_a_run_does_not_go_on_with_a_table_that_was_measured_anew():
    pruner, _ = pruned(convnet(), measured(convnet(), images, noisy, sizes=3, networks=4))
    other, _ = pruned(convnet(), measured(convnet(), images, sizes=3, networks=4))
    with pytest.raises(ValueError, match='this state goes on with whole='): other.load_state_dict(pruner.state_dict())


def test_a_table_is_known_by_its_numbers(tmp_path):
    a, b = (measured(convnet(), images, timed) for timed in (counting, noisy))
    a.save(tmp_path/'a.json')
    assert described(a) == described(Latency.load(tmp_path/'a.json')) != described(b)
    assert re.fullmatch(r'Latency\([0-9a-f]{8}\)', described(a)) and repr(a) == repr(Latency.load(tmp_path/'a.json'))


def test_with_a_multiple_only_such_widths_are_tried():
    shapes = set()
    def timed(runs):
        layers = [l for m, *_ in runs.values() for l in m.modules() if isinstance(l, nn.Linear)]
        shapes.update(tuple(l.weight.shape) for l in layers)
        return counting(runs)
    net = nn.Sequential(nn.Linear(5, 44), nn.ReLU(), nn.Linear(44, 44))
    measured(net, torch.randn(2, 5), timed, multiple=8)
    outs, ins = map(set, zip(*shapes))
    assert len(outs) > 3 and all(n % 8 == 0 or n == 44 for n in outs)
    assert len(ins) > 3 and all(n % 8 == 0 or n in (5, 44) for n in ins)


def test_attention_goes_by_its_operations_at_the_layers_speed():
    "Heads have gates, and a price, though nobody calls a product alone"
    net = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True).eval()
    x = torch.randn(2, 5, 16)
    groups = channels(net, x)
    time, work = groups.cost(measured(net, x)), groups.cost(flops)
    for seed in range(10):
        z = drawn(time.n, seed)
        assert abs(time.left(z) - 2*(work.left(z) - work.fixed)) <= len(groups.terms)       # each rounded


def test_where_no_narrower_network_runs_the_error_is_not_known():
    class Written(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
        def forward(self, x):
            x = F.relu(self.a(x))
            assert x.shape[1] == 8
            return self.b(x)
    found = measured(Written(), torch.randn(2, 3))
    assert found.error is None and 'not checked' in repr(found) and len(found.tried) == 1


@pytest.mark.parametrize('example', [(torch.randn(4, 6), torch.randn(4, 3)),
                                     dict(a=torch.randn(4, 6), b=torch.randn(4, 3))], ids=['tuple', 'dict'])
def test_several_inputs(example):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.y, self.z = nn.Linear(6, 7), nn.Linear(3, 7), nn.Linear(7, 2)
        def forward(self, a, b): return self.z(F.relu(self.x(a) + self.y(b)))
    found = measured(Two(), example)
    assert found.made['samples'] == 4 and found.tried[0]['predicted'] == 2*4*(42 + 21 + 14)


def test_the_model_is_left_as_it_is():
    net = convnet().train()
    before = copy.deepcopy(net.state_dict())
    measured(net, images)
    assert all(m.training for m in net.modules()) and not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize('name', NETS)
def test_a_real_clock(name):
    "Whatever it says: the whole takes longer than nothing, and the object says where"
    net = NETS[name]()
    found = Latency(net, images, sizes=3, networks=2)
    assert channels(net, images).cost(found).whole > 0
    assert found.made['hardware'] in repr(found) and f"threads: {torch.get_num_threads()}" in repr(found)
    assert found.made['run'] == 'eager'


def test_terms_of_another_model_are_refused():
    found = measured(convnet(), images)
    other = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1200, 4))
    with pytest.raises(ValueError, match=r'another model: 3\.weight has 1200 inputs and 4 outputs here, and no'):
        channels(other, images).cost(found)


@pytest.mark.parametrize('how, match', [(dict(sizes=1), 'sizes is a whole number, 2 or more: got 1'),
                                        (dict(multiple=0), 'multiple is a whole number, 1 or more: got 0'),
                                        (dict(networks=-1), 'networks is a whole number, 0 or more: got -1')])
def test_numbers_that_cannot_be_are_refused(how, match):
    with pytest.raises(ValueError, match=match): measured(convnet(), images, **how)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match='no layer of ReLU can be timed: expected a linear layer or a convolution'):
        measured(nn.ReLU(), images)


@pytest.mark.parametrize('text', ['', '[]', '{"latency": 1}', '{"made": {}, "tried": [], "layers": [{"name": "a"}]}'])
def test_a_file_that_is_none_of_its_own_is_refused(tmp_path, text):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(ValueError, match='x.json holds no latency: expected a file that Latency.save wrote'):
        Latency.load(tmp_path/'x.json')


def test_another_runtime_can_be_timed():
    onnxruntime = pytest.importorskip('onnxruntime')
    def onnx(module, args, named):
        file = io.BytesIO()
        torch.onnx.export(module, args, file, input_names=['x'], dynamo=False)
        session = onnxruntime.InferenceSession(file.getvalue())
        return lambda: session.run(None, {'x': args[0].numpy()})
    net, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(16, 32)
    found = Latency(net, x, sizes=2, networks=2, run=onnx)
    assert found.made['run'].endswith('onnx') and channels(net, x).cost(found).whole > 0


# The benchmark

@pytest.mark.parametrize('argv, said', [(['--models', 'lenet'], "no model 'lenet'; there are lenet5, vgg, resnet20"),
                                        (['--rounds', '0'], '--rounds is a whole number above 0: got 0'),
                                        (['--clock', 'cpu', '--threads', '2'], 'needs --threads 1: got 2')])
def test_wrong_arguments_are_told(argv, said, capsys):
    with pytest.raises(SystemExit): benchmark.arguments(argv)
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_the_benchmark_leaves_a_record(tmp_path):
    code, text = program('benchmarks.latency', '--smoke', '--clock', 'cpu', '--out', tmp_path/'x.json')
    assert code == 0, text
    record = json.loads((tmp_path/'x.json').read_text())
    assert record['smoke'] and record['clock'] == 'cpu' and {'commit', 'hardware', 'command', 'date'} <= record.keys()
    assert [r['width'] for r in record['stairs']] == [1, 2, 3]
    assert {(r['model'], r['multiple']) for r in record['tried']} == {('perceptron', 1), ('perceptron', 8)}
    r, = record['landings']
    assert r['predicted'] <= r['asked'] == .4 and r['measured']['n'] == r['wall']['n'] == 3
    assert '784-1000-500-10' in text and 'by the wall' in text
