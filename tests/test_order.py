"The order of pages is the order of imports: none imports a later one, not in a function either; so no circle."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]/'tools'))
from rooms import imports, pages, too_early

all_pages = pages()
early = too_early(all_pages)


@pytest.mark.parametrize('path', [str(p.path) for p in all_pages])
def test_imports_earlier_pages_only(path): assert early.get(path) is None


def test_all_ways_to_import_are_seen():
    assert imports('from hyperflux.lab.data import load_data') == {'lab.data'}
    assert imports('def f(): import hyperflux.deploy.files as x') == {'deploy.files'}
    assert imports('from hyperflux.deploy import compact') == {'deploy'}              # a room's face: all of it
    assert imports('from hyperflux import Hyperflux') == imports('import hyperflux') == {'core'}
    assert not imports('import torch; from hyperflux import __version__')
