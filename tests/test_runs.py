"Training, records, sweeps, the command line."
import gc
import json, os, subprocess, sys
from dataclasses import replace
from math import inf

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
from dglit.experiments.run import Run, Spec, fit, learner_of, run
from dglit.experiments.sweep import record_name, sweep
from dglit.experiments.tables import TABLES, specs_of
from dglit.learner import domain_learner, evaluate, load_trained
from dglit.methods.rcl import RCL
from dglit.models.convnet import ConvNet

SHORT = Spec(method='rcl', settings=dict(margin=.9), source='digits', data=dict(size=28), bs=64, epochs=2, precision='fp32')


@pytest.fixture(scope='module')
def few(digits): return Digits(digits.x_train[:256], digits.y_train[:256], digits.x_test[:128], digits.y_test[:128])


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_bit_identical(few, precision):
    spec = replace(SHORT, precision=precision)
    a, b = run(spec, few), run(spec, few)
    assert a.curve == b.curve and a.metrics == b.metrics and a.data_hash == b.data_hash
    assert a.curve != run(replace(spec, seed=1), few).curve


def test_bfloat16_trains_as_float32_does(few):
    "The 16-bit weights follow the 32-bit ones: the same curve, but for rounding."
    specs = [replace(SHORT, method='erm', settings={}, precision=p, epochs=4, bs=16, lr=1e-2) for p in ('fp32', 'bf16')]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)                                     # rounding, and with it the gap, depends on how many
    try: full, half = (run(s, few).curve for s in specs)
    finally: torch.set_num_threads(threads)
    assert full[-1]['train_loss'] < full[0]['train_loss'] - .3
    for a, b in zip(full, half): assert abs(a['train_loss'] - b['train_loss']) < .1


def test_weight_zero_is_erm(few):
    erm, zero = run(replace(SHORT, method='erm', settings={}), few), run(replace(SHORT, settings=dict(weight=0.)), few)
    assert erm.curve == [{k: v for k, v in o.items() if k != 'rcl'} for o in zero.curve]


def test_looking_at_test_domains_changes_nothing(few):
    "The same training with and without test domains gives the same weights."
    a, b = learner_of(SHORT, few), learner_of(SHORT, few)
    b.dls.tests = {}
    for learn in (a, b): fit(learn, SHORT)
    assert all(torch.equal(*o) for o in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def test_record_round_trip(few):
    r = run(replace(SHORT, settings=dict(margin=inf)), few)
    line = r.to_json()
    assert 'Infinity' not in line and '\n' not in line
    back = Run.from_json(line)
    assert back.curve == r.curve and back.spec.settings == dict(margin=inf) and back == r
    assert run(back.spec, few).curve == r.curve                  # the record is enough to repeat the run


def test_a_record_may_lack_fields_that_came_later():
    d = json.loads(Run(SHORT, 'done', {}, 0, [], 1., '', {}, '').to_json())
    del d['momentum']
    assert Run.from_json(json.dumps(d)).spec.momentum == 0.9


def test_divergence_is_recorded(few, tmp_path):
    r, = sweep([replace(SHORT, lr=1e9)], tmp_path)
    assert r.status == 'diverged' and r.metrics == {} and json.loads((tmp_path/record_name(r.spec)).read_text())['status'] == 'diverged'


def test_sweep_in_processes_equals_one_process(tmp_path):
    specs = specs_of(TABLES['rcl-table2'], 1, ['erm', 'rcl-inf'], source='digits', epochs=1, bs=256, precision='fp32')
    seen = []
    both = sweep(specs, tmp_path/'two', jobs=2, finished=lambda r, done, total: seen.append((done, total)))
    assert sorted(seen) == [(1, 2), (2, 2)] and [r.spec for r in both] == specs
    assert sorted(o.name for o in (tmp_path/'two').iterdir()) == sorted(record_name(s) for s in specs)


def test_sweep_resumes(tmp_path):
    "Stopped in the middle, a sweep keeps what is done and runs the rest."
    specs = specs_of(TABLES['rcl-table2'], 3, ['erm'], source='digits', epochs=1, bs=256, precision='fp32')
    def stop(r, done, total):
        if done == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): sweep(specs, tmp_path, finished=stop)
    kept = {o: o.stat().st_mtime_ns for o in tmp_path.iterdir()}
    assert len(kept) == 1
    ran = []
    assert len(sweep(specs, tmp_path, finished=lambda r, *_: ran.append(r.spec.seed))) == 3 and ran == [1, 2]
    assert all(o.stat().st_mtime_ns == t for o, t in kept.items())


@pytest.mark.parametrize('change,says', [
    (dict(dataset='minst_mp'), "did you mean 'mnist_mp'"), (dict(method='rlc'), "did you mean .*'rcl'"), (dict(source='mnits'), "did you mean 'mnist'"),
    (dict(selection='best'), "did you mean 'best-valid'"), (dict(precision='fp16'), "unknown precision 'fp16'"), (dict(epochs=0), 'needed above 0'), (dict(epochs=2.5), 'whole number'), (dict(seed=-1), '0 or more'), (dict(opt='sdg'), "did you mean 'sgd'"),
    (dict(settings=dict(margin='wide')), 'needed a number'), (dict(settings=dict(weight='big')), 'needed a number'), (dict(settings=dict(per='chanel')), "did you mean 'channel'"),
    (dict(data=dict(size=28.)), 'whole number'), (dict(data=dict(low='x')), 'needed a number'),
    (dict(settings=dict(margins=1)), "did you mean 'margin'"), (dict(settings=dict(margin=-1)), 'not in'), (dict(data=dict(sizes=3)), "did you mean 'size'")])
def test_mistakes_are_found_before_training(change, says, tmp_path):
    with pytest.raises(DglitError, match=says): sweep([replace(SHORT, **change)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_rcl_with_fastai_callbacks(few, tmp_path):
    "Callbacks that watch a metric, stop and save work beside a method, and one that raises leaves no hook behind for long."
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
            del self.busy
    quiet, noisy = learner_of(SHORT, few), learner_of(SHORT, few)
    noisy.add_cb(Validates())
    for learn in (quiet, noisy):
        with learn.no_bar(), learn.no_logging(): learn.fit(3)
    assert [o['grey'] for o in quiet.track_domains.curve] == [o['grey'] for o in noisy.track_domains.curve]
    assert all(torch.equal(*o) for o in zip(quiet.model.state_dict().values(), noisy.model.state_dict().values()))


def test_a_failed_run_leaves_the_precision_alone(few):
    learn, spec = learner_of(replace(SHORT, precision='bf16'), few), replace(SHORT, precision='bf16')
    def fail(): raise RuntimeError('out of luck')
    learn.model.head.register_forward_hook(lambda *_: fail())
    with pytest.raises(RuntimeError, match='out of luck'): fit(learn, spec)
    assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.float32


def test_a_new_field_of_spec_renames_no_record():
    assert record_name(Spec(method='rcl', settings=dict(margin=.9), seed=3)) == 'mnist_mp-rcl-margin=0.9-mnist-seed3-8b5e6e5f02.json'


def test_export(few, tmp_path):
    learn = learner_of(SHORT, few)
    fit(learn, SHORT)
    learn.export(tmp_path/'learn.pkl')
    loaded = torch.load(tmp_path/'learn.pkl', weights_only=False)
    assert list(loaded.dls.tests) == ['grey'] and len(loaded.dls.train.dataset) == 0


# The command line

def dglit(*args, **kwargs):
    return subprocess.run([sys.executable, '-c', 'from dglit.cli import main; main()', *args], capture_output=True, text=True, **kwargs)


def test_help_imports_nothing_heavy():
    code = "import dglit.cli, sys; print([o for o in ('torch','fastai','pandas','matplotlib','sklearn') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'
    assert all(o in dglit('--help').stdout for o in ('demo', 'train', 'reproduce', 'report', 'list'))


@pytest.mark.parametrize('args,says', [
    (['trian'], "Did you mean 'train'"), (['train', '--method', 'jigsa'], "did you mean 'jigsaw'"), (['train', '--set', 'margin'], 'NAME=VALUE'),
    (['train', '--method', 'rcl', '--set', 'margin=0'], 'not in (0, inf]'), (['reproduce', 'rcl-table3'], "did you mean 'rcl-table2'"),
    (['reproduce', 'rcl-table2', '--rows', 'erm,rcl-1', '--source', 'digits'], 'did you mean'), (['report', 'nowhere'], 'nowhere does not exist'),
    (['train', '--epochs', 'ten'], 'integer')])
def test_a_mistake_is_answered_not_traced(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['dglit', *args])
    with pytest.raises(SystemExit) as e: main()
    assert e.value.code == 2 and says in ' '.join(capsys.readouterr().err.split())


def test_missing_mnist_is_explained(tmp_path):
    blocked = dict(os.environ, DGLIT_DATA=str(tmp_path), http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
    r = dglit('train', cwd=tmp_path, env=blocked)
    assert r.returncode == 2 and 'load_digits()' in r.stderr and 'Traceback' not in r.stderr


def test_reproduce_then_report(tmp_path):
    out = str(tmp_path/'runs')
    args = 'reproduce', 'rcl-table2', '--source', 'digits', '--epochs', '1', '--seeds', '2', '--rows', 'erm', '--out', out
    first, again = dglit(*args), dglit(*args)
    assert first.returncode == again.returncode == 0, first.stderr
    assert 'erm, seed 1' in first.stdout and 'erm, seed' not in again.stdout and '26.0 ± 4.7' in again.stdout
    line = next(o for o in dglit('report', out).stdout.splitlines() if o.startswith('Standard '))
    assert line.split()[1] == '2' and line in again.stdout


def test_train_saves_what_loads(tmp_path):
    r = dglit('train', '--dataset', 'background_mnist', '--model', 'mlp', '--net', 'hidden=16,8', '--source', 'digits', '--epochs', '1', '--bs', '256', '--precision', 'fp32',
              '--method', 'cim+vib', '--set', 'win_size=3', '--schedule', 'flat_cos', '--out', str(tmp_path))
    assert r.returncode == 0 and 'best-valid selects epoch 0' in r.stdout, r.stderr
    record, = tmp_path.glob('*.json')
    run = Run.from_json(record.read_text())
    assert run.spec.settings == dict(win_size=3) and run.spec.schedule == 'flat_cos'
    learn = load_trained(learner_of(run.spec), record.with_suffix(''))
    assert evaluate(learn).accuracy[list(run.metrics)].round(2).to_dict() == {k: round(v, 2) for k, v in run.metrics.items()}


def test_a_run_leaves_no_learner_behind():
    "Not even until the next garbage collection: in a sweep the data of one run after another would pile up."
    alive = lambda: sum(isinstance(o, Learner) for o in gc.get_objects())
    gc.collect()
    before = alive()
    gc.disable()
    try: run(Spec(source='digits', bs=64, epochs=1, data=dict(size=28), precision='fp32'))
    finally: gc.enable()
    assert alive() == before
