"""Pictures of the rendered pages, to look at: `python docs/screenshots.py SITE FOLDER [PAGE ...]`.

Each page at 1300 and at 390 pixels, light and dark, whole: FOLDER/rcl-loss-390-dark.png. Without pages named, all.
It prints what is cut off without a sign. Needs Chromium and playwright (`pip install -e '.[docs]'`)."""
import shutil, sys
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--allow-file-access-from-files',
         '--hide-scrollbars=false']
# Elements whose content is wider than they are, and those of them that show no bar and no shadow.
CUT = """() => [...document.querySelectorAll('article pre, article .math, article .cell_output, article .table-wrapper, article img, article h1, article h2, article h3, article h4')]
  .filter(o => o.scrollWidth > o.clientWidth + 1 && o.clientWidth > 0 && getComputedStyle(o).display != 'inline')
  .map(o => ({tag: o.tagName + '.' + o.className, over: o.scrollWidth - o.clientWidth,
              text: o.textContent.trim().slice(0, 60),
              sign: getComputedStyle(o).overflowX == 'auto' && getComputedStyle(o).backgroundImage.includes('gradient')}))"""


def settled(page):
    "Wait until every formula is drawn."
    page.wait_for_function("[...document.querySelectorAll('.math')].every(o => o.querySelector('mjx-container'))")


def pictures(site, folder, pages=()):
    from playwright.sync_api import sync_playwright
    site, folder = Path(site).resolve(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = sorted(o.relative_to(site).as_posix() for o in site.rglob('*.html') if '_static' not in o.parts)
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        for width, scheme in ((1300, 'light'), (1300, 'dark'), (390, 'light'), (390, 'dark')):
            context = chromium.new_context(viewport=dict(width=width, height=900), color_scheme=scheme)
            page = context.new_page()
            for name in pages or every:
                page.goto((site/name).as_uri())
                settled(page)
                for o in page.evaluate(CUT):
                    if scheme == 'light' and not o['sign']: print(f'{name} at {width}: {o}')
                shot = folder/f"{name.removesuffix('.html').replace('/', '-')}-{width}-{scheme}.png"
                page.screenshot(path=shot, full_page=True)
            context.close()
        chromium.close()


if __name__ == '__main__': pictures(*sys.argv[1:3], sys.argv[3:])
