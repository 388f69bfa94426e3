"What a gate may switch, and what it costs: channels, heads, layers, blocks, N:M."
from hyperflux.structure.walk import Channels
from hyperflux.structure.cost import Cost, Term, weights, flops, flops_by_module
from hyperflux.structure.members import Bank, Member, Members
from hyperflux.structure.grouping import Grouping
from hyperflux.structure.channels import channels
