"What the results pages say must hold in the records that they are drawn from."
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from dglit.data.loaders import data_hash
from dglit.data.mnist import load_mnist
from dglit.data.mnist_mp import mnist_mp, mnist_plain
from dglit.experiments.run import check
from dglit.experiments.tables import TABLES, accuracies, read_runs, summarise, training
from dglit.learner import select_epoch

RESULTS = Path(__file__).parent.parent/'nbs'/'results'
RUNS = {t: read_runs(RESULTS/f'{t}.jsonl') for t in TABLES}
ALL = [r for runs in RUNS.values() for r in runs]


@pytest.mark.parametrize('r', ALL, ids=lambda r: f'{r.spec.row}-{r.spec.seed}')
def test_records_are_whole(r):
    check(r.spec)
    assert r.status == 'done' and len(r.curve) == r.spec.epochs == 10 and r.spec.source == 'mnist'
    assert r.selected == select_epoch(r.curve, 'best-valid')
    assert r.metrics == {k: r.curve[r.selected][k] for k in r.metrics} and list(r.metrics)[0] == 'valid'
    row = TABLES[r.spec.table].row(r.spec.row)
    assert training(replace(r.spec, seed=0)) == training(row.spec)


def test_no_run_is_counted_twice():
    assert len({repr(training(r.spec)) for r in ALL}) == len(ALL)


def test_runs_saw_the_same_data():
    "One fingerprint for each dataset and setting, over all seeds and methods."
    seen = {}
    for r in ALL: seen.setdefault((r.spec.dataset, repr(r.spec.data)), set()).add(r.data_hash)
    assert all(len(o) == 1 for o in seen.values()) and len({next(iter(o)) for o in seen.values()}) == len(seen)


def mnist():
    try: return load_mnist(download=False)
    except ValueError: return None


@pytest.mark.skipif(mnist() is None, reason='needs MNIST on disk: set DGLIT_DATA')
def test_fingerprints_are_those_of_the_data():
    for dataset, make in dict(mnist_mp=mnist_mp, mnist_plain=mnist_plain).items():
        assert {r.data_hash for r in ALL if r.spec.dataset == dataset and not r.spec.data} == {data_hash(make(mnist()))}




T2 = TABLES['rcl-table2']
SUMMARY = summarise(T2, ALL)
TEST = SUMMARY[SUMMARY.domain == 'test'].set_index('row')
VALID = SUMMARY[SUMMARY.domain == 'valid'].set_index('row')


def test_every_row_has_runs():
    assert (TEST.n >= 1).all() and (TEST.n[['erm', 'rcl-0.9', 'rcl-0.9-early', 'rcl-inf']] >= 3).all()


def test_plain_training_fails_on_grey(): assert TEST['mean']['erm'] <= 35 and VALID['mean']['erm'] > 99.5


def test_no_margin_keeps_nine_tenths():
    assert TEST['mean']['rcl-inf'] >= 85 and VALID['mean']['rcl-inf'] <= 98
    assert TEST['mean']['rcl-inf'] > 0.9*TEST['mean']['erm-original']


def test_margins_rank_as_published():
    margins = ['rcl-0.2', 'rcl-0.4', 'rcl-0.6', 'rcl-0.8', 'rcl-0.9', 'rcl-inf']
    assert list(TEST['mean'][margins].sort_values().index) == list(TEST.published[margins].sort_values().index) == margins
    assert TEST['mean']['rcl-0.9-early'] > TEST['mean']['rcl-0.9']


def test_rows_lie_near_the_published():
    assert ((TEST['mean'] - TEST.published).abs() <= 2*TEST.published_std).sum() >= 7


def test_reading(): # the open points
    s = summarise(TABLES['rcl-open-points'], ALL)
    t = s[s.domain == 'test'].set_index('row')['mean']
    assert t['mean-inf'] < 40                                   # the mean does nothing
    assert t['batch-inf'] < TEST['mean']['rcl-inf'] - 5          # extremes over the batch fall short


def test_figure_3_shows_what_the_records_say():
    points = pd.read_csv(RESULTS/'rcl-figure3.csv')
    assert list(points.groupby(['row', 'domain'], sort=False).size()) == [500]*6
    for (row, domain), p in points.groupby(['row', 'domain']):
        record = next(r for r in ALL if r.spec.row == row and r.spec.seed == 0)
        assert abs(100*p.correct.mean() - record.metrics[domain]) < 8     # five hundred of the ten thousand digits
