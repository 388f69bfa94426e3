"Prune neural networks under pressure, and watch every weight do it."
from importlib.metadata import PackageNotFoundError as _Missing, version as _version

try: __version__ = _version('hyperflux')    # from settings.ini, by way of the installed metadata
except _Missing: __version__ = '0+checkout'  # run from a checkout that is not installed

from hyperflux.core import Hyperflux, Pruner, Settings, authors, prunable, select
from hyperflux.structure import channels, heads, features, layers, blocks, nm, single, flops, weights, nbytes
