"""The pages of nbs/ in the order in which they are read, and what each imports.

tests/test_order.py holds them to that order, nbs/imports.ipynb draws it, tools/docs.py finds pages by it."""
import ast, re
from pathlib import Path
from typing import NamedTuple

from fastcore.nbio import read_nb

nbs = Path(__file__).resolve().parents[1]/'nbs'
ROOMS = 'helpers', 'plots', 'core', 'structure', 'lab', 'rivals', 'study', 'deploy', 'cli'       # a folder of nbs/, or a single page


class Page(NamedTuple):
    path:Path # In nbs/
    module:str # What it exports, without `hyperflux.`
    room:str # One of ROOMS
    own:set # What its module imports, inside functions too: modules, or rooms whose face is imported
    used:set # What any of its cells import


def imports(
    source:str, # Python text
)->set: # Modules and rooms
    "What is imported from hyperflux, anywhere in it; `hyperflux` itself has the face of the core"
    out = set()
    for n in ast.walk(ast.parse(source)):
        if isinstance(n, ast.Import): out |= {a.name for a in n.names}
        if isinstance(n, ast.ImportFrom) and [a.name for a in n.names] != ['__version__']: out.add(n.module or '')
    return {s.partition('.')[2] or 'core' for s in out if s.split('.')[0] == 'hyperflux'}


def page(path, room):
    "One page, read"
    cells = [c.source for c in read_nb(path).cells if c.cell_type == 'code']
    module = next(m[1] for s in cells if (m := re.search(r'^#\| default_exp ([\w.]+)', s, re.M)))
    exported = [s for s in cells if re.search(r'^#\| exports?\b', s, re.M)]
    text = re.compile(r'^\s*[%!].*', re.M)                           # commands of IPython and of the shell
    own, used = (imports(text.sub('', '\n'.join(o))) for o in (exported, cells))
    return Page(path.relative_to(nbs), module, room, own, used)


def pages()->list[Page]:
    "Every page that exports a module, in the order of reading"
    return [page(p, room) for room in ROOMS for p in sorted((nbs/room).glob('*.ipynb')) or [nbs/f'{room}.ipynb']]


def too_early(
    pages:list[Page],
)->dict: # Page → modules and rooms that come later
    "Imports against the order; none, if all is well"
    out, known = {}, set()
    for i, p in enumerate(pages):
        known |= {p.module} | {q.room for q in pages[:i] if q.room != p.room}
        if p.used - known: out[str(p.path)] = sorted(p.used - known)
    return out
