"""Hyperflux otherwise: methods for `hyperflux compare` that change one thing each, to find what makes a difference.

    hyperflux compare --methods hyperflux,benchmarks.variants:untrained,benchmarks.variants:late --sparsities .9,.98 …
"""
import dataclasses, functools

from torch import nn

from hyperflux.core.control import LogController
from hyperflux.core.hyperflux import Hyperflux
from hyperflux.core.pressure import early
from hyperflux.lab.models import lenet300
from hyperflux.rivals.registry import Method


def variant(untrained=False, settle=None, kind=Hyperflux, **more):
    "Hyperflux from the first step on, with another share of steps after its landing, of another kind, or otherwise set"
    def settings(c): return dataclasses.replace(
        c.settings(), prune=c.share, settle=(1 - c.share)/2 if settle is None else settle, **more)
    def make(run, plan):
        c = run.config
        return kind(run.model, run.optimizer, plan=plan, settings=settings(c), seed=c.seed, meter=True,
                    compile=run.compile and not c.groups, **run.chosen)
    return Method(make, lambda c, steps: settings(c).plan(steps, c.sparsity), untrained=untrained)


untrained = variant(untrained=True)         # no dense epochs: 50 epochs under its own rule, as hard-concrete L0 has
late = variant(settle=.05)                  # lands when nearly all is over
soon = variant(settle=.45)                  # lands as soon as pruning ends: hardly any regrowth

warm2, warm5, warm10, warm25 = (variant(temperature=t/1000) for t in (2, 5, 10, 25))   # thousandths of the travel


class Averaged(Hyperflux):
    "Lands by the mean that presences had in regrowth, and not by where they stand at its end"
    def advance(self):
        if self.step == self.plan.end: self.mean, self.seen_steps = self.presence.clone(), 1
        if self.plan.end < self.step <= self.plan.land:
            self.seen_steps += 1
            self.mean.lerp_(self.presence, 1/self.seen_steps)
        if self.step == self.plan.land: self.presence.copy_(self.mean)
        super().advance()


averaged = variant(kind=Averaged)           # for runs that are not interrupted: the mean is in no state


def two_cycles(p, target):
    "`--trajectory benchmarks.variants:two_cycles`: down to the target, up to four times of it, down again"
    if p < .5: return early(2*p, target)
    return target*min(4., 1/target)**(1 - abs(4*p - 3)) if p < 1 else target


restless = variant(controller=functools.partial(LogController, rest=0.))  # density is further from its plan


def dropout(n_classes=10, in_shape=(1, 28, 28)):
    "LeNet-300-100 that drops a tenth of its hidden units while it trains: `--model benchmarks.variants:dropout`"
    net = lenet300(n_classes, in_shape)
    return nn.Sequential(*(layer for m in net for layer in ([m, nn.Dropout(.1)] if isinstance(m, nn.ReLU) else [m])))
