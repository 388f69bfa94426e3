"Runs and what is made of them: recipes, training, comparisons, recordings, laws, reports."
from hyperflux.study.measure import evaluate
from hyperflux.study.config import Config
from hyperflux.study.recipes import RECIPES, recipe, recipes_table
from hyperflux.study.results import load_run, read_summary, read_history
from hyperflux.study.run import Run
from hyperflux.study.train import fit
from hyperflux.study.rehearsal import rehearse
from hyperflux.study.grid import run_grid
from hyperflux.study.comparison import Comparison, read_comparison
from hyperflux.study.live import LiveTable
from hyperflux.study.recorder import Recorder, MaskLog, Returns
from hyperflux.study.laws import fit_law, plot_law
from hyperflux.study.report import report
