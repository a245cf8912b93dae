"""The rendered site: every link leads somewhere, nothing is fetched from elsewhere, and in a real browser nothing overflows, every formula is
drawn and the search finds. Needs `pip install -e '.[docs]'`; the browser tests need Chromium."""
import functools, html.parser, http.server, os, shutil, subprocess, sys, threading
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MISSING = [o for o in ('sphinx', 'myst_nb', 'furo') if not find_spec(o)]
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -e '.[docs]'")
needs_browser = pytest.mark.skipif(not BROWSER or not find_spec('playwright'), reason='needs Chromium on the path, and playwright')


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the rendered site."
    out = tmp_path_factory.mktemp('site')/'html'
    done = subprocess.run([sys.executable, ROOT/'docs/render.py', str(out)], capture_output=True, text=True)
    assert done.returncode == 0 and 'WARNING' not in done.stderr, done.stderr[-3000:]
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


@needs_browser
@pytest.mark.parametrize('width', [1300, 390])
@pytest.mark.parametrize('name', ['index.html', 'rcl/story.html', 'rcl/loss.html', 'cim/table.html'])
def test_in_a_browser(browser, name, width):
    page, wrong = opened(browser, name, width)
    page.wait_for_function("[...document.querySelectorAll('.math')].every(o => o.querySelector('mjx-container'))")
    assert not wrong and page.locator('mjx-merror').count() == 0
    assert page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth') <= 0
    assert page.evaluate("[...document.images].every(o => o.complete && o.naturalWidth > 0)")
    page.context.close()


@needs_browser
def test_the_search_finds_margin(browser):
    page, wrong = opened(browser, 'search.html?q=margin', 1300)
    page.wait_for_selector('#search-results li a')
    assert any('rcl/loss' in o.get_attribute('href') for o in page.locator('#search-results li a').all()) and not wrong
    page.context.close()
