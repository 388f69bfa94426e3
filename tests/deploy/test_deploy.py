"Networks that hyperflux did not make, all the way: prune, compact, sparsify, save, load; and the report on them."
import copy, sys

import pytest, torch, torchvision
from torch import nn

from hyperflux.rivals.scores import LayerMagnitude
from hyperflux.deploy.branches import relative_gap
from hyperflux.deploy.compact import compact
from hyperflux.deploy.forms import deploy
from hyperflux.deploy.loading import load_sparse
from hyperflux.deploy.files import save_sparse
from hyperflux.deploy.sparsify import sparsify
from tests.deploy.test_compact import UNet

MODELS = dict(mobilenet=(lambda: torchvision.models.mobilenet_v3_small(num_classes=10), (2, 3, 64, 64)),
              unet=(UNet, (2, 1, 16, 16)),
              transformer=(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 64, batch_first=True), 2,
                                                         enable_nested_tensor=False), (2, 5, 16)))


def pruned(make, sparsity=.9):
    torch.manual_seed(0)
    net = make().eval()
    p = LayerMagnitude(net, torch.optim.SGD(net.parameters(), 0.), sparsity=sparsity, steps=1, span=(0, 1))
    p.start(), p.detach()
    return net


@pytest.mark.parametrize('name', MODELS)
def test_any_network_goes_all_the_way(name, tmp_path):
    make, shape = MODELS[name]
    net, x = pruned(make), torch.randn(*shape)
    small, report = compact(net, x)
    quick, choices = sparsify(small, x)
    saved = save_sparse(small, tmp_path/'net.sparse', plain_zeros=True)
    blank = copy.deepcopy(small)
    with torch.no_grad():
        for p in blank.parameters(): p.zero_()
        again = load_sparse(tmp_path/'net.sparse', blank)
        for form in small, quick, again: assert relative_gap(net(x), form.eval()(x)) < 1e-5
    assert report.after <= report.before and choices.ratio >= 1
    assert saved.bytes < .3*sum(v.numel()*v.element_size() for v in net.state_dict().values())
    assert all(r['why'] for r in report.left) and all(choices.left.values())              # what was left has a reason
    assert str(report) and str(choices)


def test_a_report_on_a_network_of_ones_own(tmp_path):
    net = pruned(UNet)
    report = deploy(net, torch.randn(3, 1, 16, 16), tmp_path, batches=(1, 5), compiled=False, rounds=3)
    forms = {r['form'].split(' (')[0] for r in report.speed}
    assert forms == {'dense', 'compacted', 'sparsified', 'dense, ONNX Runtime', 'compacted, ONNX Runtime'}
    assert all(r['ratio'][1] == 1 for r in report.speed if r['form'] == r['against'])
    assert {r['batch'] for r in report.speed} == {1, 5}
    assert report.counts['dense']['effective'] < report.counts['dense']['dense']
    assert report.counts['compacted']['dense'] <= report.counts['dense']['dense']
    assert all(len(r['ratio']) == 3 and r['ratio'][1] > 0 for r in report.speed)


def test_without_onnx_it_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    report = deploy(pruned(UNet), torch.randn(2, 1, 16, 16), batches=(1,), compiled=False, rounds=3)
    assert "pip install 'hyperflux[deploy]'" in report.skipped['ONNX Runtime']
    assert 'Not there: ONNX Runtime' in str(report)


@pytest.mark.long
def test_compiled_forms(tmp_path):
    report = deploy(pruned(UNet), torch.randn(2, 1, 16, 16), batches=(2,), onnx=False, rounds=3)
    assert {'dense, compiled', 'compacted, compiled'} <= {r['form'] for r in report.speed} | set(report.skipped)


def test_what_cannot_be_deployed_says_so():
    net, x = pruned(UNet), torch.randn(2, 1, 16, 16)
    with pytest.raises(ValueError, match='at least one sample'): deploy(net, x[:0])
    with pytest.raises(ValueError, match='whole numbers from 1'): deploy(net, x, batches=(1, 0))
    with pytest.raises(ValueError, match='another device'): deploy(net.to('meta'), x)


def test_what_cannot_be_followed_is_left_out_and_named():
    class Asks(nn.Linear):
        def forward(self, x): return super().forward(x) if x.sum().item() > 0 else -x
    report = deploy(Asks(4, 4), torch.randn(2, 4), batches=(1,), compiled=False, onnx=False, rounds=3)
    assert 'cannot follow' in report.skipped['compacted'] and 'Not there: compacted' in str(report)
    assert [r['form'] for r in report.speed] == ['dense', 'sparsified (as dense)']
