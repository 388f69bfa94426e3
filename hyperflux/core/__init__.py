"The method: gates, flux, pressure, control, and the pruners made of them."
from hyperflux.core.gates import Gate, Gated, initial_presence
from hyperflux.core.pressure import ramp, linear, cubic, exponential, early, authors_trajectory
from hyperflux.core.control import Controller, LogController, AuthorsController
from hyperflux.core.plan import Plan
from hyperflux.core.selection import prunable, select
from hyperflux.core.norms import renew_norms
from hyperflux.core.pruner import Pruner
from hyperflux.core.groups import Groups
from hyperflux.core.gated import GatedPruner
from hyperflux.core.meter import FluxMeter, plot_flux
from hyperflux.core.settings import Settings, authors
from hyperflux.core.hyperflux import Hyperflux
from hyperflux.core import shards as _shards  # weights cut over processes: it makes itself known
