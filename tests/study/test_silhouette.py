"""The picture of a network's widths: in any size, in what a run leaves behind, from a pruner."""
import itertools, json

import matplotlib
import pytest, torch
from matplotlib.figure import Figure
from torch import nn

from hyperflux import Hyperflux, channels
from hyperflux.plots import COLORS, plot_widths
from hyperflux.study.config import Config
from hyperflux.study.report import report
from hyperflux.study.train import fit

pytestmark = pytest.mark.filterwarnings('ignore:the learning rate', 'ignore:at step', 'ignore:at the landing')


def rows(n): return [dict(bank=f'layer{i//4}.{i%4}.conv1', gates=16*2**(i % 6), open=1 + i % 16) for i in range(n)]


def drawn(widths, height):
    fig = Figure(figsize=(5.2, height), layout='constrained')
    ax = plot_widths(widths, fig.subplots())
    fig.draw_without_rendering()
    return ax


@pytest.mark.parametrize('n, height', [(1, 3), (3, 3), (14, 3), (30, 4), (60, 9), (60, 3), (400, 3)])
def test_no_words_lie_on_each_other(n, height):
    "From one layer to hundreds, in a figure of its own or in a small one"
    ax = drawn(rows(n), height)
    words = [t for t in [*ax.texts, *ax.get_yticklabels()] if t.get_text()]
    boxes = [t.get_window_extent() for t in words]
    assert len(words) >= min(n, 5)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert all(b.x0 >= -1 and b.x1 <= ax.figure.bbox.x1 + 1 for b in boxes)


def test_bars_are_centred_before_and_after():
    "Three layers, the first at the top, each with its widths written"
    ax = drawn([dict(bank='a', gates=8, open=3), dict(bank='b', gates=20, open=20), dict(bank='', gates=5, open=0)], 2)
    spans = [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches]
    assert spans == [(-4, 4), (-10, 10), (-2.5, 2.5), (-1.5, 1.5), (-10, 10), (0, 0)]
    assert [t.get_text() for t in ax.texts] == ['8 → 3', '20', '5 → 0']
    assert [t.get_text() for t in ax.get_yticklabels()] == ['a', 'b', 'model']
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 2))[1]
    light, dark = (matplotlib.colors.to_rgb(ax.patches[i].get_facecolor()) for i in (0, 3))
    assert light == matplotlib.colors.to_rgb(COLORS['before']) and sum(light) > sum(dark)


def net(): return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


def test_a_pruner_shows_what_is_in_the_model():
    "Given itself, without a summary"
    torch.manual_seed(0)
    model = net()
    pruner = Hyperflux(model, torch.optim.SGD(model.parameters(), .1), sparsity=.5, steps=200,
                       groups=channels(model, torch.randn(2, 6)))
    with torch.no_grad(): model[2].weight[:, :4] = 0
    ax = plot_widths(pruner, Figure().subplots())
    assert [t.get_text() for t in ax.texts] == ['9 → 5']


def test_single_weights_have_no_widths():
    "A pruner without groups is told what it lacks"
    model = net()
    pruner = Hyperflux(model, torch.optim.SGD(model.parameters(), .1), sparsity=.5, steps=200)
    with pytest.raises(ValueError, match='gates switch single weights.*groups='): plot_widths(pruner)


@pytest.mark.parametrize('groups, cost', [('channels', 'flops'), ('channels', 'weights'), ('', 'weights')])
def test_a_run_shows_its_widths_if_it_has_some(groups, cost, tmp_path):
    "In report.html beside what is left of its cost; a run of single weights as before"
    fit(Config(groups=groups, cost=cost, sparsity=.6, dense_epochs=1, prune_epochs=3, regrow_epochs=2, batch_size=500),
        tmp_path, progress=False)
    page, s = report(tmp_path).read_text(), json.loads((tmp_path/'summary.json').read_text())
    assert ('Widths, before and after' in page) == bool(groups)
    assert page.count('<svg') == 5 + bool(groups)
    if groups:
        c = s['cost']
        assert f"of {c['whole']:,.0f} {cost} left, {c['asked']:,.0f} asked" in page
        assert f"<b>{c['left']:,.0f}</b>" in page
    assert page.count('weights left') == 1
