"The order of pages is the order of imports: no page imports a later one, at its top or inside a function, so that there is no circle."
import ast, re
from pathlib import Path

import pytest
from fastcore.nbio import read_nb

nbs = Path(__file__).parents[1]/'nbs'
ROOMS = 'helpers', 'plots', 'core', 'lab', 'rivals', 'study', 'deploy', 'cli'
pages = [p for room in ROOMS for p in sorted((nbs/room).glob('*.ipynb')) or [nbs/f'{room}.ipynb']]
cells = {p: [c.source for c in read_nb(p).cells if c.cell_type == 'code'] for p in pages}
module = {p: re.match(r'#\| default_exp ([\w.]+)', next(s for s in cells[p] if 'default_exp' in s))[1] for p in pages}


@pytest.mark.parametrize('i', range(len(pages)), ids=[str(p.relative_to(nbs).with_suffix('')) for p in pages])
def test_imports_earlier_pages_only(i):
    tree = ast.parse('\n'.join(s for s in cells[pages[i]] if not s.startswith('%')))
    used = {n.module.removeprefix('hyperflux.') for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('hyperflux.')}
    assert not used - {module[p] for p in pages[:i]} - {module[pages[i]]}
