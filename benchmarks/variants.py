"""Hyperflux otherwise: methods for `hyperflux compare` that each change one thing, to find out what a difference comes from.

    hyperflux compare --methods hyperflux,l0,benchmarks.variants:untrained,benchmarks.variants:late --sparsities .9,.98 --valid .1 …
"""
import dataclasses, functools

from torch import nn

from hyperflux.core.hyperflux import Hyperflux
from hyperflux.rivals.registry import Method
from hyperflux.lab.models import lenet300
from hyperflux.core.control import LogController


def variant(untrained=False, settle=None, **more):
    "Hyperflux from the first step on, with another share of steps after its landing, or with other settings"
    def make(run, span, **how):
        prune = span[1]
        settings = dataclasses.replace(run.config.settings(), prune=prune, settle=(1 - prune)/2 if settle is None else settle, **more)
        return Hyperflux(run.model, run.optimizer, settings=settings, seed=run.config.seed, meter=True, compile=run.compile, **how)
    return Method(make, untrained=untrained)


untrained = variant(untrained=True)                     # no dense epochs: 50 epochs under its own rule, as hard-concrete L0 has
late = variant(settle=.05)                              # lands when nearly all is over
soon = variant(settle=.45)                              # lands as soon as pruning ends: hardly any regrowth

restless = variant(controller=functools.partial(LogController, rest=0.))     # presences move all along; density is further from its plan


def dropout(n_classes=10, in_shape=(1, 28, 28)):
    "LeNet-300-100 that drops a tenth of its hidden units while it trains: `--model benchmarks.variants:dropout`"
    net = lenet300(n_classes, in_shape)
    return nn.Sequential(*(layer for m in net for layer in ([m, nn.Dropout(.1)] if isinstance(m, nn.ReLU) else [m])))
