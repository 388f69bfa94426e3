"What every benchmark needs: interleaved timing, peak memory, statistics, and a record that says where it comes from."
import gc, json, multiprocessing, os, random, re, statistics, subprocess, time
from pathlib import Path

import torch

from hyperflux.helpers import atomic, format_table, origin

root = Path(__file__).parents[1]


# Where a number comes from

def git_commit():
    "The commit that ran, with '+' if the package or the benchmarks differ from it; None outside of git"
    git = lambda *a: subprocess.run(['git', *a], cwd=root, text=True, capture_output=True, check=True).stdout.strip()
    changed = 'status', '--porcelain', '--untracked-files=no', '--', 'hyperflux', 'benchmarks'
    try: return git('rev-parse', 'HEAD') + '+'*bool(git(*changed))
    except (OSError, subprocess.CalledProcessError): return None


def provenance(
    command:str, # The line that repeats the benchmark
)->dict:
    "The head of a record"
    made, gpu = origin(), torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    hardware = dict(cpu=made['hardware'], cores=cores, threads=torch.get_num_threads(), gpu=gpu,
                    load_before=os.getloadavg()[0] if hasattr(os, 'getloadavg') else None)
    return dict(command=command, date=made['date'], commit=git_commit(), torch=made['torch'], python=made['python'],
                hardware=hardware)


def write_json(
    record:dict,
    path, # Its folder is made
):
    "A record as JSON, one row of a list per line, so that two of them compare well"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    def written(v):
        if not isinstance(v, list) or not v: return json.dumps(v)
        return '[\n    ' + ',\n    '.join(map(json.dumps, v)) + ']'
    body = ',\n'.join(f'  {json.dumps(k)}: {written(v)}' for k, v in record.items())
    with atomic(path, 'w') as f: f.write('{\n' + body + '\n}\n')   # a record is whole, also when the program is stopped


def spelled(
    command:str, # The program
    argv:list, # What was asked of it
)->str:
    "The command line for a record: absolute paths, which mean something on one machine only, as PATH"
    return ' '.join([command, *(re.sub(r'(^|=)/.*', r'\1PATH', a) for a in argv)])


def resume(
    path, # Of the record, there or not
    record:dict, # A fresh head; its lists are filled with what is there
    same:tuple, # Names of fields that must agree
)->dict: # `record`; ValueError if the one that is there is of another origin
    "Goes on with a record that is there"
    if not path or not Path(path).exists(): return record
    old, new = json.loads(Path(path).read_text(encoding='utf-8')), json.loads(json.dumps(record))
    def fields(r):
        flat = {k: r.get(k) for k in ('benchmark', 'smoke', 'commit', 'torch', *same)}
        flat['gpu'] = r.get('hardware', {}).get('gpu')
        parts = [(k, v if isinstance(v, dict) else {'': v}) for k, v in flat.items()]
        return {f'{k} {j}'.strip(): x for k, v in parts for j, x in v.items()}
    was, now = fields(old), fields(new)
    differ = [f'{k} {was.get(k)!r} there, {now.get(k)!r} here' for k in was | now if was.get(k) != now.get(k)]
    if differ:
        raise ValueError(f"{path} holds a record of another origin ({'; '.join(differ)}): "
                         "--fresh begins anew, another --out keeps both")
    lines = [*old['command'].split('; '), record['command']]
    there = {k: old[k] for k, v in record.items() if isinstance(v, list) and k in old}
    return record | dict(command='; '.join(dict.fromkeys(lines))) | there


def stats(
    xs:list[float],
)->dict: # n, median, q1, q3, mean, std
    "What a list of times says"
    q1, median, q3 = statistics.quantiles(xs, n=4, method='inclusive') if len(xs) > 1 else xs*3
    std = statistics.stdev(xs) if len(xs) > 1 else 0.
    return dict(n=len(xs), median=median, q1=q1, q3=q3, mean=statistics.fmean(xs), std=std)


def table(
    head:tuple, # Column titles
    rows:list[tuple], # Strings
    left:int=2, # How many columns, from the first, are words
)->str:
    "Aligned text"
    return format_table(head, rows, left)


# Time

def _burst(step, batches, device):
    "Milliseconds of each step but the first, which only warms caches"
    if device.type == 'cuda':           # events: a step's launches overlap the work of the one before, as in training
        marks = [torch.cuda.Event(enable_timing=True) for _ in batches]
        for b, mark in zip(batches, marks): step(*b), mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]
    times = [time.perf_counter_ns()]
    for b in batches:
        step(*b)
        times.append(time.perf_counter_ns())
    return [(b - a)/1e6 for a, b in zip(times[1:], times[2:])]


def interleave(
    steps:dict, # Name → function of a batch, one training step
    batch, # Makes a fresh batch
    device:torch.device,
    rounds:int, # In each, every function has its turn, in random order
    burst:int, # Timed steps in a turn
    warmup:int, # Untimed steps of each before all
)->dict: # Name → one list of milliseconds per round
    "Times of several functions under the same drift: short turns, in a round the same batches for all"
    order, rng, times = list(steps), random.Random(0), {k: [] for k in steps}
    for step in steps.values():
        for _ in range(warmup): step(*batch())
    collect = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            batches = [batch() for _ in range(burst + 1)]
            rng.shuffle(order)
            for k in order: times[k].append(_burst(steps[k], batches, device))
            gc.collect()
    finally:
        if collect: gc.enable()
    return times


def ratios(
    rounds:list, # Of `interleave`
    baseline:list, # The same of what to compare with
)->dict: # median, q1, q3
    "Median step over the baseline's in the same round: what drifts from round to round cancels"
    s = stats([statistics.median(a)/statistics.median(b) for a, b in zip(rounds, baseline)])
    return {k: s[k] for k in ('median', 'q1', 'q3')}


def differences(
    rounds:list, # Of `interleave`
    baseline:list, # The same of what to compare with
)->dict: # median, q1, q3, in milliseconds
    "Median step minus the baseline's in the same round"
    s = stats([statistics.median(a) - statistics.median(b) for a, b in zip(rounds, baseline)])
    return {k: s[k] for k in ('median', 'q1', 'q3')}


# Memory

def _resident(field):
    "A line of /proc/self/status in bytes; None where there is no such file"
    try: text = Path('/proc/self/status').read_text()
    except OSError: return None
    return next((int(o.split()[1])*1024 for o in text.splitlines() if o.startswith(field + ':')), None)


def fresh_process(
    modules:list[str], # Imported once by the server from which the processes are forked
):
    "A context whose every process starts from the same small memory, and gives what it frees back at once"
    if 'forkserver' not in multiprocessing.get_all_start_methods(): return multiprocessing.get_context('spawn')
    from multiprocessing.forkserver import ensure_running
    context = multiprocessing.get_context('forkserver')
    freeing = dict.fromkeys(('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'), '65536')
    context.set_forkserver_preload(modules)
    os.environ.update(freeing)                                          # read by glibc at the start of a program
    ensure_running()
    for k in freeing: del os.environ[k]                                 # all other programs would only be slower
    return context


def peak(
    make, # Builds everything and returns a function that takes one training step
    device:torch.device,
    n:int=10, # Steps
)->int|None: # Bytes; None where the system does not tell
    "Most memory in use during `n` steps above what was before: allocated on CUDA, resident on the CPU"
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make()
        for _ in range(n): step()
        return torch.cuda.max_memory_allocated() - before
    before = _resident('VmRSS')
    if before is None: return None
    try: Path('/proc/self/clear_refs').write_text('5')              # forget earlier peaks, such as that of an import
    except OSError: pass
    step = make()
    for _ in range(n): step()
    return _resident('VmHWM') - before
