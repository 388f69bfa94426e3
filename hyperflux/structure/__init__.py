"What a gate may switch, and what it costs: channels, heads, features, layers, blocks, N:M."
from hyperflux.structure.walk import Channels
from hyperflux.structure.cost import Cost, Term, weights, flops, nbytes, flops_by_module
from hyperflux.structure.members import Bank, Member, Members
from hyperflux.structure.grouping import Grouping, Layer, layers_of, operations
from hyperflux.structure.attention import ATTENTION, Kind
from hyperflux.structure.channels import channels, features, heads
from hyperflux.structure.forms import Apiece, Priced, Singles, rows, columns, kernels, blocks, single, land_apiece
from hyperflux.structure.latency import Latency
from hyperflux.structure.nm import NM, nm
from hyperflux.structure.layers import Branch, branches, layers
