"Where a step's time goes: its kernels in all, the parts of Hyperflux's work around the optimiser, and the longest kernels in them."
import time

import torch

from .step import parts_of, shares


def waiter(device): return torch.cuda.synchronize if device.type == 'cuda' else lambda: None


def kernels(work, device):
    "Runs `work` under torch's profiler: its value, and name → (calls, microseconds) of each kernel (on the CPU, of each operation)"
    cuda, wait = device.type == 'cuda', waiter(device)
    kinds = torch.profiler.ProfilerActivity
    wait()
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU]) as prof:
        out = work()
        wait()
    found = {}
    for e in prof.key_averages():
        # it covers kernels that count themselves
        if (e.device_type == torch.autograd.DeviceType.CUDA) != cuda or getattr(e, 'is_user_annotation', False):
            continue
        us = e.self_device_time_total if cuda else e.self_cpu_time_total
        if us > 0: found[e.key] = tuple(a + b for a, b in zip(found.get(e.key, (0, 0.)), (e.count, us)))
    return out, found


def hooks(step, pruner, batch, device, n, top):
    "The longest kernels before (pre) and after (post) the optimiser's own, of `n` steps: name, calls a step, microseconds a step"
    found = dict(pre=[], post=[])
    pruner.detach()                             # the optimiser holds the hooks themselves, so they are handed over anew
    for k, runs in found.items():
        def traced(*args, inner=getattr(pruner, '_' + k), runs=runs):
            out, these = kernels(lambda: inner(*args), device)
            runs.append(these)
            return out
        setattr(pruner, '_' + k, traced)
    pruner.attach()
    for _ in range(n + 1): step(*batch())               # in the first, the pruner looks at weights that it has not seen
    def longest(runs):
        total = {k: [sum(r[k][i] for r in runs[1:] if k in r)/n for i in (0, 1)] for r in runs[1:] for k in r}
        return [dict(name=k[:200], calls=c, us=round(us, 2)) for k,
                (c, us) in sorted(total.items(), key=lambda o: -o[1][1])[:top]]
    return {f'{k}_kernels': longest(runs) for k, runs in found.items()}


@torch.no_grad()
def look(pruner, device):
    "Milliseconds of one look of the controller, which waits for the device"
    wait = waiter(device)
    wait()
    start = time.perf_counter()
    pruner._steer()
    wait()
    return (time.perf_counter() - start)*1e3


def profile(step, pruner, batch, device, n, warmup, top=12):
    "Kernels of a whole step and how many they are; with a pruner also the parts of a step, waited for one by one, and the kernels of its hooks"
    for _ in range(warmup): step(*batch())
    kernels(lambda: step(*batch()), device)                             # the profiler's own first time
    these = kernels(lambda: [step(*batch()) for _ in range(n)], device)[1].values()
    row = dict(n=n, unit='ms', kernels_ms=sum(us for _, us in these)/n/1e3, launches=round(sum(c for c, _ in these)/n))
    if pruner is None: return row
    row |= hooks(step, pruner, batch, device, n, top)
    parts = parts_of(step, pruner, batch, device, max(n, 5), 1)
    return row | shares(parts) | dict(pre_host=parts['_pre_host'], post_host=parts['_post_host'],
                                      look=look(pruner, device))
