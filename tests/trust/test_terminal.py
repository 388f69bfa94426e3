"""What is printed, on every terminal and into files: signs fall back, files stay UTF-8, and a log has a line for each
epoch in place of a bar."""
import csv, io, json, os, re, subprocess, sys

import pytest, torch

from hyperflux.cli import main
from hyperflux.lab.progress import Lines, speak_plainly
from hyperflux.study.config import Config
from hyperflux.study.train import fit

COMMANDS = ['--help'], [], ['prune', '--help'], ['compare', '--help'], ['report', '--help'], ['deploy',
    '--help'], ['recipes', '--help'], ['methods', '--help'], ['methods']
EPOCHS, STEPS = 5, 79
PRUNE = 'prune', '--epochs', EPOCHS, '--threads', 1, '--out'


def says(encoding, *args, errors='strict'):
    "What the command writes on a terminal of this encoding, as text, and the code it ends with"
    streams, was, code = [io.TextIOWrapper(io.BytesIO(), encoding, errors) for _ in range(2)], (sys.stdout, sys.stderr,
        sys.argv, torch.get_num_threads()), 0
    sys.stdout, sys.stderr, sys.argv = *streams, ['hyperflux', *map(str, args)]
    try: main()
    except SystemExit as e: code = e.code or 0
    finally: sys.stdout, sys.stderr, sys.argv, threads = was; torch.set_num_threads(threads)
    for s in streams: s.flush()
    return ''.join(s.buffer.getvalue().decode(encoding, 'surrogateescape') for s in streams), code


@pytest.fixture(scope='module')
def logged(tmp_path_factory):
    "A run in the C locale, everything written into one file: its folder, and the file's bytes"
    cwd = tmp_path_factory.mktemp('log')
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')} | dict(LC_ALL='C', PYTHONUTF8='0',
        PYTHONCOERCECLOCALE='0', OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path))
    with open(cwd/'log', 'wb') as f:
        code = subprocess.run([sys.executable, '-m', 'hyperflux', *map(str, PRUNE), 'run'], cwd=cwd, env=env, stdout=f,
                              stderr=subprocess.STDOUT, timeout=120).returncode
    assert code == 0, (cwd/'log').read_bytes()
    return cwd/'run', (cwd/'log').read_bytes()


# Signs

@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'koi8-r', 'utf-8'])
@pytest.mark.parametrize('args', COMMANDS, ids=' '.join)
def test_help_and_lists_on_every_terminal(args, encoding):
    "Help is written, without escapes and without question marks for what has a name; in UTF-8 it is as ever"
    (text, code), usual = says(encoding, *args), says('utf-8', *args)[0]
    assert code == 0 and len(text.splitlines()) > 5
    assert '\\u' not in text and '\\x' not in text and text.count('?') == usual.count('?')
    if '×' in usual: assert ('×' if encoding in ('latin-1', 'cp1252', 'utf-8') else 'x') in text


def test_a_run_in_the_c_locale_starts_and_ends(logged):
    run, log = logged
    text = log.decode('ascii')                                                      # nothing but ASCII is there
    assert 'images 1x28x28' in text and '300x784' in text and '5,324 of 266,200' in text and 'Traceback' not in text


def test_files_are_utf8_whatever_the_terminal(logged):
    "Also those that the same locale writes into a run's folder"
    run, _ = logged
    assert says('ascii', 'report', run)[1] == 0
    text, code = says('ascii', 'deploy', run, '--batches', 1, '--threads', 1, '--no-compile', '--no-onnx', '--rounds',
                      1)
    assert code == 0 and 'compacting ...' in text and 'faster than dense' in text and not set('×…–') & set(text)
    for name in 'report.html', 'deploy/deploy.txt': assert '×' in (run/name).read_text(encoding='utf-8'), name
    for name in 'config.json', 'summary.json', 'deploy/deploy.json': json.loads((run/name).read_text(encoding='utf-8'))


@pytest.mark.parametrize('encoding, shape', [('ascii', '300x784'), ('latin-1', '300×784'), ('utf-8', '300×784')])
def test_a_finished_run_shown_again(logged, encoding, shape):
    text, code = says(encoding, *PRUNE, logged[0])
    assert code == 0 and 'This run is finished' in text and shape in text


@pytest.mark.skipif(sys.platform != 'linux', reason='names of files are bytes on Linux alone')
@pytest.mark.parametrize('encoding', ['ascii', 'utf-8'])
def test_a_folder_whose_name_is_no_text(logged, encoding, tmp_path):
    "Its bytes are written as they are"
    odd = tmp_path/'run-\udcff'
    os.symlink(logged[0], odd)
    text, code = says(encoding, *PRUNE, odd)
    assert code == 0 and text.rstrip().endswith('run-\udcff')


@pytest.mark.parametrize('args, why', [(['prune', '--sparsity', '98'], 'did you mean 0.98?'),
                                       (['prune', '--threads', '0'], 'threads is a whole number'),
                                       (['prune', '--model', 'lenét'], 'lenét'),
                                       (['deploy', 'nowhere'], 'no finished run'), (['compare', '--seeds', '0'],
        '--seeds says how many'), (['prune', '--save-steps', '0'], 'save_steps is a whole number')])
def test_errors_are_lines_on_an_ascii_terminal(args, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, message = says('ascii', *args)
    assert why in message and message.startswith('hyperflux: ')


@pytest.mark.parametrize('sign, ascii', [('×', 'x'), ('…', '...'), ('–', '-'), ('−', '-'), ('→', '->'), ('≤', '<='),
                                         ('±', '+/-'), ('λ', 'lambda'), ('γ', 'gamma'), ('Σ', 'sigma'), ('µ', 'u'),
                                         ('²', '^2'), ('ő', 'o'), ('½', '1/2'), ('字', '?'), ('e\u0302', 'e')])
def test_signs_and_what_stands_for_them(sign, ascii):
    stream = io.TextIOWrapper(io.BytesIO(), 'ascii')
    speak_plainly(stream)
    print(sign, end='', file=stream, flush=True)
    assert stream.buffer.getvalue() == ascii.encode()


def test_streams_of_others_are_left_alone():
    "A notebook's, a test's, and none at all, as in a program without a console"
    text = io.StringIO()
    speak_plainly(text, None)
    ignoring = io.TextIOWrapper(io.BytesIO(), 'utf-8')
    speak_plainly(ignoring)
    print('×λ', end='', file=ignoring, flush=True)
    assert ignoring.buffer.getvalue() == '×λ'.encode()


# Into a file

def test_a_log_has_a_line_for_each_epoch_and_no_bar(logged):
    "All that matters is in it, it agrees with the history, and it is short"
    run, log = logged
    text, rows = log.decode('ascii'), list(csv.DictReader(open(run/'history.csv', encoding='utf-8')))
    lines = [line for line in text.splitlines() if line.startswith('epoch ')]
    assert '\r' not in text and '#' not in text and len(lines) == len(rows) == EPOCHS
    assert max(map(len, text.splitlines())) < 200
    for i, (line, row) in enumerate(zip(lines, rows), 1):
        says = (f'epoch {i} of {EPOCHS}', row['stage'], f'step {STEPS*i} of {STEPS*EPOCHS}', 'images/s',
                f"loss {float(row['loss']):.3f}", f"accuracy {float(row['accuracy']):.2f}%")
        for part in says: assert part in line, (part, line)
        assert ('left' in line) == (i < EPOCHS)
        if row['stage'] != 'dense':
            assert f"density {float(row['density']):.2%}" in line and f"pressure {float(row['pressure']):.3g}" in line


def lines_of(epochs, seconds, steps=20):
    "The lines of a made-up run whose steps take so long"
    now, out = [0.], io.StringIO()
    lines = Lines(0, epochs*steps, epochs, out, clock=lambda: now[0])
    for e in range(1, epochs + 1):
        for i in range(1, steps + 1):
            now[0] += seconds
            lines.step(dict(epoch=e, epochs=epochs, stage='prune', step=(e - 1)*steps + i, steps=epochs*steps, loss=1.,
                            rate=1.))
        lines.epoch(dict(epoch=e, stage='prune' if e < epochs/2 else 'regrow', loss=1., accuracy=50.))
    return out.getvalue().splitlines()


@pytest.mark.parametrize('epochs', [1, 2, 30, 80, 81, 100, 101, 320, 1000])
def test_short_epochs_fill_no_page(epochs):
    """One line each, and of hundreds of epochs no more than fit on a page or two, the first of each stage and the last
    of all among them"""
    lines = lines_of(epochs, .01)
    assert lines[-1].startswith(f'epoch {epochs:,} of') and lines[0].startswith('epoch 1 of') and len(lines) <= 83
    assert len(lines) == epochs or epochs > 80
    assert any(line.startswith(f'epoch {-(-epochs//2)} ') for line in lines)


@pytest.mark.parametrize('epochs, seconds, least, most', [(3, 60., 60, 60), (3, 3600., 60, 60), (200, 10., 600, 800),
                                                          (2, 7., 4, 6)])
def test_long_epochs_say_something_every_minute(epochs, seconds, least, most):
    "But nothing twice: the last step of an epoch has the epoch's line"
    lines = lines_of(epochs, seconds)
    assert least <= len(lines) <= most and len(set(lines)) == len(lines)


SMALL = Config(dense_epochs=1, prune_epochs=2, regrow_epochs=0, sparsity=.5, batch_size=400)

ONE = Config(dense_epochs=0, prune_epochs=1, regrow_epochs=0, sparsity=.5, batch_size=200)


@pytest.fixture(scope='module')
def fashion():
    from hyperflux.lab.datasets import load_data
    return load_data('fashion-small')


def test_a_terminal_has_the_bar_as_ever(monkeypatch, fashion):
    master, slave = os.openpty()
    with open(slave, 'w', encoding='utf-8') as terminal:
        monkeypatch.setattr(sys, 'stdout', terminal)
        fit(ONE, data=fashion)
        monkeypatch.undo()
    text = os.read(master, 1 << 20).decode()
    assert '100.00% [50/50' in text and 'epoch 1, ' in text and 'images/s, density' in text and '\nepoch' not in text


def test_a_run_that_goes_on_counts_from_where_it_was(capsys, fashion, tmp_path):
    fit(SMALL, tmp_path/'run', data=fashion, until=1)
    first = capsys.readouterr().out.splitlines()
    fit(SMALL, tmp_path/'run', data=fashion, resume=True, until=2)
    second = capsys.readouterr().out.splitlines()
    assert [re.match(r'epoch (\d+) of 3, \w+, step (\d+) of 75', line).groups() for line in first
            + second] == [('1', '25'), ('2', '50')]
    fit(SMALL, data=fashion, until=1, progress=False)
    assert capsys.readouterr() == ('', '')


def test_the_main_job_fits_on_two_pages():
    "Its head has four lines, its table with the three layers of its network eighteen"
    epochs = Config().epochs
    assert epochs >= 30 and 4 + len(lines_of(epochs, .005)) + 18 < 120
