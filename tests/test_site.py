"""The rendered site: every link leads somewhere, nothing is fetched from elsewhere, and in a real browser nothing
overflows without a sign, every formula is drawn and the search finds. Needs `pip install -e '.[docs]'`; the browser tests need Chromium."""
import functools, html.parser, http.server, os, re, subprocess, sys, threading
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).parent.parent
MISSING = [o for o in ('sphinx', 'myst_nb', 'furo') if not find_spec(o)]
sys.path.insert(0, str(ROOT/'docs'))
from screenshots import BROWSER, CUT, settled
pytestmark = [pytest.mark.xdist_group('site'),  # one site, one browser
              pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[docs]'")]
needs_browser = pytest.mark.skipif(not BROWSER or not find_spec('playwright'), reason='needs Chromium on the path, and playwright')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the rendered site: what DGLIT_SITE names, or rendered here."
    if there := os.environ.get('DGLIT_SITE'): return Path(there)
    out = tmp_path_factory.mktemp('site')/'html'
    done = subprocess.run([sys.executable, ROOT/'docs/render.py', str(out)], capture_output=True, text=True)
    assert done.returncode == 0 and not re.search('WARNING|MissingIDField', done.stderr), done.stderr[-3000:]
    return out


class Page(html.parser.HTMLParser):
    "What a page links to, loads, names, shows and heads."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.images, self.headings = [], [], set(), [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'img': self.images.append(a)
        if tag in ('img', 'script') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload'): self.loads.append(a['href'])
        if tag in ('h1', 'h2', 'h3', 'h4'): self.headings.append(int(tag[1]))


@pytest.fixture(scope='module')
def pages(site):
    every = (p.relative_to(site).as_posix() for p in site.rglob('*.html') if '_static' not in p.parts)
    return {o: Page(site/o) for o in every if o not in ('genindex.html', 'search.html')}


def at(name, link): return os.path.normpath(Path(name).parent/link)


def test_a_page_for_every_notebook(pages): assert len(pages) == sum('/.' not in str(o) for o in (ROOT/'nbs').rglob('*.ipynb'))


def test_links_lead_somewhere(site, pages):
    for name, page in pages.items():
        for link in page.links:
            if '://' in link or link.startswith('mailto:'): continue
            file, _, anchor = link.partition('#')
            file = at(name, file) if file else name
            assert (site/file).exists(), f'{name} links to {link}'
            if anchor and file in pages: assert anchor in pages[file].ids, f'{name} links to {link}'


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for name, page in pages.items():
        for o in page.loads: assert o.startswith('data:') or '://' not in o and (site/at(name, o.partition('?')[0])).exists(), f'{name} loads {o}'


def test_figures_have_words_and_headings_have_order(pages):
    for name, page in pages.items():
        assert all(o.get('alt') and '_images' not in o['alt'][:12] and len(o['alt']) > 10 for o in page.images), f'{name}: a figure without alternative text'
        assert page.headings[0] == 1 and all(b <= a+1 for a, b in zip(page.headings, page.headings[1:])), f'{name}: {page.headings}'


@pytest.fixture(scope='module')
def browser(site):
    "A headless Chromium, and where the site is served."
    from playwright.sync_api import sync_playwright

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield chromium, f'http://127.0.0.1:{server.server_port}/'
        chromium.close()
    server.shutdown()


def opened(browser, name, width, scheme='light'):
    "A page, and what went wrong while it loaded; other hosts are out of reach."
    chromium, home = browser
    page, wrong = chromium.new_context(viewport=dict(width=width, height=900), color_scheme=scheme).new_page(), []
    page.route(lambda url: not url.startswith((home, 'data:')), lambda route: (wrong.append(route.request.url), route.abort()))
    page.on('console', lambda m: wrong.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.goto(home + name, wait_until='networkidle')
    return page, wrong


LOOKED_AT = ['index.html', 'rcl/story.html', 'rcl/loss.html', 'irm/penalty.html', 'cim/table.html', 'foundations/style.html',
             'guides/glossary.html', 'guides/what_reproduces.html']


@needs_browser
@pytest.mark.parametrize('width', [1300, 390])
@pytest.mark.parametrize('name', LOOKED_AT)
def test_in_a_browser(browser, name, width):
    "Nothing is wrong, the page itself does not scroll sideways, and what is wider than the page has a bar and a shadow."
    page, wrong = opened(browser, name, width)
    settled(page)
    assert not wrong and page.locator('mjx-merror').count() == 0
    assert page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth') <= 0
    assert page.evaluate("[...document.images].every(o => o.complete && o.naturalWidth > 0)")
    assert [o for o in page.evaluate(CUT) if not o['sign']] == []
    page.context.close()


@needs_browser
@pytest.mark.parametrize('width', [1300, 1330, 1500])
def test_110_columns_of_code_are_shown(browser, width):
    page, _ = opened(browser, 'rcl/loss.html', width)
    over = page.evaluate("""() => { const o = document.querySelector('article .highlight pre');
        o.textContent = 'x'.repeat(110); const fits = o.scrollWidth - o.clientWidth;
        o.textContent = 'x'.repeat(150); return [fits, o.scrollWidth - o.clientWidth] }""")
    assert over[0] == 0 and over[1] > 0
    page.context.close()


@needs_browser
def test_on_a_telephone_equations_and_tables_scroll(browser):
    page, _ = opened(browser, 'irm/penalty.html', 390)
    settled(page)
    wide = [o for o in page.evaluate(CUT) if 'math' in o['tag']]
    assert wide and all(o['sign'] for o in wide)
    page.context.close()
    page, _ = opened(browser, 'rcl/table2.html', 390)
    left = page.evaluate("""() => { const box = document.querySelector('.cell_output:has(table), .table-wrapper');
        const cell = box.querySelector('td'), before = cell.getBoundingClientRect().left;
        box.scrollLeft = 1000; return [box.scrollLeft, cell.getBoundingClientRect().left - before] }""")
    assert left[0] > 0 and abs(left[1]) < 8, 'the first column stays'
    page.context.close()


def luminance(rgb):
    linear = [c/12.92 if c <= .04045 else ((c + .055)/1.055)**2.4 for c in (o/255 for o in rgb)]
    return .2126*linear[0] + .7152*linear[1] + .0722*linear[2]


@needs_browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_figures_grey_is_legible_on_the_page(browser, scheme):
    from dglit.style import GREY
    page, _ = opened(browser, 'index.html', 1300, scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor").strip('rgb()').split(',')
    a, b = luminance(map(int, ground)), luminance(bytes.fromhex(GREY[1:]))
    assert (max(a, b) + .05)/(min(a, b) + .05) >= 4.5
    page.context.close()


@needs_browser
@pytest.mark.parametrize('query,href', [('margin', 'rcl/loss'), ('75%', 'irm/colored_mnist'), ('table 2', 'rcl/table2'),
                                        ('reproduce table 2 cluster', 'guides/gpu_and_cluster'), ('multi GPU', 'foundations/several_cards'),
                                        ('IRM CSV sites', 'guides/own_images'), ('out of memory', 'guides/gpu_and_cluster'),
                                        ('cost memory time', 'guides/gpu_and_cluster'), ('CSV images group', 'guides/own_images'),
                                        ('DomainBed names', 'guides/domainbed'), ('list of all methods', 'guides/all_methods'),
                                        ('ONNX', 'foundations/saving'), ('without fastai', 'foundations/methods'), ('licence cite', 'index')])
def test_the_search_finds(browser, query, href):
    page, wrong = opened(browser, f'search.html?q={quote(query)}', 1300)
    page.wait_for_selector('#search-results li a')
    found = [o.get_attribute('href') for o in page.locator('#search-results li a').all()][:8]
    assert any(href in o for o in found) and not wrong, found
    page.context.close()


@needs_browser
def test_a_result_shows_the_words(browser):
    "Where the page has most of them, code left out."
    page, _ = opened(browser, f"search.html?q={quote('patient slide scene')}", 1300)
    first = page.wait_for_selector('#search-results li:has(a[href*="own_images"]) p.context').inner_text().lower()
    assert all(o in first for o in ('patient', 'slide', 'scene')), first
    page.context.close()


@needs_browser
def test_the_menu_begins_where_the_page_stands(browser):
    page, _ = opened(browser, 'family/tables.html', 1300)
    top = page.evaluate("document.querySelector('.sidebar-tree .current-page').getBoundingClientRect().top")
    assert 0 < top < 800
    page.context.close()


def test_no_link_stands_in_a_link(site, pages):
    "A symbol in backquotes is a link already: brackets round it would be read as they are."
    for name in pages: assert not re.search(r'\]\([\w./#-]+\.ipynb', re.sub('<[^>]*>', '', (site/name).read_text(encoding='utf-8'))), name


def test_symbols_lead_to_what_is_meant(site):
    "Names that the command has as well as a module are the module's, but for the command's own page."
    for page in site.rglob('*.html'):
        if page.name in ('cli.html', 'genindex.html', 'new_images.html') or '_static' in page.parts: continue
        assert not re.search(r'cli\.html#(evaluate|report|train|demo)"><', page.read_text(encoding='utf-8')), page
