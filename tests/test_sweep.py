"The engine when things go wrong: killed, full, damaged, twice at once, elsewhere."
import errno, io, json, os, resource, signal, subprocess, sys, tempfile, threading, time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock, Timeout

from dglit.core import DataError, DglitError, read_text, room, shown, write_whole
from dglit.experiments.record import Run, read_runs
from dglit.experiments.run import failed
from dglit.experiments.spec import Part, Spec
from dglit.experiments.sweep import record_name, seconds_left, sweep, sweep_with_progress, writable
from dglit.experiments.tables import specs_of
from dglit.papers import TABLES

module = sys.modules['dglit.experiments.sweep']
pytestmark = pytest.mark.xdist_group('sweep')  # they kill and time processes: never two at once
TINY = Spec(model='mlp', digits='digits', size=28, hidden=[8], epochs=1, bs=256, precision='fp32')
SPECS = [replace(TINY, seed=i) for i in range(6)]
PROGRAM = '''
import os, sys
from dataclasses import replace
from dglit.experiments.spec import Spec
from dglit.experiments.sweep import sweep
tiny = Spec(model='mlp', digits='digits', size=28, hidden=[8], epochs=EPOCHS, bs=256, precision='fp32')
def finished(r, *_): os.write(1, f'ran {r.spec.seed} {r.seconds}\\n'.encode())
sweep([replace(tiny, seed=i) for i in range(6)], sys.argv[1], jobs=2, finished=finished)
'''                                                         # a script without a guard for its main part


def program(folder, epochs=3, **kwargs):
    "A sweep of six runs in a process group of its own."
    return subprocess.Popen([sys.executable, '-c', PROGRAM.replace('EPOCHS', str(epochs)), str(folder)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs)


def gone(group, within=10):
    "Whether a process group has no process left."
    end = time.time() + within
    while time.time() < end:
        try: os.killpg(group, 0)
        except ProcessLookupError: return True
        time.sleep(.05)
    os.killpg(group, signal.SIGKILL)
    return False


def done(spec, domains=('valid', 'grey'), seconds=1.):
    "A record of a run whose last epoch alone was measured."
    measured = {'epoch': spec.recipe.epochs-1, **{k: 50. for k in domains}}
    return replace(failed(spec, ''), status='done', measured=[measured], domains=[*domains], seconds=seconds)


def records(folder): return {o.name: (o.stat().st_mtime_ns, o.read_text()) for o in folder.glob('*.json')}
def ran(out): return sorted((int(o.split()[1]), float(o.split()[2])) for o in out.splitlines() if o.startswith('ran'))
def left_over(folder): return [o.name for o in folder.rglob('.*')]


@pytest.fixture(autouse=True)
def no_hang():
    "What hangs fails."
    def late(*_): raise TimeoutError('hangs')
    signal.signal(signal.SIGALRM, late); signal.alarm(600)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch): monkeypatch.setattr(module, 'cpu_count', lambda: 1)


@pytest.fixture
def no_picture(monkeypatch): monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, file, **_: file.write(b'a picture'))


@pytest.fixture
def at_once(monkeypatch):
    "Runs that train nothing: what is tested is the engine around them."
    monkeypatch.setattr(module, 'run_or_record', lambda spec: done(spec, seconds=time.time()))


# killed

def test_killed_and_resumed(tmp_path):
    "The parent, by SIGTERM, then all, by SIGKILL: what was done is whole and stays; no worker is left; the rest runs, once."
    kept, told = {}, []
    for kill, sign in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGKILL)):
        p = program(tmp_path, epochs=10)
        told.append(p.stdout.readline())
        kill(p.pid, sign)
        assert p.wait() == -sign and gone(p.pid)
        now = records(tmp_path)
        assert len(kept) < len(now) < 6 and kept.items() <= now.items()
        kept = now
    for _, text in kept.values(): assert Run.from_json(text).status == 'done'
    runs = sweep([replace(o, epochs=10) for o in SPECS], tmp_path, finished=lambda r, *_: told.append(f'ran {r.spec.seed} 0'))
    assert len(runs) == len(read_runs(tmp_path)) == 6 and kept.items() <= records(tmp_path).items() and not left_over(tmp_path)
    assert len({o for o, _ in ran('\n'.join(told))}) == len(told)                 # no run was told of twice


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='no /proc to find the worker by')
def test_one_worker_of_two_is_killed(tmp_path, monkeypatch):
    "Its run has failed, with the likely reason; another worker takes its place; the others are kept."
    long = replace(TINY, epochs=10**6, seed=99)
    lock, started, said = str(module._lock(tmp_path/record_name(long))), [], []
    start = module._Workers._start
    monkeypatch.setattr(module._Workers, '_start', lambda self: started.append(start(self)) or started[-1])
    def holds(p): return any(os.readlink(o) == lock for o in Path(f'/proc/{p.pid}/fd').iterdir() if o.is_symlink())
    def finished(r, done, total):
        if done > 1: return
        while not (held := [p for p in started if holds(p)]): time.sleep(.05)            # on a busy machine it starts late
        victim, = held
        victim.kill()
    runs = sweep([long, *SPECS[:4]], tmp_path, jobs=2, finished=finished, say=said.append)
    assert [r.status for r in runs] == ['failed', *['done']*4] and len(started) == 3
    error, = [r.error for r in read_runs(tmp_path) if r.status == 'failed']
    assert 'killed by signal 9 (SIGKILL)' in error and 'memory' in error
    assert 'SIGKILL' in said[0] and 'fewer jobs: --jobs 1' in said[1] and len(said) == 2
    assert not left_over(tmp_path) and all(p.poll() is not None for p in started)


def test_what_killed_processes_leave_is_removed_and_what_is_held_is_not(tmp_path):
    stale, held = module._lock(tmp_path/record_name(SPECS[0])), module._lock(tmp_path/'held.json')
    for o in (stale, stale.with_suffix('.01234567.part')): o.write_text('x')
    with FileLock(held):
        part = held.with_suffix('.01234567.part')
        part.write_text('x')
        module._tidy(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([held, part])
    module._tidy(tmp_path)
    assert not left_over(tmp_path)


CTRL_C = {'demo': '''
import dglit.experiments.demo as d
fit = d.fit
def loud(*args): print('fitting', flush=True); return fit(*args)
d.fit = loud
''', 'reproduce': '''
from dataclasses import replace
import dglit.experiments.tables as t
one = t.specs_of
t.specs_of = lambda *args, **kwargs: [replace(o, model='mlp', epochs=1 + o.seed*10**6, precision='fp32') for o in one(*args, **kwargs)]
'''}


@pytest.mark.parametrize('command', [['demo', '--seeds', '1'],
                                     ['reproduce', 'rcl-table2', '--set', 'digits=digits', '--rows', 'erm', '--seeds', '3', '--jobs', '2']])
def test_ctrl_c(tmp_path, command):
    "One sentence, exit 130, nothing left over; in the demo no abort of its threads."
    code = CTRL_C[command[0]] + 'from dglit.cli import main; main()'
    p = subprocess.Popen([sys.executable, '-c', code, *command, '--out', str(tmp_path/'out')], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # which a program in the background ignores
    line = p.stdout.readline()                                                   # of the demo: it trains; of the sweep: the first run
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=60)
    said = [o for o in err.splitlines() if o]
    assert p.returncode == 130 and gone(p.pid), (line, out, err)
    assert len(said) == 1 and said[0].startswith('dglit: interrupted') and 'goes on' in said[0]
    assert not left_over(tmp_path) and (command[0] == 'demo' or len(read_runs(tmp_path/'out')) == 1)


# two at once

def test_two_sweeps_on_one_folder(tmp_path):
    "Each run is trained once, and both sweeps end with all of them."
    p, here = program(tmp_path), []
    while not left_over(tmp_path): time.sleep(.05)                               # both have begun
    mine = sweep([replace(o, epochs=3) for o in SPECS], tmp_path, finished=lambda r, *_: here.append((r.spec.seed, r.seconds)))
    out, err = p.communicate(timeout=200)
    assert p.returncode == 0 and len(mine) == len(records(tmp_path)) == 6, err
    told = sorted((r.spec.seed, r.seconds) for r in read_runs(tmp_path))         # a run that was done twice would tell two times
    assert set(ran(out)) | set(here) == set(told) and here and not left_over(tmp_path)


def test_a_run_under_way_elsewhere_is_waited_for(at_once, tmp_path):
    "A sweep that finds a run locked takes its record when it comes, and does not train it."
    r, = sweep(SPECS[:1], tmp_path/'other')
    name, held, said = record_name(SPECS[0]), threading.Event(), []
    def other():
        with FileLock(module._lock(tmp_path/name), thread_local=False):
            held.set()
            while not said: time.sleep(.05)
            (tmp_path/name).write_bytes((tmp_path/'other'/name).read_bytes())
    t = threading.Thread(target=other); t.start(); held.wait()
    runs = sweep(SPECS[:2], tmp_path, say=said.append)
    t.join()
    assert [o.spec.seed for o in runs] == [0, 1] and runs[0] == r                # its record, to the second that it took
    assert said == ['waiting for 1 runs that another sweep has under way']


def test_a_lock_that_cannot_be_removed_while_it_is_open(tmp_path, monkeypatch):
    "As on Windows: it is removed when it has been released."
    unlink = Path.unlink
    def windows(self, **kwargs):
        try:
            with FileLock(self, timeout=0): pass
        except Timeout: raise PermissionError(errno.EACCES, 'used by another process')
        unlink(self, **kwargs)
    monkeypatch.setattr(Path, 'unlink', windows)
    with module._locked(tmp_path/'.a.json.lock'): assert left_over(tmp_path)
    assert not left_over(tmp_path)
    with pytest.raises(ZeroDivisionError), module._locked(tmp_path/'.a.json.lock'): 1/0
    monkeypatch.undo()
    module._tidy(tmp_path)
    assert not left_over(tmp_path)


# runs that fail

def test_a_failure_is_recorded_and_the_sweep_goes_on(tmp_path):
    bad = replace(SPECS[0], size=12)
    said = []
    runs = sweep([bad, *SPECS[:2]], tmp_path, say=said.append)
    assert [r.status for r in runs] == ['failed', 'done', 'done']
    saved, = [r for r in read_runs(tmp_path) if r.status == 'failed']
    assert 'Traceback' in saved.error and 'size 12' in saved.error
    assert len(said) == 1 and 'erm, seed 0 failed' in said[0] and 'tries it again' in said[0] and record_name(bad) in said[0]
    kept = records(tmp_path)
    sweep([bad, *SPECS[:2]], tmp_path, say=said.append)                          # tried again; the others are not
    changed = {k for k, v in records(tmp_path).items() if kept[k] != v}
    assert len(said) == 2 and changed <= {record_name(bad)}


def test_divergence_is_a_result_not_a_failure(tmp_path):
    wild = replace(SPECS[0], lr=1e18)
    r, = sweep([wild], tmp_path)
    assert r.status == 'diverged'
    kept = records(tmp_path)
    assert sweep([wild], tmp_path) == [r] and records(tmp_path) == kept


# files that are no records

def strange(folder):
    "Files that are no records, by name; each is as one that stood there."
    text = done(TINY).to_json()
    def changed(**kwargs): return json.dumps({**json.loads(text), **kwargs}).encode()
    def fifo(o): os.mkfifo(o)
    def folder_(o): o.mkdir()
    def dangling(o): o.symlink_to('nowhere')
    def looped(o): o.symlink_to(o)
    makers = {'half': b'{"half', 'empty': b'', 'list': b'[]', 'schema': b'{"schema": 99, "versions": {"dglit": "9"}}', 'no-utf8': b'\xff\xfe{}',
              'deep': b'['*100_000, 'deeper': b'{"a":'*100_000, 'seed': changed(seed='x'), 'curve': changed(measured=None), 'curve2': changed(measured=[3]),
              'method': changed(methods=[dict(name='nope', settings={})]), 'digits': b'9'*10_000, 'domains': changed(domains=['nowhere']), 'status': changed(status='well'),
              'settings': changed(data=dict(name='mnist_mp', settings=None)), 'data': changed(data=[1]), 'nul': b'\0'*100,
              'fifo': fifo, 'folder': folder_, 'dangling': dangling, 'looped': looped}
    for k, f in makers.items(): f(folder/f'{k}.json') if callable(f) else (folder/f'{k}.json').write_bytes(f)
    (folder/'good.json').write_text(text)
    return makers


def test_bad_files_are_named_and_the_rest_is_read(tmp_path):
    makers = strange(tmp_path)
    good = read_runs(tmp_path, bad := [])
    assert [r.spec for r in good] == [TINY]
    assert sorted(o.split('.json')[0].split('/')[-1] for o in bad) == sorted(makers)
    for k in makers.keys() - {'folder'}:
        with pytest.raises(DglitError, match=f'{k}.json'): read_runs(tmp_path/f'{k}.json')


def test_a_sweep_leaves_bad_files_alone(tmp_path):
    makers = strange(tmp_path)
    specs, said = [replace(TINY, seed=i) for i in range(len(makers))], []
    for s, k in zip(specs, makers): os.rename(tmp_path/f'{k}.json', tmp_path/record_name(s))
    before = {o.name: os.lstat(o).st_mtime_ns for o in tmp_path.iterdir()}
    assert sweep(specs, tmp_path, say=said.append) == []
    assert {o.name: os.lstat(o).st_mtime_ns for o in tmp_path.iterdir()} == before
    assert len(said) == len(specs) and all('left out' in o and record_name(s) in o for s, o in zip(specs, said))


def test_a_report_goes_on_past_bad_files(no_picture, tmp_path, monkeypatch, capsys):
    from dglit import cli
    strange(tmp_path)
    row = cli_table().rows[0]
    write_whole(tmp_path/'row.json', done(row_spec(), row.published).to_json())
    monkeypatch.setattr(sys, 'argv', ['dglit', 'report', str(tmp_path)])
    try: cli.main()
    except SystemExit as e: assert not e.code
    out = capsys.readouterr().out
    assert row.label in out and 'fifo.json' in out and 'deep.json' in out and '\0' not in out


def cli_table(): return TABLES['rcl-table2']
def row_spec(): return specs_of(cli_table(), 1)[0]


def test_read_text(tmp_path):
    (tmp_path/'file').write_text('α\n')
    (tmp_path/'link').symlink_to('file')
    assert read_text(tmp_path/'file') == read_text(tmp_path/'link') == 'α\n'
    with pytest.raises(DataError, match='3 bytes, more than 2'): read_text(tmp_path/'file', most=2)
    for o in ('a\0b', 'x'*5000, tmp_path, '/dev/zero', tmp_path/'missing'):
        with pytest.raises(DataError, match='cannot read'): read_text(o)


# names and paths

WILD = ['/../../victim', '..', '../victim', '/tmp/victim', 'a\0b', 'a\nb', '\x1b[31mred', 'x'*5000, '\udcff', 'C:\\victim', 'con:', '*?', '😀'*100]


def test_the_name_of_a_record_is_one_of_a_file_in_the_folder(tmp_path):
    "Whatever a setting holds."
    names = {}
    for text in WILD:
        part = Part('rcl')
        object.__setattr__(part, 'settings', (('per', text), (text, 1)))         # what no check has seen
        names[text] = record_name(replace(TINY, methods=part))
    for o in names.values():
        assert write_whole(tmp_path/o, 'x').resolve().parent == tmp_path.resolve() and o.isascii() and o.isprintable() and not set(o) & set('/\\:*?')
    assert len(list(tmp_path.iterdir())) == len(WILD)


def each_changed(o, new):
    "A JSON value with each of its parts in turn replaced."
    yield new
    for k in o if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ():
        for v in each_changed(o[k], new): yield {**o, k: v} if isinstance(o, dict) else [*o[:k], v, *o[k+1:]]
    if isinstance(o, dict): yield {**o, new: new}


@pytest.mark.parametrize('text', WILD[:4])
def test_no_record_writes_outside_its_folder(no_picture, tmp_path, monkeypatch, text):
    "Whatever part of a record says so."
    from dglit import cli
    folder, good = tmp_path/'a'/'b'/'c', done(row_spec(), cli_table().rows[0].published).to_json()
    write_whole(folder/'good.json', good)
    changed = list(each_changed(json.loads(good), text))
    write_whole(folder/'all.jsonl', ''.join(json.dumps(o) + '\n' for o in [json.loads(good), *changed]))
    monkeypatch.chdir(folder)
    for path in (folder, folder/'all.jsonl'):
        monkeypatch.setattr(sys, 'argv', ['dglit', 'report', str(path)])
        try: cli.main()
        except SystemExit as e: assert not e.code
    assert len(changed) > 20 and {o for o in tmp_path.rglob('*') if o.is_file() and o.parent != folder} == set() and not os.path.exists('/tmp/victim')
    assert list(folder.glob('rcl-table2*.md')) and not list(folder.glob('*victim*'))


@pytest.mark.parametrize('path', ['a\0b', 'x'*5000, '/dev/null/runs'])
def test_paths_that_cannot_be(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for f in (lambda: sweep(SPECS, path), lambda: writable(path), lambda: read_runs(path), lambda: read_text(path)):
        with pytest.raises(DglitError) as e: f()
        assert '\0' not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_what_is_printed_steers_no_terminal(tmp_path):
    (tmp_path/'a\x1b[31m\n.json').write_text('{')
    read_runs(tmp_path, bad := [])
    with pytest.raises(DglitError) as e: read_runs(tmp_path/'b\x1b[31m')
    assert len(bad) == 1 and not any('\x1b' in o for o in (*bad, str(e.value)))
    assert shown('α −∞\n') == 'α −∞\n' and shown('\x1b\x07\x9b\u202e') == r'\x1b\x07\x9b\u202e'


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'utf-8'])
def test_any_encoding_will_do(no_picture, tmp_path, monkeypatch, encoding):
    "`list` and `report` have α, ∞ and − to print."
    from dglit import cli
    records = Path(__file__).parents[1]/'nbs'/'results'/'cim-background-mnist.jsonl'
    for command in ['list'], ['report', str(records), '--out', str(tmp_path)]:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, 'stdout', out); monkeypatch.setattr(sys, 'argv', ['dglit', *command])
        try: cli.main()
        except SystemExit as e: assert not e.code
        out.flush()
        assert out.buffer.getvalue()


# the disk

def test_a_full_disk_is_found_before_training(tmp_path):
    "A limit on file sizes stands for the disk: no run has begun when the error comes."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DglitError, match='cannot write 6 records to .* free 0.393 MB'): sweep(SPECS, tmp_path/'runs')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path/'runs').iterdir())


def test_room_is_asked_for_what_is_still_to_run_only(at_once, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, 'room', lambda folder, size, what: asked.append(size))
    first = sweep(SPECS[:2], tmp_path)
    assert sweep(SPECS[:2], tmp_path) == first and asked == [2 << 16]
    sweep(SPECS[:3], tmp_path)
    assert asked == [2 << 16, 1 << 16]
    import torch
    writable(tmp_path, model=torch.nn.Linear(1000, 10))
    assert asked[2] == (1 << 16) + 4*10_010


@pytest.mark.skipif(not hasattr(os, 'O_TMPFILE'), reason='files without a name are of Linux')
def test_the_room_is_tried_in_a_file_without_a_name(tmp_path, monkeypatch):
    "So that a kill leaves nothing."
    seen, fsync = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda f: seen.append((os.fstat(f).st_size, list(tmp_path.iterdir()))) or fsync(f))
    room(tmp_path, 3_000_000)
    assert seen == [(3_000_000, [])]


class Disk:
    "`write_whole` on a disk that is full the first `times` times for the paths that hold `where`."
    def __init__(self, monkeypatch, times, where='/'):
        self.times, self.where, self.write = times, where, module.write_whole
        monkeypatch.setattr(module, 'write_whole', self)
    def __call__(self, path, content):
        if self.where in str(path) and self.times > 0:
            self.times -= 1
            raise OSError(errno.ENOSPC, 'No space left on device')
        return self.write(path, content)


def test_the_disk_is_full_for_a_while(at_once, tmp_path, monkeypatch):
    "A training that has ended is held, and written when there is room."
    Disk(monkeypatch, 2)                                                         # the worker's try, and the sweep's
    said = []
    runs = sweep(SPECS[:2], tmp_path, say=said.append)
    assert [r.status for r in runs] == ['done']*2 and sorted(read_runs(tmp_path), key=lambda r: r.spec.seed) == runs
    assert len(said) == 1 and 'No space left' in said[0] and 'in memory' in said[0]


def test_the_disk_stays_full(at_once, tmp_path, monkeypatch):
    "The records go elsewhere, and that is said; and where there is no elsewhere they are printed."
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'elsewhere'))
    (tmp_path/'elsewhere').mkdir()
    Disk(monkeypatch, 99, 'runs')
    runs = sweep(SPECS[:2], tmp_path/'runs', say=(said := []).append)
    place, = (tmp_path/'elsewhere').iterdir()
    assert sorted(read_runs(place), key=lambda r: r.spec.seed) == runs and str(place) in said[-1] and len(said) == 3
    Disk(monkeypatch, 99)
    runs = sweep(SPECS[:2], tmp_path/'runs', say=(said := []).append)
    assert [Run.from_json(o) for o in said[-1].splitlines()[1:]] == runs


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_an_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DglitError, match='cannot write'): sweep(SPECS, tmp_path/'runs')


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path/'runs').write_text('')
    with pytest.raises(DglitError, match='cannot write 6 records'): sweep(SPECS, tmp_path/'runs')


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    f = write_whole(tmp_path/'deep'/'er'/('n'*255), 'old')                       # the longest name that there can be
    for name in ('replace', 'fsync'):                                            # an error at either, or Ctrl-C
        for error in (OSError(errno.EIO, 'error'), KeyboardInterrupt()):
            def fails(*_): raise error
            with monkeypatch.context() as m, pytest.raises(type(error)):
                m.setattr(os, name, fails)
                write_whole(f, 'new')
            assert f.read_text() == 'old' and list(f.parent.iterdir()) == [f]
    with pytest.raises(OSError): write_whole(tmp_path/'deep', 'a folder is there')
    with pytest.raises(OSError): write_whole(f/'below a file', '')
    assert sorted(o.name for o in tmp_path.rglob('*')) == ['deep', 'er', 'n'*255]


def test_a_link_in_the_files_place_is_replaced(tmp_path):
    (tmp_path/'target').write_text('mine')
    for target in ('target', 'nowhere', 'link'):
        (tmp_path/'link').unlink(missing_ok=True); (tmp_path/'link').symlink_to(target)
        assert write_whole(tmp_path/'link', target).read_text() == target and not (tmp_path/'link').is_symlink()
    assert (tmp_path/'target').read_text() == 'mine' and not (tmp_path/'nowhere').exists()


def test_a_folder_that_vanishes_is_made_again(at_once, tmp_path):
    import shutil
    runs = sweep(SPECS[:3], tmp_path/'runs', finished=lambda r, done, total: done == 1 and shutil.rmtree(tmp_path/'runs'))
    assert sorted(read_runs(tmp_path/'runs'), key=lambda r: r.spec.seed) == runs and len(runs) == 3


# elsewhere

def test_missing_data_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv('DGLIT_DATA', str(tmp_path/'no-data'))
    monkeypatch.setattr('urllib.request.urlopen', lambda *_, **__: (_ for _ in ()).throw(OSError('offline')))
    with pytest.raises(DglitError, match='MNIST'): sweep([replace(SPECS[0], digits='mnist')], tmp_path, jobs=2)
    assert not records(tmp_path)


def test_a_card_for_each_worker(monkeypatch):
    "Worker i sees card i modulo their number, also one that takes a dead one's place; of cards that were named, those."
    envs = []
    monkeypatch.setattr(module.subprocess, 'Popen', lambda *_, env, **__: envs.append(env.get('CUDA_VISIBLE_DEVICES')))
    def seen(cards, visible=None):
        envs.clear()
        monkeypatch.setattr(module.torch.cuda, 'device_count', lambda: cards)
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible) if visible else monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        pool = module._Workers(4)
        def twice(): pool._start(); pool._start()
        for _ in range(4):
            t = threading.Thread(target=twice)
            t.start(); t.join()
        return envs[:]
    assert seen(3) == ['0', '0', '1', '1', '2', '2', '0', '0']
    assert seen(2, '4,GPU-8f') == ['4', '4', 'GPU-8f', 'GPU-8f']*2
    assert seen(1) == seen(0) == [None]*8 and seen(1, '5') == ['5']*8


def test_a_card_for_each_dask_worker(monkeypatch):
    pytest.importorskip('distributed')
    monkeypatch.setattr(module.torch.cuda, 'device_count', lambda: 2)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    with module._dask('', 2) as client:
        client.wait_for_workers(2, timeout=60)
        assert sorted(client.run(os.getenv, 'CUDA_VISIBLE_DEVICES').values()) == ['0', '1']


def test_a_dask_cluster_of_two_workers(tmp_path):
    "The same curves as on one machine's processes, on workers that do not see the folder's name either."
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        seen = []
        runs = sweep(SPECS[:4], tmp_path/'dask', jobs=2, finished=lambda r, done, total: seen.append(done), backend='dask', address=cluster.scheduler_address)
    assert seen == [1, 2, 3, 4] and len(read_runs(tmp_path/'dask')) == 4
    here = sweep(SPECS[:1], tmp_path/'here')
    assert here[0].at('last')['valid'] == pytest.approx(runs[0].at('last')['valid'], abs=2)


@pytest.mark.parametrize('address', ['tcp://127.0.0.1:1', 'tcp://nowhere.invalid:8786', 'nonsense', 'foo://bar', 'tcp://host:port', '\0'])
def test_a_bad_address_of_a_scheduler(tmp_path, monkeypatch, address):
    pytest.importorskip('distributed')
    monkeypatch.setattr(module, 'PATIENCE', 1)
    with pytest.raises(DglitError, match='no Dask scheduler answers at'): sweep(SPECS[:1], tmp_path, backend='dask', address=address)


def test_a_backend_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'distributed', None)
    with pytest.raises(DglitError, match=r"pip install 'dglit\[dask\]'"): sweep(SPECS[:1], tmp_path, backend='dask')
    with pytest.raises(DglitError, match="unknown backend 'ray'"): sweep(SPECS[:1], tmp_path, backend='ray')


# progress

def made(method, epochs, seconds): return done(Spec(methods=method, epochs=epochs), seconds=seconds)


def test_time_left():
    runs = [made('erm', 2, 20.), made('jigsaw', 2, 60.)]
    assert seconds_left([Spec(), Spec(methods='jigsaw')], runs) == 100 + 300
    assert seconds_left([Spec(), Spec(methods='jigsaw')], runs, jobs=2) == 200
    assert seconds_left([Spec()], runs, jobs=8) == 100                           # one run cannot be shared
    assert seconds_left([Spec()], []) is None and seconds_left([], []) == 0


def test_the_time_left_of_thousands_of_runs_is_told_at_once():
    specs, runs = [Spec(seed=i) for i in range(5000)], [made('erm', 2, 20.)]*5000
    start = time.process_time()
    assert seconds_left(specs, runs) == pytest.approx(5000*100)
    assert time.process_time() - start < .2                                      # 2.9 s when it was quadratic


def test_progress_tells_what_is_done(at_once, tmp_path, capsys):
    sweep_with_progress(SPECS[:2], tmp_path)
    out = capsys.readouterr().out
    assert 'erm, seed 0: valid' in out and 'erm, seed 1: valid' in out and '2/2' in out and '0:00:00 left' in out
