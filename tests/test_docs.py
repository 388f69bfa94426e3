"The documentation site builds, with every page, and reads without a network."
import re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip('smalldocs')
root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
from rooms import pages


def hrefs(o):
    "The pages of the sidebar, in order; a pattern stands for a folder's pages."
    if isinstance(o, dict): return hrefs(o['contents'])
    if isinstance(o, list): return [h for x in o for h in hrefs(x)]
    return [str(p.relative_to(root/'nbs')) for p in sorted((root/'nbs').glob(o))] or [o]


@pytest.fixture(scope='module')
def site(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')/'site'
    res = subprocess.run([sys.executable, 'tools/docs.py', '--out', out], cwd=checkout, text=True, capture_output=True)
    assert res.returncode == 0, res.stderr
    return out


def test_every_notebook_is_a_page_and_in_the_sidebar_in_the_order_of_reading(site):
    found = [p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb')]
    notebooks = {str(p) for p in found if '.ipynb_checkpoints' not in p.parts}
    sidebar = hrefs(yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(sidebar) == sorted(notebooks)
    assert {str(p.relative_to(site)) for p in site.rglob('*.html')} >= {o.replace('.ipynb', '.html') for o in notebooks}
    reading = [str(p.path) for p in pages() if len(p.path.parts) > 1] + ['cli.ipynb']
    assert [o for o in sidebar if o in reading] == reading


def test_formulas_need_no_network(site):
    pages = [p.read_text() for p in site.rglob('*.html')]
    assert any('<math' in p for p in pages)
    assert not [p for p in pages if 'katex' in p.lower() or 'class="math' in p]


def test_links_lead_somewhere(site):
    text = {p: p.read_text() for p in site.rglob('*.html')}
    ids = {p: set(re.findall(r'\bid="([^"]+)"', s)) for p, s in text.items()}
    lost = []
    for p, s in text.items():
        for href in set(re.findall(r'<a [^>]*href="(?!\w+:)([^"]+)"', s)):
            page, _, anchor = href.partition('#')
            to = (p.parent/page).resolve() if page else p
            if to.exists() and (not anchor or anchor in ids.get(to, [anchor])): continue
            lost.append(f'{p.relative_to(site)}: {href}')
    assert not lost, lost


def test_no_link_stands_inside_of_another(site):
    "A name in backticks is a link by itself"
    assert not [p for p in site.rglob('*.html') if '</a>](' in p.read_text()]


def test_smalldocs_finds_nothing(site, checkout):
    check = 'from smalldocs.cli import main; main()'
    res = subprocess.run([sys.executable, '-c', check, 'check', '_proc'], cwd=checkout, text=True, capture_output=True)
    assert not res.stdout, res.stdout


@pytest.mark.skipif(not shutil.which('quarto'), reason='Quarto is not installed')
def test_configuration_is_valid_quarto():
    subprocess.run(['quarto', 'inspect', str(root)], check=True, capture_output=True)
