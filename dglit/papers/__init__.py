"The papers' tables as data: rows, trainings, rules, published figures. A module a paper."
from . import cim, family, irm, photographs, rcl

TABLES = {t.name: t for paper in (rcl, irm, cim, family, photographs) for t in paper.TABLES}
PAPERS = dict(irm=irm, cim=cim, family=family, birds=photographs)
SEARCHES = {f'{name}-{k}': search for name,paper in PAPERS.items() for k,search in paper.SEARCHES.items()}
