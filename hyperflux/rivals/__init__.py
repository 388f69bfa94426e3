"Other methods of pruning, with the same face as `Hyperflux`, and all methods by name."
from hyperflux.rivals.scores import Baseline, Random, Magnitude, LayerMagnitude, GMP, Progressive
from hyperflux.rivals.imp import IMP
from hyperflux.rivals.gradients import Taylor, SNIP, GraSP
from hyperflux.rivals.rigl import RigL
from hyperflux.rivals.l0 import L0
from hyperflux.rivals.spectrum import MarchenkoPastur
from hyperflux.rivals.structured import GroupMagnitude, FPGM, Slimming, GroupTaylor, GroupRandom
from hyperflux.rivals.torch_pruning import torch_pruning
from hyperflux.rivals.registry import METHODS, Method, method, methods_table
