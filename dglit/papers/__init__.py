"The papers' tables as data: rows, trainings, rules, published figures. A module a paper."
from . import cim, family, irm, rcl

TABLES = {t.name: t for paper in (rcl, irm, cim, family) for t in paper.TABLES}
SEARCHES = {f'{name}-{k}': search for name,paper in dict(irm=irm, cim=cim, family=family).items()
            for k,search in paper.SEARCHES.items()}
