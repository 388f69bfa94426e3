"The documentation site builds, with every page, and reads without a network."
import shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip('smalldocs')
root = Path(__file__).parents[1]


def hrefs(o):
    "The pages named in the sidebar, in order."
    if isinstance(o, str): return [o]
    return [h for x in (o if isinstance(o, list) else [o.get('contents', [])]) for h in hrefs(x)]


@pytest.fixture(scope='module')
def site(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')/'site'
    res = subprocess.run([sys.executable, 'tools/docs.py', '--out', out], cwd=checkout, text=True, capture_output=True)
    assert res.returncode == 0, res.stderr
    return out


def test_every_notebook_is_a_page_and_in_the_sidebar(site):
    notebooks = {str(p.relative_to(root/'nbs')) for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    sidebar = yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']
    assert set(hrefs(sidebar)) == notebooks
    assert {str(p.relative_to(site)) for p in site.rglob('*.html')} >= {o.replace('.ipynb', '.html') for o in notebooks}


def test_formulas_need_no_network(site):
    pages = [p.read_text() for p in site.rglob('*.html')]
    assert any('<math' in p for p in pages)
    assert not [p for p in pages if 'katex' in p.lower() or 'class="math' in p]


def test_smalldocs_check_finds_only_an_option_of_quarto(site, checkout):
    res = subprocess.run([sys.executable, '-c', 'from smalldocs.cli import main; main()', 'check', '_proc'], cwd=checkout, text=True, capture_output=True)
    assert 'thing(s) to look at' in res.stderr, res.stderr
    assert not [o for o in res.stdout.splitlines() if 'output-file is not read' not in o], res.stdout


@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not installed')
def test_configuration_is_valid_quarto(): subprocess.run(['quarto', 'inspect', str(root)], check=True, capture_output=True)
