"""What is set for a whole process does not leak in: devices, dtypes, determinism, autograd modes, autocast, threads,
and whose numbers are given."""
import contextlib, io, math, threading
from fractions import Fraction

import numpy as np, pytest, torch
from torch.optim import SGD

from hyperflux import Hyperflux, Settings
from hyperflux.rivals.scores import GMP, Magnitude, Random
from hyperflux.rivals.imp import IMP
from hyperflux.rivals.l0 import L0

from tests.helpers import METHODS, Often, loss, mlp, nnz, said, train

make = dict(METHODS)
MAIN = ['Hyperflux', 'GMP', 'RigL', 'L0']
main = pytest.mark.parametrize('name', MAIN)
def length(name): return 120 if name == 'L0' else 40


@contextlib.contextmanager
def default(get, put, value):
    was = get()
    put(value)
    try: yield
    finally: put(was)


def default_dtype(dtype): return default(torch.get_default_dtype, torch.set_default_dtype, dtype)
def default_device(device): return default(lambda: None, torch.set_default_device, device)
@contextlib.contextmanager
def deterministic(): # PyTorch fills what is not initialised with NaN
    assert torch.utils.deterministic.fill_uninitialized_memory
    with default(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True): yield
@contextlib.contextmanager
def anomalies(): # of gradients, looked for
    with torch.autograd.set_detect_anomaly(True): yield
def matmul_precision(): return default(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, 'medium')
def no_future():
    return default(torch.__future__.get_swap_module_params_on_conversion,
                   torch.__future__.set_swap_module_params_on_conversion, True)


SETTINGS = {
    'default device meta': lambda: default_device('meta'), 'a with block of device meta': lambda: torch.device('meta'),
    'default dtype float64': lambda: default_dtype(torch.float64),
    'default dtype bfloat16': lambda: default_dtype(torch.bfloat16),
    'default dtype float16': lambda: default_dtype(torch.float16),
    'deterministic algorithms': deterministic, 'anomaly detection': anomalies, 'matmul precision': matmul_precision,
    'swapped parameters': no_future}


def run(name, around_all=contextlib.nullcontext, at_construction=contextlib.nullcontext,
        backward=contextlib.nullcontext, forward=contextlib.nullcontext, step=contextlib.nullcontext,
        look=contextlib.nullcontext, saved=None, dtype=torch.float32, model=None):
    "One run, with something set around some of it: mask, report, and weights at the end"
    model = (model or mlp()).to(dtype)
    opt = SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=1e-3)
    with around_all():
        with at_construction(): p = make[name](model, opt, .8, length(name))
        for i in range(p.steps):
            model.zero_grad()
            with forward(): l = loss(model)
            with backward(): l.backward()
            with step(): opt.step()
            if i % 10 == 5:
                with look():
                    assert str(p) and p.left == nnz(p) == p.layers()[-1]['left'] and p.density == p.left/p.d
                    p.apply_mask()
            if i == p.steps//2:
                with saved() if saved else contextlib.nullcontext():
                    state = p.state_dict()
                    if saved: p.load_state_dict({k: v.clone() if torch.is_tensor(v) else v for k, v in state.items()})
        assert nnz(p) == p.left and p.present == p.keep
        text = str(p)
    p.detach()
    return p.mask.clone(), [w.detach().clone() for w in model.parameters()], text


def quiet(*args, **kw):
    got = []
    texts = said(lambda: got.append(run(*args, **kw)))
    return got[0], texts


plain = {}
def as_ever(name):
    if name not in plain: plain[name] = quiet(name)
    return plain[name]


def same(a, b):
    ((mask, ws, text), said_a), ((mask2, vs, text2), said_b) = a, b
    return mask.dtype == mask2.dtype and torch.equal(mask, mask2) and all(map(torch.equal, ws,
        vs)) and text == text2 and said_a == said_b


@pytest.mark.parametrize('name', [*MAIN, 'IMP', 'Taylor', 'Random'])
@pytest.mark.parametrize('setting', list(SETTINGS))
def test_around_everything(setting, name):
    """Set before the pruner is made, and until its end: masks, weights, report and warnings are bit for bit those
    without it"""
    with_it = quiet(name, around_all=SETTINGS[setting])
    texts = [t for t in with_it[1] if 'nomaly' not in t]                        # PyTorch's own
    assert same((with_it[0], texts), as_ever(name))


@pytest.mark.parametrize('name', ['Hyperflux', 'GMP', 'RigL'])
@pytest.mark.parametrize('where', ['at_construction', 'step', 'look', 'saved'])
@pytest.mark.parametrize('setting', ['default device meta', 'default dtype float64', 'deterministic algorithms'])
def test_around_one_thing(setting, where, name):
    "Set only while the pruner is made, at steps, at looks, or while its state is saved and loaded"
    assert same(quiet(name, **{where: SETTINGS[setting]}), as_ever(name))


@main
@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize('where', ['at_construction', 'look', 'saved'])
def test_autograd_modes(where, mode, name):
    """Made, looked at, or saved and loaded where there are no gradients: as ever, and what was made there can be
    changed outside"""
    assert same(quiet(name, **{where: mode}), as_ever(name))


@pytest.mark.parametrize('name', ['Hyperflux', 'GMP', 'RigL', 'L0'])
@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_apply_mask_to_an_average_without_gradients(mode, name):
    "An average of weights gets its zeros in an evaluation, where there are no gradients"
    m, average = mlp(), mlp(1)
    o = SGD(m.parameters(), lr=.1)
    p = make[name](m, o, .8, length(name))
    said(train, m, o, p.steps)
    with mode(): p.apply_mask(average)
    for w, v in zip(p.params, (average[0].weight, average[2].weight)):
        assert torch.equal(w != 0, v != 0) or name in ('RigL', 'L0') and not (v[w != 0] == 0).any()


def autocast(): return torch.autocast('cpu', dtype=torch.bfloat16)


@main
@pytest.mark.parametrize('where', [['step'], ['look', 'saved', 'at_construction'], ['backward', 'step']], ids=' '.join)
def test_autocast(where, name):
    "Autocast belongs around the forward pass; around anything else of a step it changes nothing"
    plain_key = ('autocast', name)
    if plain_key not in plain: plain[plain_key] = quiet(name, forward=autocast)
    assert same(quiet(name, forward=autocast, **dict.fromkeys(where, autocast)), plain[plain_key])


@main
@pytest.mark.parametrize('dtype, setting', [(torch.float64, 'default dtype float16'),
                                            (torch.bfloat16, 'default dtype float64'),
                                            (torch.float64, 'default device meta')])
def test_a_model_of_another_dtype(dtype, setting, name):
    "The model's dtype counts, not the default one"
    assert same(quiet(name, around_all=SETTINGS[setting], dtype=dtype), quiet(name, dtype=dtype))


@main
def test_threads(name):
    """Two threads with a pruner each, made, driven and detached at the same time, end where one alone ends; so do their
    neighbours of another kind"""
    expected = {n: as_ever(n)[0] for n in (name, 'GMP')}
    got, failed, together = [], [], threading.Barrier(3)

    def work(n, model):
        together.wait()
        try: got.append((n, run(n, model=model)))
        except BaseException as e: failed.append(e)
    # made here: PyTorch's seed is everybody's
    threads = [threading.Thread(target=work, args=(n, mlp())) for n in (name, name, 'GMP')]

    def both():
        for t in threads: t.start()
        for t in threads: t.join()
    said(both)
    assert not failed and len(got) == 3
    for n, (mask, ws, text) in got:
        assert torch.equal(mask, expected[n][0]) and all(map(torch.equal, ws, expected[n][1]))
        assert text == expected[n][2]


def test_threads_that_come_and_go():
    "Many pruners are made and detached in several threads while another one trains: it is exact, and nobody fails"
    m = mlp()
    o = SGD(m.parameters(), lr=.1)
    p, failed = GMP(m, o, sparsity=.8, steps=40), []

    def churn(seed):
        try:
            for _ in range(15):
                model = mlp(seed)
                q = Magnitude(model, opt := SGD(model.parameters(), lr=.1), sparsity=.5, steps=10)
                train(model, opt, 2)
                assert nnz(q) == q.keep
                q.detach()
        except BaseException as e: failed.append(e)
    threads = [threading.Thread(target=churn, args=(i,)) for i in range(3)]

    def all_of_them():
        for t in threads: t.start()
        train(m, o, 40)
        for t in threads: t.join()
    said(all_of_them)
    assert not failed and nnz(p) == p.keep and p.step == 40


WHOLE = [np.int64(120), np.int32(120), np.uint8(120), np.float64(120.), np.float32(120.), np.array(120), np.array(120.),
         torch.tensor(120), torch.tensor(120, dtype=torch.uint8),
         torch.tensor(120.), torch.tensor(120., dtype=torch.float64), torch.tensor(120., dtype=torch.bfloat16)]
NO_STEPS = [120.5, np.float64(120.5), np.float32(120.5), torch.tensor(120.5), True, np.bool_(True), torch.tensor(True),
            '120', np.str_('120'), math.nan, np.float64('nan'), torch.tensor(math.nan),
            math.inf, np.float32('inf'), torch.tensor(math.inf), 0, -1, np.int64(0), torch.tensor(-5), None, [120],
            (120,), np.array([120]), torch.tensor([120]), 120 + 0j, b'120']
SHARES = [np.float32(.5), np.float64(.5), np.float16(.5), np.array(.5), torch.tensor(.5),
          torch.tensor(.5, dtype=torch.float64), torch.tensor(.5, dtype=torch.bfloat16), Fraction(1, 2)]
NO_SHARES = [1, 1., -.1, 1.5, 90, True, False, np.bool_(True), torch.tensor(True), '0.5', np.str_('.5'), math.nan,
             np.float32('nan'), torch.tensor(math.nan), math.inf, torch.tensor(1.),
             np.float64(1.), [.5], np.array([.5]), torch.tensor([.5]), .5 + 0j]
def shown(v): return f'{type(v).__module__}.{type(v).__name__} {v!r}'


@pytest.mark.parametrize('steps', WHOLE, ids=shown)
def test_steps_from_numpy_and_torch(steps):
    """Steps that are whole are steps, whoever counted them: every method goes the same way, and its state is of plain
    numbers"""
    for name, build in METHODS:
        m, o = (m := mlp()), SGD(m.parameters(), lr=.1)
        p = build(m, o, .8, steps)
        assert p.steps == 120 and type(p.steps) is int, name
        assert reloaded(p)['steps'] == 120, name
        p.detach()


@pytest.mark.parametrize('sparsity', SHARES, ids=shown)
def test_sparsities_from_numpy_and_torch(sparsity):
    "So are shares"
    for name, build in METHODS:
        m, o = (m := mlp()), SGD(m.parameters(), lr=.1)
        p = build(m, o, sparsity, 120)
        assert p.sparsity == .5 and type(p.sparsity) is float and p.keep == 384, name
        assert reloaded(p)['sparsity'] == .5, name
        p.detach()


def refused(value, **kw):
    "Every method refuses, with the value in its words, and leaves the weights to the next"
    for name, build in METHODS:
        m, o = (m := mlp()), SGD(m.parameters(), lr=.1)
        with pytest.raises((ValueError, TypeError)) as e: build(m, o, **dict(dict(sparsity=.5, steps=120), **kw))
        text = str(e.value)
        assert next(iter(kw)) in text or 'number in [0, 1)' in text or value is None, f'{name}: {text}'
        Magnitude(m, o, sparsity=.5, steps=10).detach()


@pytest.mark.parametrize('steps', NO_STEPS, ids=shown)
def test_steps_that_are_none(steps):
    "Halves, truths, words, lists, nothing, and what is not finite count no steps"
    refused(steps, steps=steps)


@pytest.mark.parametrize('sparsity', NO_SHARES, ids=shown)
def test_sparsities_that_are_none(sparsity):
    "Nor are they shares"
    refused(sparsity, sparsity=sparsity)


def reloaded(p):
    "Its state, saved and loaded as what has no code in it"
    torch.save(p.state_dict(), file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


COUNTS = dict(levels=lambda *a, n: IMP(*a, sparsity=.5, steps=n(40), levels=n(3), rewind=n(2)),
              updates=lambda *a, n: GMP(*a, sparsity=.5, steps=n(40), updates=n(5)),
              looks=lambda *a, n: Hyperflux(*a, sparsity=.5, steps=n(120), settings=Settings(updates=n(20))),
              seed=lambda *a, n: Hyperflux(*a, sparsity=.5, steps=n(120), seed=n(3)),
              seed_of_l0=lambda *a, n: L0(*a, sparsity=.5, steps=n(200), seed=n(3)),
              seed_of_random=lambda *a, n: Random(*a, sparsity=.5, steps=n(40), seed=n(3)))
PARTS = dict(span=lambda *a, n: GMP(*a, sparsity=.5, steps=40, span=(n(.25), n(.5))),
             span_of_rigl=lambda *a, n: Often(*a, sparsity=.5, steps=40, span=(n(0.), n(.75))),
             span_of_l0=lambda *a, n: L0(*a, sparsity=.5, steps=200, span=(n(0.), n(.75))),
             travel_of_l0=lambda *a, n: L0(*a, sparsity=.5, steps=200, travel=n(96.)),
             pressure=lambda *a, n: Hyperflux(*a, pressure=n(.5), steps=120),
             **{k: lambda *a, n, k=k, v=v: Hyperflux(*a, sparsity=.5, steps=120, settings=Settings(**{k: n(v)}))
                for k, v in dict(prune=.5, settle=.25, dip=.875, travel=48., lr=.0625, regrow_travel=.5,
                                 regrow_lr=.0625, regrow_decay=.5, low=.125, high=.375, slope=.25, eps=.5**30,
                                 temperature=.125).items()})


@pytest.mark.parametrize('number', [np.int64, np.uint8, np.array, torch.tensor], ids=['int64', 'uint8', 'array',
        'tensor'])
@pytest.mark.parametrize('what', list(COUNTS))
def test_counts_from_numpy_and_torch(what, number): same_with(COUNTS[what], int, number)


@pytest.mark.parametrize('number', [np.float32, np.float64, np.array, torch.tensor], ids=['float32', 'float64', 'array',
        'tensor'])
@pytest.mark.parametrize('what', list(PARTS))
def test_parts_and_rates_from_numpy_and_torch(what, number): same_with(PARTS[what], float, number)


def same_with(build, plain, number):
    "All other numbers too may be anyone's: the pruner begins as with Python's, and its state has Python's"
    states = []
    for n in plain, number:
        m = mlp()
        p = build(m, SGD(m.parameters(), lr=.1), n=n)
        states.append(reloaded(p))
        p.detach()
    a, b = states
    assert a.keys() == b.keys() and a['asked'] == b['asked'] and torch.equal(a['mask'], b['mask'])
    assert (a.get('presence') is None or torch.equal(a['presence'], b['presence']))
