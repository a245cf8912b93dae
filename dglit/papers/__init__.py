"The papers' tables as data: rows, trainings, rules, published figures. A module a paper."
from . import cim, irm, rcl

TABLES = {t.name: t for paper in (rcl, irm, cim) for t in paper.TABLES}
SEARCHES = {f'{name}-{k}': search for name,paper in dict(irm=irm, cim=cim).items() for k,search in paper.SEARCHES.items()}
