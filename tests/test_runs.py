"Descriptions, training, records, the command line."
import gc, json, os, random, subprocess, sys
from dataclasses import fields, replace
from math import inf, nan

import pytest
import torch
import fastai.callback.schedule  # for fit_one_cycle
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.learner import Learner

from dglit.cli import main
from dglit.core import DglitError
from dglit.data.mnist import Digits
from dglit.data.mnist_mp import mnist_mp
from dglit.experiments.record import Run, read_runs
from dglit.experiments.registry import DATASETS, METHODS, MODELS, RANGES, REGISTRIES, settings_of
from dglit.experiments.run import fit, learner_of, run
from dglit.experiments.search import Search, between
from dglit.experiments.spec import Part, Recipe, Spec
from dglit.experiments.sweep import record_name, sweep
from dglit.experiments.tables import changes_between, specs_of
from dglit.learner import domain_learner, evaluate, load_trained, save_trained
from dglit.methods.rcl import RCL
from dglit.models.convnet import ConvNet
from dglit.papers import SEARCHES, TABLES

SHORT = Spec('mnist_mp', 'convnet', 'rcl', digits='digits', margin=.9, size=28, bs=64, epochs=2, precision='fp32')
PLAIN = replace(SHORT, methods='erm')
COINS = Spec('colored_mnist', 'mlp', digits='digits', hidden=[8], epochs=3, bs=None, opt='adam', loss='binary_cross_entropy', precision='fp32')


@pytest.fixture(scope='module')
def few(digits): return Digits(digits.x_train[:256], digits.y_train[:256], digits.x_test[:128], digits.y_test[:128])


# Descriptions

def test_equal_descriptions_are_equal():
    assert Spec(methods='rcl', margin=1, weight=1) == Spec(methods=[Part('rcl', margin=1.)], weight=1.) == Spec('mnist_mp', 'convnet', 'rcl', margin=1.)
    assert len({Spec('colored_mnist', 'mlp', hidden=[256, 256]), Spec('colored_mnist', 'mlp')}) == 1
    assert replace(SHORT, seed=1) != SHORT and replace(SHORT, seed=1).training == SHORT.training


@pytest.mark.parametrize('kind,name', [(kind, o) for kind, registry in REGISTRIES.items() for o in registry])
def test_what_may_be_set_is_checked_for_every_part(kind, name):
    "Each setting refuses what is of no kind of its own, and takes its default."
    needs = {k: "x" for k, p in settings_of(name, kind).items() if p.default is p.empty}
    for k, p in settings_of(name, kind).items():
        if k in needs: continue
        assert Part(name, **needs, **{k: p.default}) == Part(name, **needs)
        for wrong in (object(), {}, b'', nan, 'a\x1b[2J', [[1]]):
            with pytest.raises(DglitError): Part(name, **needs, **{k: wrong})
        low, high = RANGES.get(k, (None, None))
        if low is not None and isinstance(p.default, (int, float)):
            for wrong in (low - 1, -1e9, *([high + 1] if high < inf else [])):
                with pytest.raises(DglitError): Part(name, **needs, **{k: wrong})
    with pytest.raises(DglitError, match='unknown setting'): Part(name, nonsense=1)


@pytest.mark.parametrize('change,says', [
    (dict(data='minst_mp'), "did you mean 'mnist_mp'"), (dict(methods='rlc'), "unknown method 'rlc'"), (dict(digits='mnits'), "did you mean 'mnist'"),
    (dict(precision='fp16'), "unknown precision 'fp16'"), (dict(epochs=0), 'needed above 0'), (dict(epochs=2.5), 'whole number'), (dict(bs=-1), 'above 0'),
    (dict(seed=-1), 'needed 0 to'), (dict(seed=2**32), 'needed 0 to'), (dict(opt='sdg'), "did you mean 'sgd'"), (dict(lr=nan), 'finite'), (dict(lr=inf), 'finite'),
    (dict(wd=-1.), '0 or more'), (dict(momentum=1.), 'from 0 to 1'), (dict(margin='wide'), 'needed a number'), (dict(weight='big'), 'needed a number'),
    (dict(weight=inf), 'finite'), (dict(per='chanel'), "did you mean 'channel'"), (dict(size=28.), 'whole number'), (dict(low='x'), 'needed a number'), (dict(low=nan), 'finite'),
    (dict(margins=1), "did you mean 'margin'"), (dict(margin=-1), 'not in'), (dict(sizes=3), "did you mean 'size'"), (dict(methods='rcl+rcl'), 'each of them once'),
    (dict(weight=-1), '0 or more'), (dict(methods='irm', l2=-1.), '0 or more'), (dict(methods='fishr', anneal_steps=-1), '0 or more'), (dict(model='mlp', hidden=[10**9]), '1 to 1e'),
    (dict(methods='rcl+decov', weight=1.), 'give rcl.weight'), (dict(methods=RCL()), 'needed a name'), (dict(model='rcl'), "unknown model 'rcl'"), (dict(selection='last'), "unknown setting")])
def test_mistakes_are_found_before_anything_is_loaded(change, says):
    with pytest.raises(DglitError, match=says): replace(SHORT, **change)


@pytest.mark.parametrize('hidden', [8, [0, 0], 'a,b', [8, -1], [8, 2.5]])
def test_widths_that_cannot_be(hidden):
    with pytest.raises(DglitError): Spec('colored_mnist', 'mlp', hidden=hidden)


def test_a_loss_that_does_not_fit_the_classes():
    with pytest.raises(DglitError, match='has 10 classes, needed 2'): learner_of(replace(SHORT, loss='binary_cross_entropy'))


# Training

@pytest.mark.parametrize('spec', [SHORT, COINS], ids=['rcl', 'coins'])
def test_bit_identical(few, spec):
    a, b = run(spec, digits=few), run(spec, digits=few)
    assert a.measured == b.measured and a.data_hash == b.data_hash and a.machine == b.machine
    assert a.measured != run(replace(spec, seed=1), digits=few).measured


def test_bfloat16_trains_as_float32_does(few):
    "The 16-bit weights follow the 32-bit ones: the same curve, but for rounding."
    some = Digits(few.x_train[:64], few.y_train[:64], few.x_test[:32], few.y_test[:32])
    full, half = (run(replace(PLAIN, model='mlp', hidden=[32], precision=p, epochs=3, bs=16, lr=1e-2), digits=some) for p in ('fp32', 'bf16'))
    assert half.machine['precision'] == 'bf16' and full.machine['precision'] == 'fp32'
    assert full.measured[-1]['train_loss'] < full.measured[0]['train_loss'] - .02
    for a, b in zip(full.measured, half.measured): assert abs(a['train_loss'] - b['train_loss']) < .1


def test_weight_zero_is_erm(few):
    erm, zero = run(PLAIN, digits=few), run(replace(SHORT, weight=0.), digits=few)
    assert erm.measured == [{k: v for k, v in o.items() if k != 'rcl'} for o in zero.measured]


def test_looking_at_test_domains_changes_nothing(few):
    "The same training with and without test domains gives the same weights."
    a, b = learner_of(SHORT, digits=few), learner_of(SHORT, digits=few)
    b.dls.tests = {}
    for learn in (a, b): fit(learn, SHORT)
    assert all(torch.equal(*o) for o in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_curve_and_evaluate_agree_on_groups(few):
    learn = learner_of(replace(COINS, epochs=2), 'last', digits=few)
    r = fit(learn, replace(COINS, epochs=2))
    table = evaluate(learn).accuracy
    assert {'valid[0]', 'valid[1]', 'valid[worst]'} < set(r.domains) and set(table.index) == set(r.domains) - {'train'}
    assert table.to_dict() == {k: r.at('last')[k] for k in table.index}
    assert r.at('best:valid[worst]')['valid[worst]'] == max(o['valid[worst]'] for o in r.measured)


@pytest.mark.parametrize('rule', ['best:balanced', 'best:valid[worst]', 'best:test', 'early-stop@nan', 'best-valid', 'last@95', ''])
def test_a_rule_that_cannot_be_answered_is_refused(few, rule):
    with pytest.raises(DglitError): fit(learner_of(SHORT, rule, digits=few), SHORT)


@pytest.mark.parametrize('group', ['2', 'nope', '', '0.0'])
def test_a_rule_on_a_group_that_is_not_there_is_refused_before_training(few, group):
    learn = learner_of(COINS, f'best:valid[{group}]', digits=few)
    with pytest.raises(DglitError, match=r"there is no 'valid\["): fit(learn, COINS)
    assert not learn.track_domains.curve


def test_damaged_weights_are_refused(few, tmp_path):
    "A bit, a piece, other bytes, of either file: a sentence, and the Learner is as it was."
    rng, learn = random.Random(0), learner_of(replace(COINS, methods='vib'), digits=few)
    files = {o: o.read_bytes() for o in save_trained(learn, tmp_path).iterdir()}
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for i in range(40):
        for o, text in files.items(): o.write_bytes(text)
        o = rng.choice(list(files))
        new, at = bytearray(files[o]), rng.randrange(len(files[o]))
        if i % 3: new[at] ^= 1 << rng.randrange(8)
        else: del new[at:]
        o.write_bytes([new, b'[' * 10**5, b'{"model":1,"classes":1,"sha256":1}', b'\xff'][i % 4])
        with pytest.raises(DglitError): load_trained(learn, tmp_path)
        assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())


def test_divergence_is_recorded(tmp_path):
    r, = sweep([replace(SHORT, lr=1e9)], tmp_path)
    assert r.status == 'diverged' and r.at('last') == {} and json.loads((tmp_path/record_name(r.spec)).read_text())['status'] == 'diverged'


def test_sweep_in_processes_equals_one_process(tmp_path):
    specs = specs_of(TABLES['rcl-table2'], 1, ['erm', 'rcl-inf'], digits='digits', epochs=1, bs=256, precision='fp32', size=28)
    seen = []
    both = sweep(specs, tmp_path/'two', jobs=2, finished=lambda r, done, total: seen.append((done, total)))
    assert sorted(seen) == [(1, 2), (2, 2)] and [r.spec for r in both] == specs
    assert sorted(o.name for o in (tmp_path/'two').iterdir()) == sorted(record_name(s) for s in specs)


def test_sweep_resumes(tmp_path):
    "Stopped in the middle, a sweep keeps what is done and runs the rest."
    specs = specs_of(TABLES['rcl-table2'], 3, ['erm'], digits='digits', epochs=1, bs=256, precision='fp32', size=28)
    def stop(r, done, total):
        if done == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): sweep(specs, tmp_path, finished=stop)
    kept = {o: o.stat().st_mtime_ns for o in tmp_path.iterdir()}
    assert len(kept) == 1
    ran = []
    assert len(sweep(specs, tmp_path, finished=lambda r, *_: ran.append(r.spec.seed))) == 3 and ran == [1, 2]
    assert all(o.stat().st_mtime_ns == t for o, t in kept.items())


def test_rcl_with_fastai_callbacks(few, tmp_path):
    "Callbacks that watch a metric, stop and save work beside a method, and one that raises leaves no hook behind."
    dls = mnist_mp(few, bs=64)
    learn = domain_learner(dls, ConvNet(), RCL(weight=.1), path=tmp_path, cbs=[EarlyStoppingCallback('accuracy', patience=1, min_delta=1.), SaveModelCallback('accuracy')])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 1e-4)
    assert 1 < len(learn.track_domains.curve) < 6 and (tmp_path/'models/model.pth').exists()

    class Fails(Callback):
        def after_batch(self): raise RuntimeError('out of luck')
    with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Fails())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not learn.model.body._forward_hooks and learn.recorder.metric_names.count('rcl') == 1
    assert list(evaluate(learn).index) == ['valid', 'grey']


def test_validating_in_mid_training_disturbs_nothing(few):
    class Validates(Callback):
        order = 70
        def after_epoch(self):
            if hasattr(self, 'busy'): return
            self.busy = True
            self.learn.validate(dl=self.dls.valid)
            self.learn.get_preds(dl=self.dls.valid, inner=True)
            del self.busy
    quiet, noisy = learner_of(SHORT, digits=few), learner_of(SHORT, digits=few)
    noisy.add_cb(Validates())
    for learn in (quiet, noisy):
        with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert [{k: o[k] for k in ('valid', 'grey')} for o in quiet.track_domains.curve] == [{k: o[k] for k in ('valid', 'grey')} for o in noisy.track_domains.curve]
    assert all(torch.equal(*o) for o in zip(quiet.model.state_dict().values(), noisy.model.state_dict().values()))


def test_a_failed_run_leaves_the_precision_alone(few):
    spec = replace(SHORT, precision='bf16')
    learn = learner_of(spec, digits=few)
    def fail(): raise RuntimeError('out of luck')
    learn.model.head.register_forward_hook(lambda *_: fail())
    with pytest.raises(RuntimeError, match='out of luck'): fit(learn, spec)
    assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.float32


def test_export(few, tmp_path):
    learn = learner_of(SHORT, digits=few)
    fit(learn, SHORT)
    learn.export(tmp_path/'learn.pkl')
    loaded = torch.load(tmp_path/'learn.pkl', weights_only=False)
    assert list(loaded.dls.tests) == ['grey'] and len(loaded.dls.train.dataset) == 0


def test_a_run_leaves_no_learner_behind():
    "Not even until the next garbage collection: in a sweep the data of one run after another would pile up."
    alive = lambda: sum(isinstance(o, Learner) for o in gc.get_objects())
    gc.collect()
    before = alive()
    gc.disable()
    try: run(replace(PLAIN, epochs=1))
    finally: gc.enable()
    assert alive() == before


# Records

@pytest.fixture(scope='module')
def done(few): return run(replace(SHORT, margin=inf), digits=few)


def test_record_round_trip(few, done):
    line = done.to_json()
    assert 'Infinity' not in line and '\n' not in line
    back = Run.from_json(line)
    assert back == done and back.spec.methods[0]['margin'] == inf
    assert run(back.spec, digits=few).measured == done.measured                  # the record is enough to repeat the run


def test_a_record_holds_no_accuracy_at_a_rule(done):
    assert not {'metrics', 'selected', 'selection', 'rule'} & set(json.loads(done.to_json()))


def old_record(**changes):
    "A record of the first format."
    d = dict(dataset='mnist_mp', method='rcl+decov', model='convnet', settings={'margin': 'inf', 'decov.weight': .1}, data={'low': 0.}, net={}, loss='cross_entropy',
             source='digits', seed=3, epochs=1, bs=64, opt='sgd', lr=1e-3, momentum=.9, wd=1e-5, precision='bf16', selection='best-valid', every=1, schedule='flat',
             table='', row='', status='done', metrics=dict(valid=90., grey=20.), selected=0, curve=[dict(epoch=0, train_loss=1., valid_loss='inf', valid=90., grey=20., rcl=-3.)],
             seconds=1., device='cpu, 2 threads', versions=dict(dglit='0.1.0'), data_hash='f00d', error='', schema=1)
    return {**d, **changes}


def test_a_record_of_the_first_format_is_read():
    r = Run.from_json(json.dumps(old_record()))
    assert r.spec == Spec('mnist_mp', 'convnet', 'rcl+decov', digits='digits', low=0., epochs=1, bs=64, seed=3, **{'decov.weight': .1})
    assert r.spec.recipe.precision == 'auto' and r.machine == dict(device='cpu', processor='', threads=2, precision='bf16')
    assert r.at('best:valid') == dict(valid=90., grey=20.) and Run.from_json(r.to_json()) == r


LATER = ('net', 'loss', 'every', 'schedule')  # the first format got these while it was in use


@pytest.mark.parametrize('name', [k for k in old_record() if k not in LATER])
def test_no_field_of_an_old_record_has_a_default(name):
    with pytest.raises(DglitError, match=name): Run.from_json(json.dumps({k: v for k, v in old_record().items() if k != name}))


WILD = [None, True, -1, 1e400, nan, 2**70, 'x', '', '/../../victim', '\x1b[2J', 'a\0b', [], [[]], {}, {'a': {}}, 'inf', [None], 1.5]


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('format', ['new', 'old'])
def test_damaged_records_are_read_or_refused(done, format, seed):
    "A hundred records with something wrong in them: a run whose fields are sound, or a DglitError; nothing else."
    rng = random.Random(seed)
    whole = json.loads(done.to_json()) if format == 'new' else old_record()
    def places(o): # every place in a record
        for k in (o if isinstance(o, dict) else range(len(o)) if isinstance(o, list) else ()):
            yield o, k
            yield from places(o[k])
    for _ in range(100):
        d = json.loads(json.dumps(whole))
        o, k = rng.choice(list(places(d)))
        what = rng.choice(('delete', 'replace', 'rename'))
        if what == 'delete': del o[k]
        elif what == 'replace' or isinstance(o, list): o[k] = rng.choice(WILD)
        else: o[rng.choice(['', 'x', '\x1b[2J', '../..', 'epoch'])] = o.pop(k)
        try: r = Run.from_json(json.dumps(d))
        except DglitError as e: assert '\x1b' not in str(e); continue
        assert '/' not in record_name(r.spec) and record_name(r.spec).isprintable() and Run.from_json(r.to_json()) == r


def test_record_names_are_files_in_their_folder():
    assert record_name(replace(SHORT, seed=3)).startswith('mnist_mp-rcl-margin=0.9-digits=digits-size=28-seed3-')
    assert record_name(replace(SHORT, lr=.1)) != record_name(SHORT) == record_name(replace(SHORT, weight=1.))


def test_strange_files_are_named_and_left_alone(tmp_path, done):
    (tmp_path/'good.json').write_text(done.to_json())
    (tmp_path/'half.json').write_text('{"half'); (tmp_path/'bytes.json').write_bytes(b'\xff\xfe'); (tmp_path/'folder.json').mkdir()
    (tmp_path/'dangling.json').symlink_to('nowhere'); (tmp_path/'loop.json').symlink_to('loop.json'); os.mkfifo(tmp_path/'pipe.json')
    (tmp_path/'deep.json').write_text('['*100_000); (tmp_path/'esc\x1b[2J.json').write_text('[]'); (tmp_path/'method.json').write_text(done.to_json().replace('"rcl"', '"rlc"'))
    assert read_runs(tmp_path, bad := []) == [done]
    assert len(bad) == 9 and not any('\x1b' in o for o in bad)
    for path in ('no\0where', 'x'*5000, tmp_path/'nowhere', tmp_path/'pipe.json'):
        with pytest.raises(DglitError): read_runs(path)


# Searches

def test_a_search_draws_the_same_again_and_picks_by_validation(few):
    s = Search(PLAIN, dict(lr=between(1e-4, 1e-1)), n=3)
    assert s.specs() == s.specs() and len({o.recipe.lr for o in s.specs()}) == 3 and replace(s, seed=1).specs() != s.specs()
    runs = [run(replace(o, epochs=1), digits=few) for o in s.specs()]
    pick = s.pick(runs, epochs=1)
    with pytest.raises(DglitError, match=r"unknown domain 'valid\[worst\]'.*There are: .*valid"): replace(s, by='valid[worst]').pick(runs, epochs=1)
    assert pick in [r.spec for r in runs] and max(r.at('last')['valid'] for r in runs) == next(r for r in runs if r.spec == pick).at('last')['valid']


@pytest.mark.parametrize('ends', [(2, 1), (1, 1), (nan, 1.), (1., nan), (1., inf), (-inf, 1.)])
def test_ends_that_hold_nothing_between_them(ends):
    with pytest.raises(DglitError, match='the lesser first'): between(*ends)


@pytest.mark.parametrize('name', SEARCHES)
def test_searches_of_papers_look_at_validation_alone(name):
    s = SEARCHES[name]
    assert (s.rule, s.by) in (('last', 'valid'), ('last', 'balanced'), ('best:valid[worst]', 'valid[worst]')) and len(set(s.specs())) == len(s.specs())


@pytest.mark.parametrize('table', TABLES.values(), ids=list(TABLES))
def test_tables_are_whole(table):
    assert len({r.name for r in table.rows}) == len({r.label for r in table.rows}) == len(table.rows)
    for s in specs_of(table, 1): assert changes_between(s, s) == {}


# The command line

def dglit(*args, **kwargs):
    return subprocess.run([sys.executable, '-c', 'from dglit.cli import main; main()', *args], capture_output=True, text=True, **kwargs)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    "The command in this process: (exit status, what it printed, what it complained)."
    monkeypatch.chdir(tmp_path)
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['dglit', *args])
        try: main(); status = 0
        except SystemExit as e: status = e.code or 0
        said = capsys.readouterr()
        return status, said.out, ' '.join(said.err.split())
    return call


def test_help_imports_nothing_heavy():
    code = "import dglit.cli, sys; print([o for o in ('torch','fastai','pandas','matplotlib','sklearn') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
    assert all(o in dglit('--help').stdout for o in ('demo', 'train', 'evaluate', 'reproduce', 'search', 'report', 'list'))


@pytest.mark.parametrize('args,says', [
    (['trian'], "Did you mean 'train'"), (['train', '--method', 'jigsa'], "did you mean 'jigsaw'"), (['train', '--set', 'margin'], 'NAME=VALUE'),
    (['train', '--method', 'rcl', '--set', 'margin=0'], 'not in (0, inf]'), (['reproduce', 'rcl-table3'], "did you mean 'rcl-table2'"),
    (['reproduce', 'rcl-table2', '--rows', 'erm,rcl-1', '--set', 'digits=digits'], 'did you mean'), (['report', 'nowhere'], 'nowhere does not exist'),
    (['report', 'nowhere', '--table', 'nope'], "unknown table 'nope'"), (['train', '--set', 'epochs=ten'], 'whole number'), (['train', '--seed', '4294967296'], 'seed 4294967296'),
    (['train', '--model', 'mlp', '--set', 'hidden=8,a'], 'needed a list'), (['train', '--model', 'mlp', '--set', 'hidden=0,0'], 'hidden'),
    (['train', '--rule', 'early-stop@nan'], 'needed a percentage'), (['train', '--rule', 'best-valid@'], "unknown rule"), (['train', '--method', 'rcl', '--method', 'rcl'], 'each of them once'),
    (['train', '--method', 'rcl+decov', '--set', 'weight=1'], 'give rcl.weight'), (['search'], 'nothing to search'), (['search', '--space', 'lr=1..'], 'lr'),
    (['search', 'irm-vrex', '--each', 'erm'], 'a space and methods of its own'), (['search', '--space', 'lr=2..1'], 'LEAST..GREATEST'), (['search', '--space', 'lr=.1...2', '--draws', '9'*20], 'Invalid value'),
    (['reproduce', 'rcl-table2', '--together', '--backend', 'dask'], 'leave one of them'), (['reproduce', 'rcl-table2', '--seeds', '9'*20], 'Invalid value'),
    (['search', 'irm-vrx'], "did you mean 'irm-vrex'"), (['evaluate', 'nowhere.json'], 'does not exist'), (['list', 'rlc'], 'unknown table or part')])
def test_a_mistake_is_answered_not_traced(args, says, command):
    status, _, err = command(*args)
    assert status == 2 and says in err and 'Traceback' not in err


NAMES = ['train', 'reproduce', 'search', 'report', 'evaluate', 'list']
WORDS = ['mnist_mp', 'rcl', 'irm+vrex', 'mlp', 'rcl-table2', 'nowhere', '', '-1', 'nan', 'a\0b', '\x1b[2J', '../..', 'x'*300, 'last', 'best:test', 'dask']
PAIRS = ['margin=nan', 'epochs=-1', 'lr=inf', 'hidden=,', 'hidden=a,b', '=', 'x=', '=1', 'digits=/etc/passwd', 'rcl.margin=0', 'bs=0', 'wd=-1', 'a.b.c=1', 'low=\x1b', 'seed=1', 'envs=2']
OPTIONS = dict(data=WORDS, model=WORDS, method=WORDS, set=PAIRS, seed=WORDS, rule=WORDS, space=['lr=1', 'lr=a..b', 'lr=2..1', 'x=1..2', '='], by=WORDS, draws=WORDS, table=WORDS, jobs=['0', 'x', '-1'])


@pytest.mark.parametrize('seed', range(4))
def test_wild_commands_are_answered_not_traced(seed, command):
    "Fifty commands with something wrong in each: exit 2 and a sentence, before anything is trained."
    rng = random.Random(seed)
    for _ in range(50):
        name = rng.choice(NAMES)
        args = [name] + [rng.choice(WORDS)]*(name in ('reproduce', 'report', 'evaluate', 'list'))
        for _ in range(rng.randint(1, 3)): args += [f'--{(k := rng.choice(list(OPTIONS)))}', rng.choice(OPTIONS[k])]
        if name != 'list': args += ['--set', rng.choice(PAIRS[:8])]             # at least one that cannot work
        status, _, err = command(*args)
        assert (status == 2 and err and 'Traceback' not in err and '\x1b' not in err) or (name == 'list' and status == 0), (args, status, err)


def test_missing_mnist_is_explained(tmp_path):
    blocked = dict(os.environ, DGLIT_DATA=str(tmp_path), http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    r = dglit('train', cwd=tmp_path, env=blocked)
    assert r.returncode == 2 and 'load_digits()' in r.stderr and 'Traceback' not in r.stderr


def test_reproduce_then_report(command, tmp_path):
    settings = [o for k in ('digits=digits', 'epochs=1', 'size=28', 'bs=256') for o in ('--set', k)]
    args = 'reproduce', 'rcl-table2', *settings, '--seeds', '2', '--rows', 'erm', '--out', 'runs'
    first, again = command(*args), command(*args)
    assert first[0] == again[0] == 0, first
    assert 'erm, seed 1' in first[1] and 'erm, seed' not in again[1] and '26.0 ± 4.7' in again[1] and 'digits = digits' in again[1]
    (tmp_path/'runs'/'foreign.json').write_text(json.dumps(old_record(source='/../../victim')))
    status, out, _ = command('report', 'runs')
    line = next(o for o in out.splitlines() if o.startswith('Standard '))
    assert status == 0 and line.split()[1] == '2' and line in again[1] and 'foreign.json' in out and '/../../victim' in out
    assert not [o for o in tmp_path.parent.rglob('*victim*')]


def test_train_saves_what_evaluates(command, tmp_path):
    settings = [o for k in ('digits=digits', 'hidden=16,8', 'epochs=1', 'bs=256', 'win_size=3', 'schedule=flat_cos') for o in ('--set', k)]
    status, out, err = command('train', '--data', 'background_mnist', '--model', 'mlp', '--method', 'cim', '--method', 'vib', *settings, '--out', 'out')
    assert status == 0 and 'best:valid picks epoch 0' in out, err
    record, = (tmp_path/'out').glob('*.json')
    r = Run.from_json(record.read_text())
    assert [o.name for o in r.spec.methods] == ['cim', 'vib'] and r.spec.methods[0]['win_size'] == 3 and r.spec.recipe.schedule == 'flat_cos'
    whole = evaluate(load_trained(learner_of(r.spec), record.with_suffix('')))
    table = whole.accuracy
    assert table.round(2).to_dict() == {k: round(r.at('best:valid')[k], 2) for k in table.index}
    status, out, _ = command('evaluate', str(record))
    assert status == 0 and whole.round(1).to_string() in out


def test_a_report_of_ones_own(command, tmp_path, done):
    "Trainings of no table: methods side by side, and what one gains over plain training on the seeds that both have."
    def own(method, seed, test):
        spec = Spec('image_groups', 'convnet', method, seed=seed, epochs=1)
        return replace(done, spec=spec, domains=['valid', 'test'], measured=[dict(epoch=0, valid=90., test=test)])
    plain, vrex = [83.5, 75.9, 74.7, 10.], [100., 93.7, 77.2]
    for runs in ([own('erm', *o) for o in enumerate(plain)], [own('vrex', *o) for o in enumerate(vrex)]):
        for r in runs: (tmp_path/record_name(r.spec)).write_text(r.to_json())
    status, out, err = command('report', '.')
    lines = [' '.join(o.split()) for o in out.splitlines()]
    assert status == 0 and 'plain training 4 90.0 ± 0 61.0 ± 34.2' in lines and 'vrex 3 90.0 ± 0 90.3 ± 11.8' in lines, (out, err)
    assert 'vrex − plain training, test: +16.5 +17.8 +2.5; mean +12.3, 95% interval −8.8 to +33.3: 0 is inside: not shown' in lines
    status, _, err = command('report', '.', '--table', 'rcl-table2')
    assert status == 2 and 'no record of rcl-table2' in err
    rival = replace(done, spec=Spec('mnist_mp', 'convnet', 'erm', seed=9, epochs=1), domains=['valid'], measured=[dict(epoch=0, valid=90.)])
    (tmp_path/record_name(rival.spec)).write_text(rival.to_json()) # a row of a paper's table does not hide the others
    out = command('report', '.')[1]
    assert 'RCL on MNIST-MP' in out and 'vrex − plain training' in out


@pytest.mark.parametrize('name', ['train', 'search'])
def test_help_shows_what_is_in_brackets(name, command):
    assert 'best:valid[worst]' in command(name, '--help')[1]


def test_the_time_left_counts_from_the_start(monkeypatch):
    from dglit.cli import progress
    times = iter([0, 10, 130, 140])
    monkeypatch.setattr('time.time', lambda: next(times))
    left = progress(4)
    assert left(1) == '(0:30 left)' and left(2) == '(2:10 left)' and left(4) == ''


def test_a_diverged_training_does_not_end_well(command):
    status, out, _ = command('train', '--set', 'digits=digits', '--set', 'lr=1e9', '--set', 'epochs=1', '--set', 'bs=64', '--set', 'size=28')
    assert status == 1 and 'diverged' in out


def test_a_search_of_ones_own(command):
    settings = [o for k in ('digits=digits', 'hidden=8', 'size=28', 'epochs=1', 'bs=256') for o in ('--set', k)]
    status, out, err = command('search', '--model', 'mlp', *settings, '--space', 'lr=1e-3,1e-2', '--out', 'runs')
    assert status == 0 and 'by valid at last: Spec(' in out, err
    each = 'search', '--model', 'mlp', *settings, '--each', 'erm,vib', '--space', 'vbi.beta=1e-3,1e-2'
    status, _, err = command(*each)
    assert status == 2 and "'vbi.beta=1e-3,1e-2': no method of --each erm,vib has it" in err
    assert command(*each, '--method', 'cim')[0] == 2


def test_a_training_that_diverges_in_its_last_step(digits):
    spec = Spec('colored_mnist', 'mlp', loss='binary_cross_entropy', bs=None, precision='fp32', epochs=1, lr=1e38, opt='adam')
    assert run(spec, digits=digits).status == 'diverged'


def test_latent_points_of_one_output(digits):
    from dglit.experiments.latent import latent_points
    learn = learner_of(Spec('colored_mnist', 'mlp', loss='binary_cross_entropy', bs=None, epochs=1), digits=digits)
    points = latent_points(learn, n=60)
    assert points.correct[points.label == 1].any() or points.correct[points.label == 0].all()
    x, y, *_ = (o[:60] for o in next(iter(learn.dls.valid)))
    with torch.no_grad(): right = (learn.model.eval()(x).flatten() > 0) == y.bool()
    assert points.correct.tolist() == right.tolist()
