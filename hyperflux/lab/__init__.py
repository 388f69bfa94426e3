"The laboratory: data, networks, weights, processes."
from hyperflux.lab.augment import Augment
from hyperflux.lab.data import Data
from hyperflux.lab.folders import load_folders, FolderData
from hyperflux.lab.datasets import load_data, DATASETS, DataSet
from hyperflux.lab.models import make_model, MODELS, authors_ignore, model_flops
from hyperflux.lab.weights import load_weights
from hyperflux.lab.processes import World, join, leave, wrap
