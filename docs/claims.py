"""Every figure in the prose of the pages and what holds it: `python docs/claims.py`, a table in Markdown.

A figure is a number with a unit, `66%`, `12 points`, `1.3 times`, or one with a deviation, `65.9 ± 2.6`. It is held by
the outputs or the code of its own page, by a test, or by the outputs of another page: the first of these where it
stands, rounded as the prose has it, is named. What none of them holds and is not in `ONCE` is marked, and fails
tests/test_claims.py: give it a cell, or leave it out."""
import json, re, sys
from pathlib import Path

from glossary import ROOT, markdown

UNITS = 'points? times seconds? minutes? hours? s ms GiB MB seeds runs trainings rows'.split()
WORDS = dict(zip('two three four five six seven eight nine ten eleven twelve'.split(), range(2, 13)))
ONCE = {'28.6%': "DomainBed's own figure", '58.5%': "DomainBed's own figure", '13 minutes': 'seen once',
        '51 GiB': 'seen once', '66 seconds': 'seen once'} # what was seen once has no record but the sentence
FIGURE = re.compile(rf"(?<![\w.§/-])(\d[\d,]*(?:\.\d+)?|{'|'.join(WORDS)})(?: ± ([\d.]+)|%| (?:{'|'.join(UNITS)})(?![\w-]))")
NUMBER = re.compile(r'\d+(?:,\d{3})*(?:\.\d+)?')


def value(text): return float(WORDS.get(text, text.replace(',', '') if isinstance(text, str) else text))


def code_of(nb):
    "What a page computes and shows: its code, and what it printed."
    cells = json.loads(Path(nb).read_text(encoding='utf-8'))['cells']
    code, shown = [], []
    for c in cells:
        if c['cell_type'] != 'code': continue
        code.append(''.join(c['source']))
        for o in c['outputs']:
            shown += [''.join(o.get('text', ''))] + [''.join(v) for k, v in o.get('data', {}).items() if k.startswith('text/')]
    return re.sub('<[^>]*>', ' ', '\n'.join(shown)), '\n'.join(code)


def holds(numbers, text):
    "Is a number there that the prose's is the rounding of?"
    if not any(c.isdigit() for c in text): return float(WORDS[text]) in {round(o) for o in numbers}
    decimals = len(text.partition('.')[2])
    return value(text) in {round(o, decimals) for o in numbers} | {round(100*o, decimals) for o in numbers if o <= 1}


def numbers(text): return {value(o) for o in NUMBER.findall(text)}


def claims():
    "For each figure of the prose: page, figure, its sentence's piece, and what holds it."
    pages = sorted((ROOT/'nbs').rglob('[0-9]*.ipynb')) + [ROOT/'nbs/index.ipynb']
    shown = {p: tuple(map(numbers, code_of(p))) for p in pages}
    speed = ROOT/'benchmarks/README.md'
    texts = {p: markdown(p) for p in pages} | {speed: speed.read_text(encoding='utf-8')}
    tested = numbers((ROOT/'tests/test_claims.py').read_text(encoding='utf-8'))
    for page, text in texts.items():
        text = re.sub(r'(?s)\$\$.+?\$\$|`[^`\n]*`', ' ', re.sub(r'\]\([^)]*\)', ']', text))
        for m in FIGURE.finditer(text):
            own = [k for k, o in zip(('its outputs', 'its code'), shown.get(page, ())) if holds(o, m[1])]
            others = [p.relative_to(ROOT/'nbs').as_posix() for p, o in shown.items() if p != page and '.' in m[1] and holds(o[0], m[1])]
            held = own + ['test_claims.py']*holds(tested, m[1]) + others + [ONCE.get(m[0], '')]
            if page == speed: held.append('measured by hand')
            around = ' '.join(text[max(0, m.start() - 60):m.end() + 40].split())
            yield page.relative_to(ROOT).as_posix(), m[0], around, next(filter(None, held), '')


if __name__ == '__main__':
    rows = list(claims())
    wanted = [r for r in rows if not r[3]] if '--free' in sys.argv else rows
    print('| page | figure | where it stands | held by |\n|---|---|---|---|')
    for r in wanted: print('| ' + ' | '.join(o.replace('|', '/') for o in r) + ' |')
    print(f'\n{len(rows)} figures, {sum(not r[3] for r in rows)} held by nothing', file=sys.stderr)
