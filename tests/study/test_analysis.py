"""What a notebook cell cannot test of the analysis: families that are killed, a recorder's price, a page in a browser
without a network."""
import json, re, shutil, subprocess, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyperflux import Hyperflux
from hyperflux.core.settings import Settings
from hyperflux.study.recorder import MaskLog, Recorder, Returns
from hyperflux.study.jobs import Job, run_jobs
from benchmarks.common import fresh_process
from tests.helpers import PRELOAD, Runner, program, until


def watched(compile=False, every=1, **kw):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    p = Hyperflux(net, opt, pressure=.5, steps=200, settings=Settings(travel=3.), compile=compile, **kw)
    return net, opt, p, Recorder(p, 50, every), MaskLog(p, 20)


def train(net, opt, steps):
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 10, generator=g)
        opt.zero_grad(); F.cross_entropy(net(x), x[:, :3].argmax(1)).backward(); opt.step()


def test_watching_changes_nothing():
    "The same run, with and without recorder, masks and returns, to the last bit"
    nets = []
    for watch in (False, True):
        net, opt, p, recorder, log = watched()
        if not watch: recorder.close(); log.close()
        train(net, opt, 60)
        if watch: Returns(p)
        train(net, opt, 140)
        nets.append([t.clone() for t in net.parameters()] + [p.presence])
    assert all(torch.equal(a, b) for a, b in zip(*nets))


def test_compiled_flux_is_the_same():
    "The fused update leaves the pull as it was, the eager one does not: the recorder looks before either"
    traces = []
    for compile in (False, True):
        net, opt, p, recorder, _ = watched(compile)
        train(net, opt, 40)
        traces.append(recorder.trace())
    np.testing.assert_allclose(traces[0].flux, traces[1].flux, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(traces[0].presence, traces[1].presence, rtol=1e-3, atol=1e-5)


def test_trace_agrees_with_meter_and_masks():
    "Births and deaths as the meter counts them, presence as the masks say"
    net, opt, p, recorder, log = watched(meter=True)
    train(net, opt, 150)                                                      # the last steps of regrowth
    t = recorder.trace()
    at = [i for i, s in enumerate(t.step) if s in log.steps]
    masks = dict(zip(log.steps, log.masks))
    assert len(at) >= 7 and all((t.present[i] == masks[t.step[i]][t.places]).all() for i in at)
    # seen before the last step; the meter after it
    last = t.present[-1]
    now = (p.mask[torch.as_tensor(t.places)] > 0).numpy()
    assert (t.births + (now & ~last) == p.meter.births[t.places].numpy()).all()
    assert (t.deaths + (~now & last) == p.meter.deaths[t.places].numpy()).all()


def test_recorder_stops_with_the_topology_and_skips():
    net, opt, p, recorder, _ = watched(every=7)
    train(net, opt, 200)
    t = recorder.trace()
    assert (t.step == np.arange(0, 150, 7)).all() and p.stage == 'done' and (t.theta[~t.present] == 0).all()
    with pytest.raises(ValueError, match='the topology is fixed'): Returns(p)


def double(x): return dict(y=2*x)


def slow(x, marks): Path(marks, str(x)).touch(); time.sleep(.5); return dict(y=x)


@pytest.mark.parametrize('text', ['{"y": 1', '', 'null\x00'])
def test_a_broken_result_is_named(text, tmp_path):
    job = Job.of(double, 1)
    job.file(tmp_path).write_text(text)
    with pytest.raises(ValueError, match='remove it'): run_jobs([job], tmp_path)


def family(folder): # The results of four jobs, which are kept there
    return run_jobs([Job.of(slow, i, marks=str(folder)) for i in range(4)], folder/'out')


def test_a_killed_family_goes_on(tmp_path):
    "SIGKILL in the middle: what was finished is not done again"
    p = fresh_process(PRELOAD).Process(target=family, args=(tmp_path,))
    p.start()
    until(lambda: len(list((tmp_path/'out').glob('*.json'))) >= 2)
    p.kill(), p.join()
    done = {f: f.stat().st_mtime_ns for f in (tmp_path/'out').glob('*.json')}
    assert 2 <= len(done) < 4
    assert family(tmp_path) == [dict(y=i) for i in range(4)]
    assert all(f.stat().st_mtime_ns == t for f, t in done.items())


@pytest.mark.skipif(not shutil.which('chromium'), reason='no browser here')
def test_report_in_a_browser_without_a_network(tmp_path):
    "The page of a short run, drawn by a browser that can reach nothing: text, figures and table are there"
    run = Runner(tmp_path, picture=False)
    run('prune', '--epochs', '5', '--quiet', '--out', 'run')
    assert 'report.html' in run('report', 'run')
    page = subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu',
                          '--host-resolver-rules=MAP * ~NOTFOUND', '--virtual-time-budget=3000', '--dump-dom',
                          f'file://{tmp_path}/run/report.html'],
                          text=True, capture_output=True, timeout=120).stdout
    assert page.count('<svg') == 5 and '5,324' in page and '1.weight' in page and 'prune_epochs' in page
    assert not re.search(r'(?:src|href)="(?!#)', page)


# One of the five in the usual run: the others make their jobs otherwise, and keep and fit them in the same way
@pytest.mark.parametrize('what', ['bottleneck', *(pytest.param(o, marks=pytest.mark.long)
                                                  for o in ('law', 'conv', 'converge', 'reliability'))])
def test_programs_run(what, tmp_path):
    "Each record's program, in its shortest form"
    args = ['benchmarks.reliability'] if what == 'reliability' else ['benchmarks.law', what]
    code, text = program(*args, '--smoke', '--processes', 1, '--runs', tmp_path/'runs', '--out', tmp_path/'x')
    assert code == 0, text
    head = json.loads((tmp_path/'x.json').read_text())
    assert head['n'] and not head['failed'] and head['commit'] is not None and (tmp_path/'x_runs.csv').exists()
    assert (tmp_path/'x_curves.csv').exists()
