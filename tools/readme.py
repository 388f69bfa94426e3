"""README.md from nbs/index.ipynb:  python tools/readme.py"""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parents[1]
hidden = re.compile(r'^#\|\s*hide\b', re.M)


def readme() -> str: # The text of README.md
    "The index notebook as Markdown, without hidden cells, its links made to work from the top folder"
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.cells = [c for c in nb.cells if not hidden.search(c.source)]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r'\]\((?![a-z]+:|#)', '](nbs/', text)            # all links but https: and #
    note = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit there. -->\n\n'
    return note + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
