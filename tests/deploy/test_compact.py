"Compaction: hundreds of random networks, and networks that hyperflux did not make."
import copy

import pytest, torch, torchvision
from torch import nn

from hyperflux.deploy.branches import relative_gap
from hyperflux.deploy.compact import compact
from hyperflux.lab.models import MODELS, make_model

ACTS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.PReLU, nn.Hardsigmoid,
        nn.Identity)


class Block(nn.Module):
    "A convolution in one of many surroundings; `width` says how many channels come out"
    def __init__(self, kind, width, rand):
        super().__init__()
        pick = lambda *xs: xs[int(torch.randint(len(xs), (1,), generator=rand))]
        act = lambda: pick(*ACTS)()
        bias, pad = pick(True, False), pick(0, 1)
        self.kind, self.width = kind, width
        if kind == 'plain':
            out = pick(4, 6, 9)
            self.body = nn.Sequential(nn.Conv2d(width, out, 3, padding=pad, bias=bias),
                                      *([nn.BatchNorm2d(out)] if pick(0, 1) else []), act(),
                                      *([pick(nn.MaxPool2d, nn.AvgPool2d)(3, 1, pick(0, 1))] if pick(0, 1) else []))
            self.width = out
        elif kind == 'residual':
            self.body = nn.Sequential(nn.Conv2d(width, 5, 3, padding=1, bias=bias), act(),
                                      nn.Conv2d(5, width, 1, bias=bias), nn.BatchNorm2d(width))
            self.act = act()
        elif kind == 'concat':
            self.a, self.b = nn.Conv2d(width, 3, 1, bias=bias), nn.Conv2d(width, 4, 3, padding=1)
            self.act, self.width = act(), 7
        elif kind == 'depthwise':
            self.body = nn.Sequential(nn.Conv2d(width, width*2, 3, padding=pad, groups=width, bias=bias),
                                      nn.BatchNorm2d(width*2), act(), nn.Conv2d(width*2, 5, 1))
            self.width = 5
        elif kind == 'grouped':
            self.body = nn.Sequential(nn.Conv2d(width, 8, 1), act(), nn.Conv2d(8, 6, 3, padding=pad, groups=2,
                                                                               bias=bias))
            self.width = 6
        elif kind == 'gate':
            self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 3, 1), nn.ReLU(),
                                      nn.Conv2d(3, width, 1), nn.Hardsigmoid())
        elif kind == 'up':
            self.body = nn.Sequential(nn.ConvTranspose2d(width, 4, 2, 2, bias=bias), nn.MaxPool2d(2)); self.width = 4
    def forward(self, x):
        if self.kind == 'residual': return self.act(x + self.body(x))
        if self.kind == 'concat': return self.act(torch.cat([self.a(x), self.b(x)], 1))
        if self.kind == 'gate': return x*self.body(x)
        return self.body(x)


def network(seed):
    "A random network, masked at random, with dead rows, dead columns and constants of all kinds"
    rand = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kinds, width, blocks = ('plain', 'residual', 'concat', 'depthwise', 'grouped', 'gate', 'up'), 2, []
    for k in torch.randint(len(kinds), (int(torch.randint(1, 5, (1,), generator=rand)),), generator=rand).tolist():
        blocks.append(Block(kinds[k], width, rand))
        width = blocks[-1].width
    flat = bool(torch.randint(2, (1,), generator=rand))
    x = torch.randn(2, 2, 12, 12, generator=rand)
    end = [nn.Flatten()] if flat else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    with torch.no_grad(): size = nn.Sequential(*blocks, *end).eval()(x).shape[1]
    net = nn.Sequential(*blocks, *end, nn.Linear(size, 6, bias=bool(seed % 2)), nn.ReLU(), nn.Linear(6, 3))
    density = float(torch.rand((), generator=rand))**1.5
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.bias, m.running_mean): t.normal_(generator=rand)
                m.running_var.uniform_(.5, 2, generator=rand)
                m.weight[torch.rand(m.weight.shape, generator=rand) < .1] = 0
            elif hasattr(m, 'weight') and m.weight.ndim > 1:
                w = m.weight
                w.mul_(torch.rand(w.shape, generator=rand) < density).div_(max(density, .05)**.5)
                for d in (0, 1):
                    w.mul_((torch.rand(w.shape[d], generator=rand) > .3).view([-1 if i == d else 1
                                                                               for i in range(w.ndim)]))
                if m.bias is not None: m.bias.mul_(torch.rand(m.bias.shape, generator=rand) > .4)
    return net.eval(), x


@pytest.mark.parametrize('part', [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 12))])
def test_random_networks_stay_what_they_compute(part):
    """20 networks, 240 with HYPERFLUX_LONG=1: equal to 1e-5 of the largest output, and where all is in float64 to
    1e-12; never an exception"""
    went = 0
    for seed in range(part, 240, 12):
        net, x = network(seed)
        before = copy.deepcopy(net.state_dict())
        small, report = compact(net, x)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
        assert report.views, f'network {seed}: reshapes had to be left alone'
        other = torch.randn(3, 2, 12, 12)
        with torch.no_grad():
            assert relative_gap(net(other), small(other)) < 1e-5, seed
            if seed % 4 == 0: assert compact(net.double(), x.double(), tolerance=1e-12)[1].after == report.after, seed
        went += report.after < report.before
    assert went > 12


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.down1, self.down2, self.mid = conv(1, 8), conv(8, 16), conv(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.out2, self.out1, self.head = conv(32, 16), conv(16, 8), nn.Conv2d(8, 2, 1)
    def forward(self, x):
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.mid(nn.functional.max_pool2d(b, 2))
        d = self.out2(torch.cat([self.up2(c), b], 1))
        return self.head(self.out1(torch.cat([self.up1(d), a], 1)))


def kill(net, share=.5):
    "Whole rows and columns of all weights become zero, and biases with rows"
    torch.manual_seed(0)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)) and m.weight.shape[0] > 4:
                gone = torch.rand(len(m.weight)) < share
                m.weight[gone] = 0
                if m.bias is not None: m.bias[gone] = 0
    return net.eval()


@pytest.mark.parametrize('make,shape',
                         [(UNet, (1, 1, 16, 16)), (lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
                                                   (2, 3, 64, 64)),
                                        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 64,
        batch_first=True), 2, enable_nested_tensor=False), (2, 5, 16)),
                                        *[(lambda n=n: make_model(n, 10, (1, 28, 28) if n.startswith('lenet') else (3,
        32, 32)), (2, 1, 28, 28) if n.startswith('lenet') else (2, 3, 32, 32)) for n in MODELS]],
                         ids=['unet', 'mobilenet', 'transformer', *MODELS])
def test_known_networks(make, shape):
    net = kill(make())
    small, report = compact(net, torch.randn(*shape))
    assert report.after < .95*report.before and report.gap < 1e-5
    assert type(small) is type(net)
    copy.deepcopy(small).load_state_dict(small.state_dict())
