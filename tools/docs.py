"""Build the documentation site from the notebooks: `python tools/docs.py` writes it into `_docs/`.

nbdev processes the notebooks (it adds the signatures and resolves links), smalldocs renders them from `_quarto.yml`,
and formulas become MathML, so that the site needs no network to be read. What smalldocs cannot read, and broken links,
are printed as warnings; `smalldocs check _proc` lists the same afterwards."""
import html, re, shutil, sys
from configparser import ConfigParser
from pathlib import Path

import latex2mathml.converter as mathml
from fastcore.script import call_parse
from nbdev.config import nbpath2html
from nbdev.serve import proc_nbs
from smalldocs.site import build

import rooms

root = Path(__file__).resolve().parents[1]
re_math = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
re_output = re.compile(r'^ *"output-file: .*\n', re.M)
re_katex = re.compile(r'<(?:link|script)\b[^>]*katex[^>]*>(?:</script>)?\s*', re.I)


def link_symbols():
    "Let nbdev link a name to the page that defines it and to its source (its own index assumes a published address)."
    from hyperflux._modidx import d
    ini = ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    pages = {str(nbpath2html(p.path)): p.path for p in rooms.pages()}
    def link(nb, py):
        page, _, anchor = nb.partition('#')
        return f'/{pages[page]}#{anchor}', py, f"{ini['DEFAULT']['git_url']}/blob/main/{py}"
    d['syms'] = {mod: {k: link(*v) for k, v in syms.items()} for mod, syms in d['syms'].items()}
    d['settings'].pop('doc_host')


re_auto = re.compile(r'\[(`[^`\n]+`)\]\(/(\w+)[^()\s]*#[^()\s]*\)')       # what nbdev makes of a name in backticks


def sober_links(text, room):
    "Without nbdev's links inside of links, and without those to later rooms, where a word means something else"
    later = rooms.ROOMS[rooms.ROOMS.index(room) + 1:] if room in rooms.ROOMS else ()
    text = re.sub(rf'\[{re_auto.pattern}\](?=\()', r'[\1]', text)
    return re_auto.sub(lambda m: m[1] if m[2] in later else m[0], text)


def process():
    "Notebooks as nbdev shows them, in `_proc`, beside the site's configuration."
    sys.path.insert(0, str(root))
    link_symbols()
    proc = Path(proc_nbs(str(root/'nbs'), n_workers=0, force=True))
    for p in proc.rglob('*.ipynb'):                         # a page's address is its name, number and all
        text, room = re_output.sub('', p.read_text(encoding='utf-8')), p.relative_to(proc).with_suffix('').parts[0]
        p.write_text(sober_links(text, room), encoding='utf-8')
    for o in ('_quarto.yml', 'tools/styles.css'): shutil.copy2(root/o, proc)
    return proc


def to_mathml(page):
    "The page with its TeX replaced by MathML, which browsers draw themselves."
    def tex(m): return mathml.convert(html.unescape(m[2]), display='inline' if m[1] == 'inline' else 'block')
    return re_katex.sub('', re_math.sub(tex, page))


@call_parse
def main(
    out:str='', # Folder of the site; default `_docs`
):
    "Build the documentation site from the notebooks."
    proc, out = process(), Path(out or root/'_docs')
    site = build(proc, quiet=True)
    for w in site.warnings: print(f'warning: {w}', file=sys.stderr)
    for p in site.out.rglob('*.html'): p.write_text(to_mathml(p.read_text(encoding='utf-8')), encoding='utf-8')
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site.out, out)
    print(f'{len(site.pages)} pages in {out.name}/')
