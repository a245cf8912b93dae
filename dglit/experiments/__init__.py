"A run and its description, many runs, a search, tables beside published ones."
from .record import Run, read_runs
from .run import run
from .search import Search, between
from .spec import Part, Recipe, Spec
from .sweep import sweep
from .tables import Published, Row, Table, crossed, plot_table, summarise
