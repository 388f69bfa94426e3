"""Small files of networks: every bit comes back, whatever is not whole or was made to harm is refused; ONNX computes
what PyTorch does."""
import contextlib, copy, hashlib, json, math, os, random, subprocess, sys, time, tracemalloc, zlib

import numpy as np, pytest, torch
from torch import nn

from hyperflux import Hyperflux
from hyperflux.rivals.scores import Magnitude
from hyperflux.deploy.codes import DTYPES
from hyperflux.deploy.files import save_sparse, sealed
from hyperflux.deploy.loading import load_sparse, read_metadata
from hyperflux.deploy.onnx import export_onnx
from hyperflux.lab.models import MODELS, lenet300

torch.set_num_threads(1)


def raw_bytes(t): return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a, b):
    "Equal names, in their order, and equal tensors in every bit"
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
                                      and raw_bytes(a[k]) == raw_bytes(b[k]) for k in a)


def noise(dtype, shape, density, rng):
    "Any bits there are, NaNs and all; others are zero"
    n, k = math.prod(shape), DTYPES[dtype].itemsize
    bits = rng.integers(0, 2 if dtype == 'bool' else 256, (n, k), dtype=np.uint8)*(rng.random((n, 1)) < density)
    return torch.from_numpy(bits.astype(np.uint8).reshape(-1)).view(DTYPES[dtype]).reshape(shape)


class Tied(nn.Module):
    "A bit of everything"
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.a, self.b = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Linear(20, 20), nn.Linear(20,
            20, bias=False)
        self.b.weight = self.a.weight
        self.low = nn.Parameter(torch.randn(7, 5).bfloat16())
        more = dict(flags=torch.rand(3, 50) < .1, none=torch.zeros(0, 4), one=torch.tensor(-0.),
                    big=torch.zeros(30, 60))
        for name, t in more.items(): self.register_buffer(name, t)
        with torch.no_grad():
            self.a.weight[torch.rand(20, 20) < .8] = 0.
            self.big[3, 5], self.big[29, 59] = math.nan, -1.


@pytest.fixture
def tied():
    torch.manual_seed(0)
    return Tied()


# Whole files

@pytest.mark.parametrize('dtype', DTYPES)
def test_every_bit_comes_back(tmp_path, dtype):
    rng = np.random.default_rng(0)
    shapes = (), (1,), (0,), (3, 0, 2), (8,), (9,), (40, 30), (2, 3, 4, 5), (3, 13000)
    state = {f'{shape}.{density}': noise(dtype, shape, density, rng) for shape in shapes for density in (0, .003, .03,
        .3, .7, .99, 1)}
    saved = save_sparse(state, tmp_path/'x')
    assert same(load_sparse(tmp_path/'x'), state)
    assert saved.bytes == (tmp_path/'x').stat().st_size == sum(after for _, after in saved.parts.values())
    assert {'dense', 'mask', 'gaps'} <= set(saved.ways.values())


def test_views_transposes_and_gradients(tmp_path):
    base = torch.randn(6, 8, requires_grad=True)
    state = dict(t=base.t(), part=base[1:3, ::2], wide=torch.randn(3, 1).expand(3, 4), plain=base)
    save_sparse(state, tmp_path/'x')
    back = load_sparse(tmp_path/'x')
    assert same(back, state) and not any(v.requires_grad for v in back.values())
    assert len({v.data_ptr() for v in back.values()}) == 4                        # of other shapes or strides: not tied


def test_tied_weights_stay_tied(tmp_path, tied):
    saved = save_sparse(tied, tmp_path/'x')
    assert saved.ways['b.weight'] == 'tied'
    back, new = load_sparse(tmp_path/'x'), Tied()
    assert back['b.weight'] is back['a.weight'] and load_sparse(tmp_path/'x', new) is new
    assert new.b.weight is new.a.weight and same(new.state_dict(), tied.state_dict()) and same(back, tied.state_dict())


def test_the_same_bytes_in_every_process(tmp_path):
    program = ('import sys, torch; from hyperflux.deploy.files import save_sparse; torch.manual_seed(0); '
               'net = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30)); '
               'torch.nn.init.sparse_(net[0].weight, .9); save_sparse(net, sys.argv[1], dict(z=1, a=[2, dict(b=3)]))')
    for seed in '1', '2':
        subprocess.run([sys.executable, '-c', program, tmp_path/seed], check=True,
                       env=os.environ | dict(PYTHONHASHSEED=seed), timeout=60)
    assert (tmp_path/'1').read_bytes() == (tmp_path/'2').read_bytes()
    about = read_metadata(tmp_path/'1')
    assert (about['architecture'], about['z'], about['a']) == ('Sequential', 1, [2, dict(b=3)])
    assert about['sparsity'] == pytest.approx(.9, abs=.001)


def test_after_pruning_in_training(tmp_path):
    torch.manual_seed(0)
    net = lenet300()
    optimizer = torch.optim.Adam(net.parameters())
    pruner = Hyperflux(net, optimizer, sparsity=.95, steps=120)
    for _ in range(120):
        optimizer.zero_grad(); net(torch.randn(8, 1, 28, 28)).square().mean().backward(); optimizer.step()
    exact, plain = save_sparse(net, tmp_path/'exact'), save_sparse(net, tmp_path/'plain', plain_zeros=True)
    assert exact.bytes == plain.bytes and exact.negative_zeros == 0                             # a pruner leaves +0
    # as a mask times a negative weight would
    with torch.no_grad(): net[1].weight[net[1].weight == 0] = -0.
    exact, plain = save_sparse(net, tmp_path/'exact'), save_sparse(net, tmp_path/'plain', plain_zeros=True)
    assert same(load_sparse(tmp_path/'exact', lenet300()).state_dict(), net.state_dict())
    back, x = load_sparse(tmp_path/'plain', lenet300()), torch.randn(5, 1, 28, 28)
    assert torch.equal(back(x), net(x))
    assert sum(int((p.view(torch.int32) != 0).sum()) for p in back.parameters() if p.ndim == 2) == pruner.keep
    assert plain.share < .06 and plain.bytes < exact.bytes and 'plain_zeros=True' in str(exact)
    assert 'plain_zeros' not in str(plain)


def test_compiled_and_on_another_type(tmp_path):
    net = lenet300()
    save_sparse(torch.compile(net), tmp_path/'x')
    other = lenet300()
    load_sparse(tmp_path/'x', torch.compile(other))
    assert same(other.state_dict(), net.state_dict())


@pytest.mark.parametrize('what, says', [
    (dict(x=torch.zeros(3).to_sparse()), 'x is no plain tensor'), (dict(x=torch.zeros(3, device='meta')),
                                                                   'x is no plain tensor'),
    (nn.LazyLinear(3), 'weight is no plain tensor'), (dict(x=[1]), 'x is of type list, and only tensors'),
    (dict(x=torch.zeros(3, dtype=torch.complex64)), 'x is of torch.complex64; a file can hold')])
def test_what_cannot_be_saved(tmp_path, what, says):
    (tmp_path/'x').write_bytes(b'old')
    with pytest.raises(ValueError, match=says): save_sparse(what, tmp_path/'x')
    assert (tmp_path/'x').read_bytes() == b'old' and len([*tmp_path.iterdir()]) == 1


def test_metadata_and_places_that_cannot_be(tmp_path):
    net = nn.Linear(2, 2)
    for bad in dict(x=object()), {(1, 2): 3}:
        with pytest.raises(ValueError, match='metadata is numbers, strings, lists and dicts'):
            save_sparse(net, tmp_path/'x', bad)
    with pytest.raises(ValueError, match='and a file has room for 8,388,608: give less metadata'):
        save_sparse(net, tmp_path/'x', dict(x='x'*9_000_000))
    with pytest.raises(OSError, match='cannot write .*none'): save_sparse(net, tmp_path/'none'/'x')
    with pytest.raises(TypeError, match='a model or its state_dict'): save_sparse(3, tmp_path/'x')
    for load in load_sparse, read_metadata:
        with pytest.raises(FileNotFoundError, match='give the path of one that save_sparse wrote'): load(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_another_network(tmp_path, tied):
    save_sparse(tied, tmp_path/'x')
    class More(Tied):
        def __init__(self):
            super().__init__(); self.more, self.conv = nn.Linear(2, 2), nn.Conv2d(2, 6, 5); del self.flags
    differs = (r"\(Tied\) does not fit this More: conv.weight is float32 \(6, 2, 3, 3\), the model's "
               r"float32 \(6, 2, 5, 5\); the model has no flags; "
               "the file has no more.weight; the file has no more.bias; make the model as it was")
    for net, says in ((More(), differs), (Tied().half(), r"float32 .*the model's float16 .* more; make"),
                      (Tied().to('meta'), 'without values'), (nn.Linear(1, 1), 'the model has no')):
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match=says): load_sparse(tmp_path/'x', net)
        assert all(v.is_meta for v in before.values()) or same(net.state_dict(), before)


# Broken and hostile files

def unseal(data): return zlib.decompress(data[56:])
def reseal(raw): payload = zlib.compress(raw, 1); return sealed(len(raw), payload)


def table(raw):
    "The safetensors header as objects, and the bytes that follow"
    n = int.from_bytes(raw[:8], 'little')
    entries = json.loads(raw[8:8 + n])
    return entries, json.loads(entries['__metadata__']['hyperflux']), raw[8 + n:]


def with_table(entries, known, data):
    entries['__metadata__']['hyperflux'] = json.dumps(known)
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, 'little') + head + data


def accident(whole, rng):
    "What wires, disks and people do to a file"
    b, n = bytearray(whole), len(whole)
    i, j = sorted((rng.randrange(n), rng.randrange(n)))
    kind = rng.randrange(8)
    if kind == 0: return whole[:i]
    if kind == 1: return whole[:rng.randrange(70)]
    if kind == 2: b[i] ^= 1 << rng.randrange(8)
    if kind == 3: b[rng.randrange(56)] = rng.randrange(256)
    if kind == 4: b[i:j] = bytes(j - i)
    if kind == 5: del b[i:min(j, i + 9)]
    if kind == 6: b[i:i] = rng.randbytes(rng.randrange(1, 60))
    if kind == 7: return whole[j:] + whole[i:j] + whole[:i]
    return bytes(b)


def mangle(raw, rng):
    "Bits, bytes and ends of what was unpacked"
    b = bytearray(raw)
    i = rng.randrange(len(b)) if rng.random() < .5 else rng.randrange(8 + int.from_bytes(raw[:8], 'little'))
    kind = rng.randrange(6)
    if kind <= 1: b[i] ^= 1 << rng.randrange(8)
    if kind == 2: b[i] = rng.choice(b'0123456789,"[]{}-e. \0\xff')
    if kind == 3: del b[i:i + rng.randrange(1, 12)]
    if kind == 4:
        b[i:i] = rng.choice([b'0', b'9'*40, b'[', b'"', b'-', b'[]'*500, b'1e999,', b'null', rng.randbytes(9)])
    if kind == 5: return bytes(b[:i])
    return bytes(b)


ODD = [-1, 0, 1, 2, 7, 3.5, True, None, '', 'x', 'float32', 'bool', 'float64', 'mask', 'gaps', 'dense', [], [0],
       [2**31], [-1, -1], [2**62, 4], [10**300],
       2**31, 2**63, 2**64, 10**400, float('nan'), float('inf'), {}, [1]*65, [[1]], '\ud800', [True, 3], [0, 2**40],
       [1.0, 2]]


def disguise(raw, rng):
    "A table that says something else, correctly written"
    entries, known, data = table(raw)
    rows = known['tensors']
    for _ in range(rng.choice((1, 1, 2, 4))):
        odd, row = copy.deepcopy(rng.choice(ODD)), rng.choice(rows)
        kind = rng.randrange(10)
        if kind <= 2 and isinstance(row, list) and row: row[rng.randrange(len(row))] = odd
        if kind == 3 and isinstance(row, list) and len(row) == 5 and isinstance(row[2], list) and row[2]:
            row[2][rng.randrange(len(row[2]))] = odd
        if kind == 4: rows[rng.randrange(len(rows))] = odd
        if kind == 5: rows.insert(rng.randrange(len(rows)), copy.deepcopy(row))
        if kind == 6 and len(rows) > 1: rows.remove(row)
        if kind == 7:
            entries[rng.choice([k for k in entries if k != '__metadata__'])][rng.choice(('dtype', 'shape',
                'data_offsets'))] = odd
        if kind == 8:
            known[rng.choice(('tensors', 'about'))] = odd
            if not (isinstance(known['tensors'], list) and known['tensors']): break
            rows = known['tensors']
        if kind == 9:
            rows[rng.randrange(len(rows))], rows[rng.randrange(len(rows))] = row, rows[rng.randrange(len(rows))]
    return with_table(entries, known, data)


@pytest.fixture
def small_steps():
    "No mutation may take seconds or much memory: fails afterwards, naming what was used"
    tracemalloc.start()
    began = time.perf_counter()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6 and time.perf_counter() - began < 60


def attempt(path, data, **how):
    "What comes of it: the tensors, or None if they are refused, clearly and by us"
    path.write_bytes(data)
    try: return load_sparse(path, **how)
    except (ValueError, OSError) as e:
        assert str(e).startswith(str(path)) and len(str(e)) < 2000, e
        return None


def test_accidents_are_refused(tmp_path, tied, small_steps):
    "Every bit of the head, and 1,000 random mutations: only what is equal to the file loads"
    save_sparse(tied, tmp_path/'x', dict(recipe='short'))
    whole, rng, equal = (tmp_path/'x').read_bytes(), random.Random(0), 0
    flips = [whole[:i] + bytes([whole[i] ^ 1 << k]) + whole[i + 1:] for i in range(56) for k in range(8)]
    for data in flips + [accident(whole, rng) for _ in range(1000)]:
        got = attempt(tmp_path/'y', data)
        equal += data == whole
        assert got is None if data != whole else same(got, tied.state_dict())
    assert equal < 50
    for n in [*range(100), *range(100, len(whole), 9)]: assert attempt(tmp_path/'y', whole[:n]) is None


def test_hostile_files_with_a_right_checksum(tmp_path, tied, small_steps):
    """2,400 mutations below the checksum: refused, or tensors of the sizes in the table, no larger than the limit; a
    model takes all of it or nothing"""
    save_sparse(tied, tmp_path/'x', dict(recipe='short'))
    whole, rng, loaded, taken, limit = (tmp_path/'x').read_bytes(), random.Random(1), 0, 0, 1 << 20
    raw, net, own = unseal(whole), Tied(), copy.deepcopy(tied.state_dict())
    for i in range(2400):
        if i % 4 == 0:                                                     # the packed bytes themselves
            b = bytearray(whole[56:])
            b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
            data = sealed(rng.choice((len(raw), len(raw), rng.randrange(limit))), bytes(b))
        else: data = reseal(mangle(raw, rng) if i % 4 == 1 else disguise(raw, rng))
        got = attempt(tmp_path/'y', data, limit=limit)
        if got is None: continue
        loaded += 1
        entries, known, _ = table(unseal(data))
        assert list(got) == [row[0] for row in known['tensors']]
        assert sum(t.nbytes for t in {id(t): t for t in got.values()}.values()) <= limit
        for row in known['tensors']:
            if len(row) == 5: assert (str(got[row[0]].dtype), list(got[row[0]].shape)) == (f'torch.{row[1]}', row[2])
        save_sparse(got, tmp_path/'z')                                     # they are tensors like others
        assert same(load_sparse(tmp_path/'z'), got)
        load_state = copy.deepcopy(net.state_dict())
        if attempt(tmp_path/'y', data, model=net, limit=limit) is None: assert same(net.state_dict(), load_state)
        else:
            taken += 1
            assert same(net.state_dict(), {k: got[k] for k in own}) or got['a.weight'] is not got['b.weight']
        net.load_state_dict(own)
    # some are meant to load: the test can see both
    assert 50 < loaded < 1500 and taken > 20, (loaded, taken)


def crafted(rows, change=lambda entries: None, **streams):
    "A file with this table and these streams of bytes, given as numbers; `change` may then spoil the entries"
    at, data = 0, {k: np.array(v, np.uint8) for k, v in sorted(streams.items())}
    entries = dict(__metadata__={})
    for k, v in data.items(): entries[k] = dict(dtype='U8', shape=list(v.shape), data_offsets=[at, at := at + v.size])
    change(entries)
    return reseal(with_table(entries, dict(about={}, tensors=rows), b''.join(v.tobytes() for v in data.values())))


def test_bombs(tmp_path, small_steps):
    "Sizes that are lies, at the default limit of 8 GiB"
    path, bomb = tmp_path/'x', zlib.compress(bytes(50_000_000))
    for size in 0, 100, 10_000_000, 2**33 + 1, 2**63, 2**64 - 1: assert attempt(path, sealed(size, bomb)) is None
    none = dict(float32=np.zeros((4, 0)), gaps=np.zeros((4, 0)))
    assert attempt(path, crafted([['w', 'float32', [9, 9], 'gaps', 0]], **none))['w'].shape == (9, 9)
    for shape in [2**31, 2**31], [2**61], [2**40, 0], [2**31 + 1]:
        path.write_bytes(crafted([['w', 'float32', shape, 'gaps', 0]], **none))
        with pytest.raises(ValueError,
                           match='asks for more than the limit of 8,589,934,592 bytes of dense weights by tensor 0: '
                                  'if you trust it'):
            load_sparse(path)
    path.write_bytes(crafted([[f'w{i}', 'float32', [25], 'gaps', 0] for i in range(11)], **none))
    with pytest.raises(ValueError, match='by tensor 10'): load_sparse(path, limit=1000)
    for head in b'['*8_000_000, b'[[],'*2_000_000, b'{"a":'*100_000, b'9'*1_000_000:
        assert attempt(path, reseal(len(head).to_bytes(8, 'little') + head)) is None
    many = np.full((4, 5000), 255)                                         # gaps whose sum might come back around
    assert attempt(path, crafted([['w', 'int8', [8000], 'gaps', 5000]], gaps=many, int8=many[:1])) is None


def test_tables_that_nearly_fit(tmp_path):
    "Each of the last checks alone: the same file without the fault loads"
    path, one = tmp_path/'x', np.array([[0], [0], [0], [127]])
    def gap(n): return dict(float32=one, gaps=[[n], [0], [0], [0]])
    def spoil(k, v): return lambda entries: entries['float32'].update({k: v})
    masked, gapped, alone, truth = ([['w', 'float32', [2, 2], 'mask', 1]], [['w', 'float32', [2, 2], 'gaps', 1]],
                                    [['w', 'float32', [], 'dense', 1]], [['w', 'bool', [], 'dense', 1]])
    good = crafted(masked, float32=one, mask=[[32]]), crafted(gapped, **gap(2)), crafted(alone,
        float32=one), crafted(truth, bool=[[2]])
    assert [attempt(path, g)['w'].tolist() for g in good] == [[[0, 0], [1, 0]], [[0, 0], [1, 0]], 1, True]
    for bad, says in ((crafted(masked, float32=one, mask=[[48]]), 'a mask that does not mark 1 of 4'),
                      (crafted(masked, float32=one, mask=[[8]]), 'a mask that does not mark 1 of 4'),
                      (crafted(gapped, **gap(4)), 'gaps that lead out of tensor 0'),
                      (crafted(truth, bool=[[1]]), 'neither true nor false'),
                      (crafted(alone, spoil('dtype', 'F32'), float32=one), 'streams of other sizes'),
                      (crafted(alone, spoil('data_offsets', [0, 5]), float32=one), 'streams of other sizes'),
                      (crafted(alone, float32=one, more=[[1]]), 'streams of other sizes'),
                      (crafted(alone, float32=np.zeros((4, 2))), 'streams of other sizes')):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=says): load_sparse(path)


def test_nothing_is_run(tmp_path):
    "A pickle in the place of a file, and in its metadata, stays what it is: bytes"
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/owned',)
    torch.save(dict(x=Evil()), tmp_path/'x')
    assert attempt(tmp_path/'x', (tmp_path/'x').read_bytes()) is None
    save_sparse(nn.Linear(2, 2), tmp_path/'x', dict(note="__import__('os').system('false')"))
    load_sparse(tmp_path/'x')
    assert read_metadata(tmp_path/'x')['note'].startswith('__import__') and not (tmp_path/'owned').exists()


# ONNX

onnx = pytest.mark.skipif(not all(map(__import__('importlib').util.find_spec, ('onnx', 'onnxscript', 'onnxruntime'))),
                          reason="pip install 'hyperflux[deploy]'")


def run_onnx(path, *inputs):
    import onnxruntime
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(o) for o in session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(),
        inputs)})]


def close(a, b): return ((a - b).abs().max()/a.abs().max()).item() < 1e-4


LARGE = 'resnet50', 'deit_t', 'deit_s', 'vgg19', 'vgg_like'                      # the usual run has the others


@onnx
@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.long) if n in LARGE else n
                                  for n in MODELS])
def test_the_zoo(tmp_path, capfd, name):
    "Each network, pruned to 90 %: as a small file, exact; in ONNX Runtime, equal for batches it was not exported with"
    import onnx as reader
    torch.manual_seed(0)
    shape = (1, 28, 28) if name.startswith('lenet') else (3, 32, 32)
    net = MODELS[name](in_shape=shape)
    with torch.no_grad(): net(torch.randn(4, *shape))                      # batch norm has seen something
    pruner = Magnitude(net, torch.optim.SGD(net.parameters(), .1), sparsity=.9, steps=1)
    pruner.start()
    assert pruner.left == pruner.keep
    saved = save_sparse(net, tmp_path/'x', plain_zeros=True)
    assert saved.share < .115
    again = load_sparse(tmp_path/'x', MODELS[name](in_shape=shape)).eval()
    net.train()
    told = export_onnx(net, torch.randn(2, *shape), tmp_path/'x.onnx')
    assert all(m.training for m in net.modules()) and told['batch'] is None and told['error'] < 1e-4
    # weights inside
    assert capfd.readouterr() == ('', '') and sorted(p.name for p in tmp_path.iterdir()) == ['x', 'x.onnx']
    x = torch.randn(3, *shape)
    with torch.no_grad(): want = net.eval()(x)
    (got,), (one,) = run_onnx(tmp_path/'x.onnx', x), run_onnx(tmp_path/'x.onnx', x[:1])
    assert close(want, got) and close(want[:1], one)
    with torch.no_grad(): assert torch.equal(again(x), want)
    weights = [reader.numpy_helper.to_array(t) for t in reader.load(tmp_path/'x.onnx').graph.initializer]
    assert sum((w == 0).sum() for w in weights) >= pruner.d - pruner.keep


class Two(nn.Module):
    "Words and numbers in, several things out"
    def __init__(self):
        super().__init__(); self.embed, self.out, self.drop = nn.Embedding(11, 6), nn.Linear(9, 4), nn.Dropout(.5)
    def forward(self, words, x):
        y = self.out(torch.cat([self.drop(self.embed(words).mean(1)), x], 1))
        return dict(logits=y, parts=(y.argmax(1), y[:, :2]))


@onnx
def test_several_inputs_and_modes(tmp_path):
    net = Two()
    net.out.eval()
    for n in 1, 4:
        told = export_onnx(net, (torch.randint(11, (n, 5)), torch.randn(n, 3)), tmp_path/'x')
        assert told['batch'] is None and told['error'] < 1e-5 and told['bytes'] == (tmp_path/'x').stat().st_size
    assert net.training and net.drop.training and not net.out.training
    words, x = torch.randint(11, (7, 5)), torch.randn(7, 3)
    assert close(net.eval()(words, x)['logits'], run_onnx(tmp_path/'x', words, x)[0])


class Branches(nn.Linear):
    def forward(self, x): return super().forward(x)*(2 if x.sum() > 0 else 1)


class Picky(nn.Linear):
    def forward(self, x): return super().forward(x).reshape(4, -1)


@onnx
def test_what_cannot_be_exported(tmp_path, capfd):
    told = export_onnx(Picky(3, 3), torch.ones(4, 3), tmp_path/'x')
    assert told['batch'] == 4 and told['why']
    (tmp_path/'x').write_bytes(b'old')
    net = lenet300()
    images = torch.randn(2, 1, 28, 28)
    for model, example, says, how in ((Branches(3, 3), torch.ones(4, 3),
                                       'Branches was not exported, nothing is written: ', {}),
                                      (net, images, "ONNX Runtime's outputs differ from PyTorch's by", dict(tol=0.)),
                                      (net, torch.ones(2, 3), 'Sequential was not exported', {}),
                                      (net, [torch.ones(1)], 'the example is a batch, or a tuple of them: got list',
                                       {}),
                                      (net, (), 'got nothing', {}),
                                      (net, torch.tensor(1.), r'got a tensor of shape \(\)', {})):
        with pytest.raises(ValueError, match=says): export_onnx(model, example, tmp_path/'x', **how)
    assert (tmp_path/'x').read_bytes() == b'old' and net.training and capfd.readouterr() == ('', '')
    with pytest.raises(OSError, match='cannot write'): export_onnx(net, images, tmp_path/'none'/'x')


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with contextlib.suppress(KeyError): monkeypatch.delitem(sys.modules, 'onnx')
    with pytest.raises(ImportError, match=r"pip install 'hyperflux\[deploy\]'"):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), tmp_path/'x')


def test_the_head_is_what_the_page_says(tmp_path):
    save_sparse(nn.Linear(2, 2), tmp_path/'x')
    b = (tmp_path/'x').read_bytes()
    assert b[:8] == b'hyflux\1\0' and int.from_bytes(b[16:24], 'little') == len(b) - 56
    assert int.from_bytes(b[8:16], 'little') == len(unseal(b))
    assert hashlib.sha256(b[:24] + b[56:]).digest() == b[24:56]
    import safetensors
    assert dict(safetensors.deserialize(unseal(b)))['float32']['shape'] == [4, 6]
