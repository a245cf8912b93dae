"Hundreds of wrong commands and damaged records: an answer or a `dglit:` sentence, never a traceback, never a hang. Nothing trains."
import json, os, random, signal, sys
from concurrent.futures import Future
from dataclasses import replace
from inspect import signature

import pytest
import typer
from matplotlib.figure import Figure

from dglit import cli
from dglit.core import DglitError, write_whole
from dglit.experiments.demo import DEMO  # noqa: F401 (the module is loaded)
from dglit.experiments.record import Run, read_runs
from dglit.experiments.registry import REGISTRIES, settings_of
from dglit.experiments.spec import Recipe
from dglit.experiments.tables import specs_of
from dglit.papers import SEARCHES, TABLES

demo, run, sweep = (sys.modules[f'dglit.experiments.{o}'] for o in ('demo', 'run', 'sweep'))
COMMANDS = typer.main.get_command(cli.app).commands
PARTS = {name: settings_of(name, kind) for kind, names in REGISTRIES.items() for name in names}
DOMAINS = ['valid', 'balanced', *dict.fromkeys(k for t in TABLES.values() for r in t.rows for k in r.published if k not in ('valid', 'balanced'))]
NAMES = [*PARTS, *TABLES, *SEARCHES, *(r.name for t in TABLES.values() for r in t.rows[:3]), 'recipe', 'erm']
RULES = ['last', 'best:valid', 'best:balanced', 'best:valid[worst]', 'early-stop@95', 'early-stop@nan', 'early-stop@', 'best:', 'best:test', 'best-valid', '@', 'x']
NUMBERS = ['0', '1', '2', '-1', '3', '1.5', '1e309', '-inf', 'nan', 'inf', '4294967296', '9'*50, '1e-400', '0x10', '١', '1_0', ' 1']
WILD = ['', ' ', '-', '--', '=', '==', ',', 'a,b', '0,0', '8,', '[]', 'None', 'True', '/../../victim', '..', 'x'*5000, 'a\nb', '\x1b[31mred', '\u202e', '\udcff',
        '😀', '%s%n', '{}', "'", '"', '\\', '*', '~', 'tcp://nowhere:1']
SETTINGS = [k for o in (*PARTS.values(), signature(Recipe).parameters) for k in o]


def no_training(*_, **__): raise DglitError('nothing trains here')
def done(spec):
    "A record of a run that measured its last epoch only."
    return replace(run.failed(spec, ''), status='done', measured=[{'epoch': spec.recipe.epochs-1, **{k: 50. for k in DOMAINS}}], domains=DOMAINS)


class AtOnce:
    "Stands for worker processes."
    def __init__(self, jobs): pass
    def close(self): pass
    def submit(self, f, *args):
        result = Future(); result.set_result(f(*args))
        return result


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder to stand in, with records good and bad; nothing trains, draws, or asks the network."
    (tmp_path/'here'/'folder').mkdir(parents=True)
    monkeypatch.chdir(tmp_path/'here')
    monkeypatch.setenv('DGLIT_DATA', str(tmp_path/'no-data'))
    monkeypatch.setattr('urllib.request.urlopen', no_training)
    for owner, name in ((run, 'learner_of'), (run, 'fit'), (demo, 'demo'), (sweep, '_dask')): monkeypatch.setattr(owner, name, no_training)
    monkeypatch.setattr(sweep, '_Workers', AtOnce)
    monkeypatch.setattr(sweep, 'run_or_record', done)
    monkeypatch.setattr(Figure, 'savefig', lambda self, file, **_: file.write(b'a picture'))
    first = next(iter(TABLES.values()))
    write_whole('records/good.json', done(specs_of(first, 1)[0]).to_json())
    write_whole('records/bad.json', '{"half')
    write_whole('file', '')
    os.mkfifo('fifo'); os.symlink('loop', 'loop')
    def late(*_): raise AssertionError('hangs')
    signal.signal(signal.SIGALRM, late)
    yield tmp_path
    signal.alarm(0)


def answer(args, monkeypatch, capsys):
    "What the command does: its exit status, and what it prints."
    monkeypatch.setattr(sys, 'argv', ['dglit', *args])
    signal.alarm(300)
    try: cli.main(); code = 0
    except SystemExit as e: code = e.code or 0
    except Exception as e: raise AssertionError(f'dglit {args} raised {type(e).__name__}') from e
    signal.alarm(0)
    return code, *capsys.readouterr()


def pick(rng, parameter):
    "A value for a parameter of the command: of the kind that its name asks for, or of any other."
    paths = ['records', 'records/good.json', 'records/bad.json', 'missing', 'missing/er', 'file', 'file/below', 'fifo', 'loop', 'folder', '/dev/null', '/dev/null/x']
    value = lambda: rng.choice([*NUMBERS, *WILD, *NAMES, 'digits', 'mnist'])
    setting = lambda: f'{rng.choice(["", "", f"{rng.choice(NAMES)}."])}{rng.choice(SETTINGS)}={value()}'
    ranged = lambda: f'{rng.choice(SETTINGS)}={rng.choice(NUMBERS)}..{rng.choice(NUMBERS)}'
    fitting = {'path': paths, 'record': paths, 'out': paths, 'set_': [setting()], 'space': [setting(), ranged()], 'rule': RULES, 'by': [*DOMAINS, 'valid[worst]'],
               'table': list(TABLES), 'data': list(REGISTRIES['dataset']), 'model': list(REGISTRIES['model']), 'method': list(REGISTRIES['method']),
               'backend': ['processes', 'dask', 'ray'], 'seeds': ['1', '2'], 'jobs': ['1', '2']}.get(parameter.name, [*NAMES, *NUMBERS])
    return rng.choice(fitting) if rng.random() < .75 else value()


def command_line(rng):
    "A command with some of its parameters."
    name = rng.choice([*COMMANDS]*6 + ['', 'trian', '--help', '--nope'])
    args = [name]
    for p in COMMANDS[name].params if name in COMMANDS else ():
        is_option = p.opts[0].startswith('-')
        many = rng.randint(0, 2) if getattr(p, 'multiple', False) else rng.random() < (.5 if is_option else .9)
        if p.name == 'seeds' and not many: args += ['--seeds', '1']              # by default there are hundreds of runs
        for _ in range(many): args += [p.opts[0], pick(rng, p)] if is_option else [pick(rng, p)]
    return args if rng.random() < .9 else args + [rng.choice(WILD)]


@pytest.mark.parametrize('block', range(6))
def test_whatever_is_typed_is_answered(block, place, monkeypatch, capsys):
    codes = []
    for i in range(50):
        args = command_line(random.Random(f'{block} {i}'))
        code, out, err = answer(args, monkeypatch, capsys)
        assert code in (0, 2), (args, code, err)
        assert 'Traceback' not in out + err and not set(out + err) & set('\x1b\u202e\0'), (args, out, err)
        if code == 2: assert 'Usage:' in err or err.startswith('dglit: ') and err.count('\n') == 1, (args, err)
        else: assert 'dglit:' not in err, (args, err)
        codes.append(code)
    assert set(codes) == {0, 2}
    assert not os.path.exists('/tmp/victim') and {o.name for o in place.iterdir()} <= {'here', 'no-data'}


def damaged(rng, text):
    "A record with one thing wrong: a value of another kind, or bytes lost, changed or put in."
    if rng.random() < .6:
        nodes = []
        def walk(o):
            for k in o if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ():
                nodes.append((o, k)); walk(o[k])
        walk(d := json.loads(text))
        owner, k = rng.choice(nodes)
        if rng.random() < .2: del owner[k]
        else: owner[k] = rng.choice([None, True, -1, 0, 1.5, 1e308, 10**400, 'x', '', 'nan', 'inf', '\x1b[31m', '/../../victim', [], {}, [[]], {'x': 1}, 'x'*10_000, '\udcff'])
        return json.dumps(d).encode()
    data, at = bytearray(text.encode()), rng.randrange(len(text))
    how = rng.randrange(4)
    if how == 0: del data[at:]
    elif how == 1: data[at] = rng.randrange(256)
    elif how == 2: del data[at:at + rng.randrange(1, 20)]
    else: data[at:at] = bytes(rng.randrange(256) for _ in range(3))
    return bytes(data)


def test_whatever_a_record_holds_is_read_or_named(place, monkeypatch, capsys):
    "300 damaged records beside a good one; what is read is written and read as the same."
    text = (place/'here'/'records'/'good.json').read_text()
    for i in range(300): (place/'here'/'folder'/f'{i}.json').write_bytes(damaged(random.Random(i), text))
    (place/'here'/'folder'/'good.json').write_text(text)
    signal.alarm(300)
    runs = read_runs('folder', bad := [])
    signal.alarm(0)
    assert 100 < len(bad) < 300 and len({o.split(',')[0] for o in bad} & {f'folder/{i}.json' for i in range(300)}) > 100
    for r in runs: assert Run.from_json(r.to_json()).to_json() == r.to_json() and r.spec == Run.from_json(text).spec.__class__(**vars(r.spec))
    for o in bad: assert o.isprintable() and len(o) < 1500
    code, out, err = answer(['report', 'folder'], monkeypatch, capsys)
    assert code == 0 and not set(out + err) & set('\x1b\0') and out.count('is no record of a run') == len(bad)
    assert {o.name for o in place.iterdir()} <= {'here', 'no-data'}
