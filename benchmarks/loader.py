"""One epoch of shifted, flipped, normalised batches: the loader on the device against torchvision's transforms in
worker processes.

50,000 random images of CIFAR's size in batches of 128; border of four pixels. Three ways, in turns of random order
within each round:
the device-side loader on one thread of the main process; torchvision's v2 functions, image by image, in a
DataLoader with two workers, with the very draws
of the first way (their batches are compared before anything is timed); and torchvision's v2 random transforms, as
one would write them, in the same DataLoader.
The workers are started before, and stay. A ratio is the median, over rounds, of the way's time over the device
loader's in the same round. Goal: 3.
Besides, the crop alone, of one batch, written in several ways.
"""
import argparse, random, sys, time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from hyperflux.lab.augment import Augment, crop_flip
from hyperflux.lab.data import DeviceLoader, epoch_order

from .common import interleave, provenance, ratios, spelled, stats, table, write_json

MEAN, STD, BORDER, WORKERS, GOAL = (.4914, .4822, .4465), (.2470, .2435, .2616), 4, 2, 3.
WAYS = dict(device='device loader, 1 thread', functions=f'torchvision functions, same draws, {WORKERS} workers',
            transforms=f'torchvision transforms, {WORKERS} workers')
CROPS = dict(gather='one gather of addresses', unfold='unfolded view, indexed', index='indices of all pixels',
             slices='a slice for each image')


def made_up(n):
    "Images and labels"
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.randint(10, (n,), generator=g)


# The ways

class Functions(Dataset):
    "Key: an example and its draws"
    def __init__(self, images, labels): self.images, self.labels = images, labels

    def __getitem__(self, key):
        i, dy, dx, flip = key
        image = tv.crop(tv.pad(self.images[i], [BORDER]*4), dy, dx, 32, 32)
        if flip: image = tv.horizontal_flip(image)
        return tv.normalize(tv.to_dtype(image, torch.float32, scale=True), MEAN, STD), self.labels[i]


class Transforms(Dataset):
    "Key: an example; the draws are torchvision's own"
    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.transform = v2.Compose([v2.RandomCrop(32, padding=BORDER), v2.RandomHorizontalFlip(),
                                     v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __getitem__(self, key): return self.transform(self.images[key]), self.labels[key]


class Keys:
    "Keys of one epoch's batches"
    def __init__(self, n, batch, augment=None): self.n, self.batch, self.augment, self.epoch = n, batch, augment, 0

    def __iter__(self):
        order = epoch_order(self.n, self.epoch)
        keys = order if self.augment is None else torch.cat([order[:, None],
                                                             self.augment.draw(self.n, self.epoch)[order, :3]], 1)
        return (k.tolist() for k in keys.split(self.batch))


def passes(n, batch):
    "Name → function of an epoch, an iterator over its batches"
    images, labels = made_up(n)
    augment = Augment(crop=BORDER, flip=True)
    ours = DeviceLoader(images, labels, batch, augment=augment, mean=MEAN, std=STD)
    keys = dict(functions=Keys(n, batch, augment), transforms=Keys(n, batch))
    theirs = {k: DataLoader(o(images, labels), batch_sampler=keys[k], num_workers=WORKERS, persistent_workers=True)
              for k, o in (('functions', Functions), ('transforms', Transforms))}

    def device(epoch): ours.set_epoch(epoch); return iter(ours)
    def other(k): return lambda epoch: (setattr(keys[k], 'epoch', epoch), iter(theirs[k]))[1]
    return dict(device=device) | {k: other(k) for k in theirs}


def measure(n, batch, rounds):
    "One row for each way"
    ways = passes(n, batch)
    # the same pictures, and everybody warm
    for (x, y), (u, v) in zip(ways['device'](0), ways['functions'](0), strict=True):
        torch.testing.assert_close(x, u, rtol=0, atol=1e-5)
        assert torch.equal(y, v)
    for _ in ways['transforms'](0): pass
    times, order, rng = {k: [] for k in ways}, list(ways), random.Random(0)
    for epoch in range(rounds):
        rng.shuffle(order)
        for k in order:
            start = time.perf_counter()
            seen = sum(len(y) for _, y in ways[k](epoch))
            times[k].append([time.perf_counter() - start])
            assert seen == n
    return [dict(way=k, unit='s', **stats([t for t, in ts]), images_per_second=round(n/stats([t for t,
                                                                                              in ts])['median']),
                 ratio=ratios(ts, times['device']), goal=None if k == 'device' else GOAL) for k, ts in times.items()]


# The crop alone

def crop_ways():
    "Name → function of (images, rows, columns, flips)"
    p = BORDER

    def mirrored(x, flip): return torch.where(flip.bool()[:, None, None, None], x.flip(3), x)

    def unfold(x, dy, dx, flip):
        n, _, h, w = x.shape
        return mirrored(F.pad(x, (p,)*4).unfold(2, h, 1).unfold(3, w, 1)[torch.arange(n), :, dy, dx], flip)

    def index(x, dy, dx, flip):
        n, c, h, w = x.shape
        rows, cols = dy[:, None] + torch.arange(h), dx[:, None] + torch.where(flip[:, None] > 0,
                                                                              w - 1 - torch.arange(w), torch.arange(w))
        return F.pad(x, (p,)*4)[torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None],
                                rows[:, None, :, None], cols[:, None, None]]

    def slices(x, dy, dx, flip):
        n, _, h, w = x.shape
        bordered = F.pad(x, (p,)*4)
        return mirrored(torch.stack([o[:, a:a + h, b:b + w] for o, a, b in zip(bordered, dy.tolist(), dx.tolist())]),
                        flip)
    return dict(gather=lambda x, *draws: crop_flip(x, p, *draws), unfold=unfold, index=index, slices=slices)


def measure_crops(batch, rounds, burst):
    "One row for each way of cropping and flipping a batch of bytes"
    images, _ = made_up(20*batch)
    draws, ways, g = Augment(BORDER, True).draw(len(images), 0), crop_ways(), torch.Generator().manual_seed(0)

    def some():
        i = torch.randperm(len(images), generator=g)[:batch]
        return images[i], *draws[i].unbind(1)[:3]
    one = some()
    for k, way in ways.items(): assert torch.equal(way(*one), ways['gather'](*one)), k
    times = interleave(ways, some, torch.device('cpu'), rounds, burst, 5)
    return [dict(way=k, unit='ms', **stats([t for r in ts for t in r]), ratio=ratios(ts, times['gather'])) for k,
            ts in times.items()]


# The command

def table_of(rows, names, unit):
    cells = [(names[r['way']], f"{r['median']:.3f}", f"{r['q1']:.3f}–{r['q3']:.3f}", f"{r['ratio']['median']:.2f}",
              f"{r['ratio']['q1']:.2f}–{r['ratio']['q3']:.2f}",
              '–' if r.get('goal') is None else f"{r['goal']:.0f}") for r in rows]
    return table(('way', f'median {unit}', 'IQR', '× first', 'IQR', 'goal'), cells, left=1)


def main(argv=None):
    "Runs what the arguments ask for, prints it, and returns the record"
    p = argparse.ArgumentParser(prog='python -m benchmarks.loader', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--smoke', action='store_true', help='a thousand images, two rounds: checks that everything runs, '
                                                        'measures nothing')
    p.add_argument('--rounds', type=int, help='epochs of every way (default: 7)')
    p.add_argument('--out', metavar='FILE.json', help='write a record')
    args = p.parse_args(argv)
    if args.rounds is not None and args.rounds < 1: p.error(f"--rounds is a whole number above 0: got {args.rounds}")
    torch.set_num_threads(1)
    n, batch, rounds = 1000 if args.smoke else 50_000, 128, args.rounds or (2 if args.smoke else 7)
    record = dict(benchmark='loader', **provenance(spelled('python -m benchmarks.loader',
                                                           sys.argv[1:] if argv is None else argv)),
                  smoke=args.smoke, images=n, batch_size=batch, workers=WORKERS, goal=GOAL)
    h = record['hardware']
    print(f"{h['cpu']}, {h['cores']} cores, load {h['load_before']}; torch {record['torch']}; commit "
          f"{(record['commit'] or 'unknown')[:10]}; "
          f"an epoch of {n:,} images, {rounds} rounds", flush=True)
    if (h['load_before'] or 0) > 1 and not args.smoke:
        print("others are using this machine (load above 1): look at the ratios only")
    record['rows'] = measure(n, batch, rounds)
    print(table_of(record['rows'], WAYS, 's'), flush=True)
    record['crops'] = measure_crops(batch, 3 if args.smoke else 40, 2 if args.smoke else 10)
    print(f"\ncrop and flip alone, {batch} images", table_of(record['crops'], CROPS, 'ms'), sep='\n')
    record['ratio'] = min(r['ratio']['median'] for r in record['rows'] if r['way'] != 'device')
    print(f"\nratio {record['ratio']:.1f}, against the faster of torchvision's two ways; goal {GOAL:.0f}")
    if args.out: write_json(record, args.out)
    return record


if __name__ == '__main__': main()
