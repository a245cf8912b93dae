"""Render the site where Quarto is not at hand: `python docs/render.py [FOLDER]`, `_docs` by default; and write README.md.

nbdev processes the notebooks as it does for Quarto (which exports and directives are shown, and how); Sphinx,
with myst-nb and furo, then makes HTML of them, in the order of the sidebar in _quarto.yml. Nothing is fetched,
neither to build nor to read; a warning is an error."""
import base64, functools, json, os, re, shutil, struct, sys
from pathlib import Path

import yaml

from glossary import linked
from readme import ROOT, write_readme

SITE = 'https://dglit.github.io/dglit/'
WEBSITE = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']
STATIC = ROOT/'docs/static'
DARK = {'color-background-primary': '#000', 'color-background-secondary': '#101214',
        'color-code-background': '#14171a'}  # a page so dark that one grey serves the figures of both
SETTINGS = dict(
    project=WEBSITE['title'], language='en', extensions=['myst_nb', 'sphinx-mathjax-offline'],
    nb_execution_mode='off', nb_ipywidgets_js={}, nb_render_markdown_format='myst',
    myst_enable_extensions=['dollarmath', 'attrs_inline', 'deflist'], myst_heading_anchors=4,
    html_theme='furo', html_title=WEBSITE['title'], html_favicon=str(STATIC/'favicon.svg'),
    html_static_path=[str(STATIC)], html_css_files=['site.css'], html_js_files=['search.js', 'menu.js'],
    html_use_index=False, html_copy_source=False, html_show_sourcelink=False, html_show_copyright=False,
    html_theme_options=dict(source_repository='https://github.com/dglit/dglit', dark_css_variables=DARK))
WIDE = 620  # a picture of more pixels is not made smaller than is legible on a telephone, but scrolls


@functools.cache
def settings():
    "The names of all settings, some of which are functions' names too."
    from dglit.experiments.registry import REGISTRIES, settings_of
    return {'group_names'}.union(*(settings_of(o, kind) for kind, of in REGISTRIES.items() for o in of))


def page(notebook):
    "rcl/02_loss.ipynb -> rcl/loss, as nbdev names its pages."
    path = Path(notebook)
    return (path.parent/re.sub(r'^\d+_', '', path.stem)).as_posix()


def relink(text, folder):
    "Links between notebooks and to symbols as links between staged pages, from a page in `folder`; a setting's name is no symbol."
    text = re.sub(rf'\[`(\w+)`\]\({SITE}[^)]*\)', lambda m: f'`{m[1]}`' if m[1] in settings() else m[0], text)
    text = re.sub(r'\]\(([\w./]+\.ipynb)', lambda m: f']({page(m[1])}.ipynb', text)
    return re.sub(rf'\]\({SITE}([\w./]+)\.html(#[\w.]+)?', lambda m: ']({}.ipynb{}'.format(
        os.path.relpath(m[1], folder), (m[2] or '').replace('.', '')), text)  # a heading's dots are not in its anchor


def heading(markdown, module):
    "Of what `show_doc` printed, the heading and the link to the source: signature and docstring stand in the code below it."
    from nbdev.doclinks import _get_exps
    parts = markdown.split('\n\n')
    head = next(o for o in parts if o.startswith('#'))
    link = next((o for o in parts if o.startswith('[source]')), '')  # none where a decorator hides it
    if line := _get_exps(module).get(head.lstrip('# ')):  # nbdev goes by the name alone, which another module may have too
        link = re.sub(r'/main/.*#L\w+', f'/main/{module}#L{line}', link)
    head = head.replace('__', r'\_\_')
    return f"{head}\n\n{re.sub(r'{.*}', '{.source}', link)}"


def unquoted(text): return yaml.safe_load(text) if text[:1] in ('"', "'") else text


def picture(shown, options):
    "What myst-nb is to know of a cell's picture: caption, words, and its width as drawn, whatever its resolution."
    data = next((d for o in shown['outputs'] if 'image/png' in (d := o.get('data', {}))), None)
    if not data: return
    drawn = re.match(r'<Figure size (\d+)x', ''.join(data.get('text/plain', '')))
    pixels = struct.unpack('>I', base64.b64decode(''.join(data['image/png']))[16:20])[0]
    width = min(pixels, int(drawn[1])) if drawn else pixels
    caption = unquoted(options.get('fig-cap', ''))
    about = dict(image=dict(alt=unquoted(options.get('fig-alt', caption)), width=f'{width}px',
                            classes='wide' if width > WIDE else 'narrow'))
    if caption: about['figure'] = dict(caption=caption)
    shown['metadata']['mystnb'] = about


def staged(cell, folder, module):
    "A cell of the page of `module` in `folder` as myst-nb reads it; None for one that shows nothing."
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code':
        return dict(cell, source=relink(source, folder)) if not source.startswith('<!--') else None
    options = dict(re.findall(r'(?m)^#\| ([\w-]+): *(.*)\n?', source))
    source = re.sub(r'(?m)^#\|.*\n?', '', source).strip()
    if source.startswith('show_doc('):
        markdown = ''.join(cell['outputs'][0]['data']['text/markdown'])
        symbol = re.match(r'show_doc\((?:\w+\.)*(\w+)', source)[1]
        return dict(cell_type='markdown', metadata=dict(symbol=symbol), source=relink(heading(markdown, module), folder))
    shown = dict(cell, source=source, execution_count=None, metadata={})
    for o in shown['outputs']:
        data = o.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = relink(''.join(data['text/markdown']), folder)
    if options.get('echo') == 'false':
        if not shown['outputs']: return None
        shown['metadata']['tags'] = ['remove-input']
    picture(shown, options)
    return shown


def at_home(cells):
    "Each symbol's heading right above the code that defines it, where nbdev has it above constants and helpers as well."
    out = []
    for cell in reversed(cells):
        at = 0
        if symbol := cell['metadata'].pop('symbol', None):
            below = next((i for i, o in enumerate(out) if o['cell_type'] != 'code'), len(out))
            defines = re.compile(rf'(?m)^(def|class) {symbol}\b|^{symbol}\b.*=')
            at = next((i for i, o in enumerate(out[:below]) if defines.search(o['source'])), 0)
        out.insert(at, cell)
    return out


def ordered(cells):
    "The cells with ids, and with no heading more than one level below the one it stands under."
    above = []
    for i, cell in enumerate(cells):
        cell['id'] = f'cell-{i}'
        if cell['cell_type'] != 'markdown': continue
        lines, fenced = cell['source'].split('\n'), False
        for j, line in enumerate(lines):
            if line.startswith('```'): fenced = not fenced
            if fenced or not (found := re.match(r'(#+) ', line)): continue
            above = [o for o in above if o < len(found[1])] + [len(found[1])]
            lines[j] = '#'*len(above) + line[len(found[1]):]
        cell['source'] = '\n'.join(lines)
    return cells


def stage(path, name, out):
    "Write a processed notebook, `name` under nbs, as the page it becomes."
    nb = json.loads(path.read_text(encoding='utf-8'))
    head, *cells = nb['cells']
    about = yaml.safe_load(''.join(head['source']).strip().strip('-'))
    folder = Path(name).parent
    run = (f'*Run this page:* `jupyter lab nbs/{name}` in a '
           f'[clone]({os.path.relpath("index.ipynb", folder)}#install), '
           f'or see it [on GitHub](https://github.com/dglit/dglit/blob/main/nbs/{name}).')
    text = f"# {about['title']}\n\n> {about['description']}\n\n{run}"
    title = dict(cell_type='markdown', metadata={}, source=text)
    found = re.search(r'#\| default_exp ([\w.]+)', (ROOT/'nbs'/name).read_text(encoding='utf-8'))
    module = f"dglit/{found[1].replace('.', '/')}.py" if found else ''
    cells = at_home([o for c in cells if (o := staged(c, folder, module))])
    written = [o for o in cells if o['cell_type'] == 'markdown']
    if not name.startswith('guides/9'):  # the glossary and the references
        link = os.path.relpath('guides/glossary.ipynb', folder) + '#abbreviations'
        for o, text in zip(written, linked([o['source'] for o in written], link)): o['source'] = text
    cells = [title, *cells]
    if name == 'index.ipynb': cells.append(dict(cell_type='markdown', metadata={}, source=toctrees()))
    nb['cells'] = ordered(cells)
    nb['metadata'] = dict(kernelspec=dict(name='python3', display_name='python3', language='python'),
                          language_info=dict(name='python', pygments_lexer='python3'))
    to = out/f'{page(name)}.ipynb'
    to.parent.mkdir(exist_ok=True)
    to.write_text(json.dumps(nb), encoding='utf-8')


def toctrees():
    "The sidebar of _quarto.yml as Sphinx's."
    sections = [o for o in WEBSITE['sidebar']['contents'] if isinstance(o, dict)]
    return '\n\n'.join('```{toctree}\n:hidden:\n:caption: ' + o['section'] + '\n' +
                       '\n'.join(map(page, o['contents'])) + '\n```' for o in sections)


def processed_notebooks():
    "The folder of the notebooks as nbdev processes them; its settings are read once, not once a cell."
    from nbdev import processors
    from nbdev.serve import proc_nbs
    processors.get_config = functools.cache(processors.get_config)
    return Path(proc_nbs(force=True, n_workers=0))


def render(out):
    from sphinx.application import Sphinx
    from sphinx.search.en import SearchEnglish

    class Words(SearchEnglish):
        "Numbers are found as well; a word is stemmed once."
        stem = functools.cache(SearchEnglish.stem)
        def word_filter(self, word): return word not in self.stopwords

    if out.exists() and any(out.iterdir()) and not (out/'searchindex.js').exists():
        sys.exit(f'{out} is no rendered site: give an empty or new folder')
    os.chdir(ROOT)  # where nbdev looks for its settings
    write_readme()
    processed = processed_notebooks()
    pages, notebooks = (sorted(o.relative_to(top).as_posix() for o in top.rglob('*.ipynb')
                               if '/.' not in o.as_posix()) for top in (processed, ROOT/'nbs'))
    if pages != notebooks:
        sys.exit(f'nbdev processed {len(pages)} of {len(notebooks)} notebooks: '
                 'is the checkout under a folder whose name begins with a dot?')
    work = processed/'sphinx'
    (work/'source').mkdir(parents=True)
    shutil.copytree(processed/'images', work/'source/images')
    for o in pages: stage(processed/o, o, work/'source')
    app = Sphinx(work/'source', None, work/'html', work/'doctrees', 'html', SETTINGS,
                 warningiserror=True, status=None, keep_going=True)
    app.add_search_language(Words)
    app.build()
    if app.statuscode: sys.exit(app.statuscode)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work/'html', out)
    print(f'{len(pages)} pages in {out}')


if __name__ == '__main__': render(ROOT/(sys.argv[1] if len(sys.argv) > 1 else '_docs'))
