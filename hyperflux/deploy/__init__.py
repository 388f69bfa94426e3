"Smaller and faster: compaction, sparse kernels, files, measured latency."
from hyperflux.deploy.compact import compact, Compaction
from hyperflux.deploy.sparsify import sparsify, Sparsification
from hyperflux.deploy.files import save_sparse
from hyperflux.deploy.loading import load_sparse
from hyperflux.deploy.network import save_network, load_network
from hyperflux.deploy.training import carry
from hyperflux.deploy.onnx import export_onnx
from hyperflux.deploy.report import DeployReport
from hyperflux.deploy.forms import deploy, deploy_run
