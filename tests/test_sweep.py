"The engine when things go wrong: killed, full, damaged, twice at once, elsewhere."
import json, os, resource, signal, subprocess, sys, time
from dataclasses import replace

import pytest

from dglit.core import DglitError
from dglit.experiments.run import Run, Spec
from dglit.experiments.sweep import record_name, seconds_left, sweep, sweep_with_progress
from dglit.experiments.tables import TABLES, read_runs, specs_of

T2 = TABLES['rcl-table2']
SHORT = dict(source='digits', epochs=1, bs=256, precision='fp32')
SPECS = specs_of(T2, 6, ['erm'], **SHORT)
PROGRAM = '''
import sys
from dglit.experiments.sweep import sweep
from dglit.experiments.tables import TABLES, specs_of
if __name__ == '__main__':
    specs = specs_of(TABLES['rcl-table2'], 6, ['erm'], source='digits', epochs=2, bs=256, precision='fp32')
    sweep(specs, sys.argv[1], jobs=2, finished=lambda r, *_: print('ran', r.spec.seed, r.seconds, flush=True))
'''


def program(folder, **kwargs):
    "A sweep of six runs in a process group of its own."
    return subprocess.Popen([sys.executable, '-c', PROGRAM, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs)


def records(folder): return {o.name: (o.stat().st_mtime_ns, o.read_text()) for o in folder.glob('*.json')}
def ran(out): return sorted((int(o.split()[1]), float(o.split()[2])) for o in out.splitlines() if o.startswith('ran'))


@pytest.mark.parametrize('victim', ['all', 'parent'])
def test_killed_and_resumed(tmp_path, victim):
    "kill -9 in the middle: what was done is whole and stays; the rest runs, once."
    p = program(tmp_path)
    seen = [p.stdout.readline() for _ in range(2)]
    (os.killpg if victim == 'all' else os.kill)(p.pid, signal.SIGKILL)
    p.wait()
    before = records(tmp_path)
    assert 2 <= len(before) < 6 and len(seen) == 2
    for _, text in before.values(): assert Run.from_json(text).status == 'done'
    out, err = program(tmp_path).communicate(timeout=300)
    after = records(tmp_path)
    assert len(after) == 6 and all(after[k] == v for k, v in before.items()), err
    assert len(ran(out)) == len(set(ran(out))) >= 6 - len(before) - 2     # workers that outlived their parent may have finished theirs
    assert not list(tmp_path.glob('.*.part')) and len(read_runs(tmp_path)) == 6


def test_two_sweeps_on_one_folder(tmp_path):
    "Each run is trained once, and both sweeps end with all of them."
    a, b = program(tmp_path), program(tmp_path)
    outs = [p.communicate(timeout=300) for p in (a, b)]
    written = records(tmp_path)
    assert a.returncode == b.returncode == 0 and len(written) == 6, outs
    told = sorted((r.spec.seed, r.seconds) for r in read_runs(tmp_path))         # a run that was done twice would tell two times
    assert set(ran(outs[0][0])) | set(ran(outs[1][0])) == set(told) and not list(tmp_path.glob('.*.lock'))


def test_a_run_under_way_elsewhere_is_waited_for(tmp_path):
    "A sweep that finds a run locked takes its record when it comes, and does not train it."
    from filelock import FileLock
    first = SPECS[0]
    r, = sweep([first], tmp_path/'other')
    code = f'''
import time, shutil
from filelock import FileLock
with FileLock({str(tmp_path/f".{record_name(first)}.lock")!r}):
    print('locked', flush=True); time.sleep(4)
    shutil.copy({str(tmp_path/"other"/record_name(first))!r}, {str(tmp_path)!r})
'''
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'locked\n'
    said = []
    runs = sweep(SPECS[:2], tmp_path, say=said.append)
    other.wait()
    assert [o.spec.seed for o in runs] == [0, 1] and runs[0] == r                # its record, to the second that it took
    assert said == ['waiting for 1 runs that another sweep has under way']


def test_a_failure_is_recorded_and_the_sweep_goes_on(tmp_path):
    bad = replace(SPECS[0], data=dict(size=12))
    said = []
    runs = sweep([bad, *SPECS[:2]], tmp_path, jobs=2, say=said.append)
    assert [r.status for r in runs] == ['failed', 'done', 'done']
    saved, = [r for r in read_runs(tmp_path) if r.status == 'failed']
    assert 'Traceback' in saved.error and 'size 12 is smaller' in saved.error
    assert len(said) == 1 and 'erm, seed 0 failed' in said[0] and 'tries it again' in said[0] and record_name(bad) in said[0]
    kept = records(tmp_path)
    sweep([bad, *SPECS[:2]], tmp_path, say=said.append)                          # tried again; the others are not
    changed = {k for k, v in records(tmp_path).items() if kept[k] != v}
    assert len(said) == 2 and changed <= {record_name(bad)}


def test_divergence_is_a_result_not_a_failure(tmp_path):
    wild = replace(SPECS[0], lr=1e9)
    r, = sweep([wild], tmp_path)
    assert r.status == 'diverged'
    kept = records(tmp_path)
    assert sweep([wild], tmp_path) == [r] and records(tmp_path) == kept


@pytest.mark.parametrize('text,says', [('{"half', 'Unterminated'), ('', None), ('[]', 'is no record'), ('{"schema": 99, "versions": {"dglit": "9"}}', 'schema 99')])
def test_a_strange_record_is_reported_and_left_alone(tmp_path, text, says):
    strange = tmp_path/record_name(SPECS[0])
    strange.write_text(text)
    said = []
    runs = sweep(SPECS[:2], tmp_path, say=said.append)
    assert strange.read_text() == text and [r.spec.seed for r in runs] == [1]
    assert len(said) == 1 and strange.name in said[0] and (says or 'is no record') in said[0] and 'left out' in said[0]


def test_a_full_disk_is_found_before_training(tmp_path):
    "A limit on file sizes stands for the disk: no run has begun when the error comes."
    out = tmp_path/'runs'
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    start = time.time()
    p = program(out, preexec_fn=limit)
    text, err = p.communicate(timeout=300)
    assert p.returncode != 0 and 'cannot write 6 records to' in err and 'free some room' in err
    assert text == '' and not list(out.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DglitError, match='cannot write'): sweep(SPECS, tmp_path/'runs')


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path/'runs').write_text('')
    with pytest.raises(DglitError, match='cannot write 6 records'): sweep(SPECS, tmp_path/'runs')


def test_missing_data_is_found_before_training(tmp_path, monkeypatch):
    from dglit.experiments import sweep as module
    def missing(): raise DglitError('no MNIST here')
    monkeypatch.setitem(module.SOURCES, 'mnist', missing)
    module._digits.cache_clear()
    with pytest.raises(DglitError, match='no MNIST here'): sweep([replace(SPECS[0], source='mnist')], tmp_path, jobs=2)
    assert not records(tmp_path)


def test_a_dask_cluster_of_two_workers(tmp_path):
    "The same curves as on one machine's processes, on workers that do not see the folder's name either."
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        seen = []
        runs = sweep(SPECS[:4], tmp_path/'dask', jobs=2, finished=lambda r, done, total: seen.append(done), backend='dask', address=cluster.scheduler_address)
    assert seen == [1, 2, 3, 4] and len(read_runs(tmp_path/'dask')) == 4
    here = sweep(SPECS[:1], tmp_path/'here')
    assert [o['valid'] for o in here[0].curve] == pytest.approx([o['valid'] for o in runs[0].curve], abs=2)


def test_a_ray_cluster_of_two_workers(tmp_path):
    pytest.importorskip('ray')
    runs = sweep(SPECS[:2], tmp_path, jobs=2, backend='ray')
    assert [r.status for r in runs] == ['done']*2 and len(read_runs(tmp_path)) == 2


def test_a_backend_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(DglitError, match=r"pip install 'dglit\[dask\]'"): sweep(SPECS[:1], tmp_path, backend='dask')


def test_time_left():
    made = lambda method, epochs, seconds: Run(Spec(method=method, epochs=epochs), 'done', {}, 0, [dict(epoch=e) for e in range(epochs)], seconds, '', {}, '')
    runs = [made('erm', 2, 20.), made('jigsaw', 2, 60.)]
    assert seconds_left([Spec(), Spec(method='jigsaw')], runs) == 100 + 300
    assert seconds_left([Spec(), Spec(method='jigsaw')], runs, jobs=2) == 200
    assert seconds_left([Spec()], runs, jobs=8) == 100                           # one run cannot be shared
    assert seconds_left([Spec()], []) is None and seconds_left([], []) == 0


def test_progress_tells_what_is_done(tmp_path, capsys):
    sweep_with_progress(SPECS[:2], tmp_path)
    out = capsys.readouterr().out
    assert 'erm, seed 0: valid' in out and 'erm, seed 1: valid' in out and '2/2' in out and '0:00:00 left' in out
