"""The glossary's abbreviations and symbols, and what a page uses without saying what it means.

A page must expand an abbreviation, "empirical risk minimization (ERM)", link it, or leave it to the glossary; a
Greek letter it must introduce, "with parameters $\\phi$", or leave it to the glossary's line for its chapter."""
import json, re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GLOSSARY = ROOT/'nbs/guides/90_glossary.ipynb'
ABBREVIATION = re.compile(r'(?<![\w/.])(?:[A-Za-z]-)?\w*[A-Z]{2}[A-Za-z]*\d?(?:-(?:[A-Z]{2}\w*|\d))?(?![\w/]|\.\w)')
NAMES = {'README', 'CONTRIBUTING', 'CHANGELOG', 'NVIDIA', 'UTF', 'MB', 'GB', 'KB', 'OK'}  # of files, units and the like
VENUE = r'\b[A-Z]\w*[A-Z]+(?: Workshops)? (?:19|20)\d\d'                   # ICML 2021
GREEK = ('alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi '
         'omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell odot nabla').split()
LETTERS = {**dict(zip('αβγδεζηθκλμνξπρστφχψω', 'alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi '
                      'rho sigma tau phi chi psi omega'.split())), '∇': 'nabla', 'ℓ': 'ell', '⊙': 'odot'}
SYMBOL = re.compile(r'\\(' + '|'.join(GREEK) + r')(?![A-Za-z])|([' + ''.join(LETTERS) + '])')


def markdown(nb):
    "A notebook's Markdown, without fenced code."
    cells = json.loads(Path(nb).read_text(encoding='utf-8'))['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.sub(r'(?s)```.*?```', '', text)


def rows(section):
    "The lines of a table of the glossary, as lists of cells."
    text = markdown(GLOSSARY).split(f'## {section}\n')[1].split('\n## ')[0]
    lines = [[c.strip() for c in line.strip('|').split(' | ')] for line in text.splitlines() if line.startswith('|')]
    return lines[2:]


def abbreviations():
    "What each abbreviation stands for."
    return {a: long for names, long, _ in rows('Abbreviations') for a in names.strip('*| ').split(', ')}


def greek(text): return {m[1] or LETTERS[m[2]] for m in SYMBOL.finditer(text)}


def symbols():
    "Greek letter -> the chapters for which the glossary has a line on it."
    found = {}
    for shown, chapters, _ in rows('Symbols'):
        for o in greek(shown): found.setdefault(o, set()).update(chapters.split(', '))
    return found


CHAPTERS = dict(rcl='RCL', rivals="RCL's rivals", irm='IRM', cim='CIM', foundations='foundations',
                family='the family of IRM', photographs='photographs')


def prose(text):
    "Without code, formulas, and where links lead."
    text = re.sub(r'(?s)\$\$.+?\$\$|\$[^$\n]+?\$|`[^`\n]*`', ' ', text)
    return re.sub(VENUE, ' ', re.sub(r'\]\([^)]*\)', ']', text))


def explained(word, text):
    "Is `word` expanded on the page, in brackets or emphasised, cited, or part of a link?"
    w = re.escape(word)
    return re.search(rf'[\w*\"”]\s\([^()]*\b{w}s?\b|\*{w}\*|\b{w} \([A-Z][^()]*\d{{4}}|\[[^\]]*\b{w}\b[^\]]*\]\(', text)


def introduced(letter, text):
    "Does the page say what `letter` is: Let $.$ be, a mean $.$, $.$ is?"
    s = r'\$?(?:\\' + letter + '|' + ''.join(k for k, v in LETTERS.items() if v == letter) + r')(?:_\w)?\$?'
    if not any(v == letter for v in LETTERS.values()): s = r'\$\\' + letter + r'(?:_\w)?\$'
    return re.search(rf'(?:[Ll]et|[Ww]here|parameters|with) {s}|\b(?:an?|the)(?: [\w-]+){{1,3}},? {s}'
                     rf'|{s} (?:is|are|be|being|stands|multiplies)\b', text)


def unexplained(nb):
    "The abbreviations and Greek letters that neither the page nor the glossary explains."
    text, chapter, known, lines = markdown(nb), Path(nb).parent.name, abbreviations(), symbols()
    words = {o.removesuffix('s') for o in ABBREVIATION.findall(prose(text))} - NAMES
    there = {'everywhere', CHAPTERS.get(chapter)} if Path(nb).name != GLOSSARY.name else set().union(*lines.values())
    return sorted([o for o in words if o not in known and not explained(o, text)] +
                  [o for o in greek(text) if not lines.get(o, set()) & there and not introduced(o, text)])


APART = re.compile(r'(?sm)(```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|^#.*?$|'
                   r'\*\*[^*]*\*\*|\*[^*\n]+\*|<[^>]*>)')


def linked(texts, link):
    "A page's Markdown texts with the first mention of what the glossary alone explains led there."
    text, known, seen = '\n\n'.join(texts), abbreviations(), set()

    def to_glossary(found):
        word = found[0].removesuffix('s')
        named = found.string[:found.start()].endswith(('Colored ', 'Rotated '))  # part of a name
        if word not in known or word in seen or named: return found[0]
        seen.add(word)
        return found[0] if explained(word, text) else f'[{found[0]}]({link} "{known[word]}")'

    def one(text):
        parts = APART.split(text)
        parts[::2] = [ABBREVIATION.sub(to_glossary, o) for o in parts[::2]]
        return ''.join(parts)
    return [one(o) for o in texts]
