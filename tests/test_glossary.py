"Each page explains its abbreviations and Greek letters, or the glossary does."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import glossary as g

NBS = sorted(o for o in (ROOT/'nbs').rglob('*.ipynb') if '/.' not in o.as_posix())


@pytest.mark.parametrize('nb', NBS, ids=[o.relative_to(ROOT/'nbs').as_posix() for o in NBS])
def test_page_explains_itself(nb):
    if nb.name in ('91_references.ipynb', '20_literature.ipynb'): return  # titles of papers
    assert g.unexplained(nb) == [], \
        'expand it, "empirical risk minimization (ERM)", link it, or give it a line in guides/90_glossary'


def test_what_is_not_explained_is_found(tmp_path):
    import json
    def left(text):
        (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=[dict(cell_type='markdown', source=text)])))
        return g.unexplained(tmp_path/'x.ipynb')
    assert left('XYZ helps, and so does $\\zeta$.') == ['XYZ', 'zeta']
    assert left('A long name (XYZ) with parameters $\\zeta$; `ABC`, $DEF$, [GHI](http://JKL.org), ICML 2021, ERM') == []
