"Every method trains on a device that is not the CPU, as it does on the CPU, and waits for it no more often than the list allows."
import csv, json, re
from functools import partial
from inspect import signature
from pathlib import Path

import pytest, torch
from card import CARD, OnCard, a_card, on
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from dglit.core import set_seed
from dglit.data.compose import photo_digits
from dglit.data.loaders import DomainLoaders
from dglit.data.mnist import Digits
from dglit.experiments.registry import DATASETS, METHODS, MODELS
from dglit.experiments.run import run
from dglit.experiments.spec import Spec
from dglit.experiments.latent import latent_points
from dglit.learner import BFloat16, StopAtNaN, domain_learner, evaluate, load_trained, save_trained
from dglit.learner.augmented import with_augmented
from dglit.learner.averaging import WeightAverage
from dglit.learner.groups import repeat_wrong, retrain_last_layer
from dglit.learner.rich_features import groups_of
from dglit.learner.test_time import T3A, TENT

NAMES = [k for k, v in METHODS.items() if v]
# Beside the defaults: every switch turned, and these
VARIANTS = dict(cim=[dict(variant='feature'), dict(variant='gram'), dict(sample='train'), dict(variant='feature', sample='train'), dict(weight=0.)],
                scl=[dict(sample='train')], rcl=[dict(margin=.9, per='channel'), dict(per='batch')], irm=[dict(l2=1e-3)], dropout=[dict(rate=.3)], rsc=[dict(rate=.3)])
def switches(method): return [{k: not p.default} for k, p in signature(METHODS[method]).parameters.items() if isinstance(p.default, bool)]
CASES = [(k, s) for k in METHODS for s in [{}, *(switches(k) + VARIANTS.get(k, []) if METHODS[k] else [])]]
IDS = lambda o: o if isinstance(o, str) else ','.join(f'{k}={v}' for k, v in o.items()) or '-'


def data(device):
    g = torch.Generator().manual_seed(0)
    def part(n): return torch.randint(256, (n, 3, 20, 20), generator=g, dtype=torch.uint8), torch.randint(3, (n,), generator=g), 3 + 2*(torch.arange(n) % 2)
    return DomainLoaders.from_tensors(part(48), part(16), dict(test=part(16)), bs=16, device=device, vocab=range(3))


def tiny():
    model = nn.Module()
    model.body = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    return model


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        parts = tiny()
        self.body, self.head = parts.body, parts.head
    def forward(self, x): return self.head(self.body(x))


class Watch(Callback):
    "Waits and launches of the steps after the first, and how often an epoch's training waits beside its steps."
    order, run_valid = 99, False
    def __init__(self, card): self.card, self.steps, self.begun = card, 0, None
    def now(self): return (self.card.waits, self.card.launches)
    def before_epoch(self): self.begun = self.now()
    def before_train(self): self.start = None
    def after_batch(self):
        self.end = self.now()
        if self.start is None: self.start, self.steps = self.end, 0
        else: self.steps += 1
    def after_train(self):
        self.waits, self.launches = ((b - a)/self.steps for a, b in zip(self.start, self.end))
        self.once = self.now()[0] - self.begun[0] - self.waits*self.n_iter


SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, fused=True)
def learner(method, settings, device, cbs=(), opt=SGD, **kwargs):
    set_seed(0)
    made = METHODS[method](**settings) if METHODS[method] else []
    learn = domain_learner(data(device), Tiny(), made, loss_func=CrossEntropyLossFlat(), cbs=[StopAtNaN(), *cbs], opt_func=opt, lr=1e-2, **kwargs)
    learn.seed = 0
    return learn


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


def numbers(learn):
    "All that a training leaves: weights, and what was logged."
    values = torch.tensor([[float(o) for o in v] for v in learn.recorder.values])
    return {k: v.detach().cpu() for k, v in learn.model.state_dict().items()} | dict(values=values, losses=torch.stack([o.detach().cpu() for o in learn.recorder.losses]))


def same(here, there):
    assert here.keys() == there.keys()
    return all(torch.equal(here[k], there[k]) for k in here if here[k].isfinite().all()) and here['values'].isfinite().all()


@pytest.fixture
def card():
    with a_card() as c: yield c


ROOT = Path(__file__).parent.parent
# Waits and launches of a training step, method by method, as benchmarks/waits.py writes them: no more than that, and the list only shrinks
LIST = {o['method']: o for o in csv.DictReader(open(ROOT/'nbs/results/card-waits.csv'))}
STALE = 'run benchmarks/waits.py, which writes nbs/results/card-waits.csv, and nbs/guides/05_gpu_and_cluster.ipynb, which shows it'
ONCE = 2 # how often an epoch's training waits beside its steps: for the order of the batches to be there, and to see whether a loss was infinite
EVALUATION = 4 # waits of a batch that is measured, all in what fastai gathers

@pytest.mark.parametrize('method,settings', CASES, ids=IDS)
def test_trains_there_as_here(method, settings):
    here = numbers(fit(learner(method, settings, 'cpu')))
    with a_card() as card:
        watch = Watch(card)
        learn = fit(learner(method, settings, CARD, [watch]))
        there = numbers(learn)
        assert all(on(p) for p in learn.model.parameters())
    assert same(here, there)
    assert not card.of('number from the CPU')
    assert method in LIST, STALE
    if not settings: assert watch.waits == int(LIST[method]['waits']), card.of('wait')
    assert watch.waits <= int(LIST[method]['waits']) and watch.once <= ONCE, card.of('wait')
    if not settings: assert watch.launches <= 1.2*int(LIST[method]['launches'])


def test_the_list():
    "One wait a step is fastai's Recorder's; PAIR solves a program on the host."
    assert [*LIST] == [*METHODS], STALE
    assert {k for k, o in LIST.items() if o['waits'] != '1'} <= {'pair'} and int(LIST['pair']['waits']) <= 2


@pytest.mark.parametrize('method', METHODS)
def test_in_bfloat16(method):
    "Under autocast, one epoch: the same to the precision of its numbers."
    class Type(Callback):
        def after_pred(self): self.dtype = self.pred.dtype
    a = fit(learner(method, {}, 'cpu'), 1)
    with a_card() as card:
        b = fit(learner(method, {}, CARD, [BFloat16(), types := Type()]), 1)
        assert types.dtype == torch.bfloat16 and all(on(p) and p.dtype == torch.float32 and p.isfinite().all() for p in b.model.parameters())
        values = [float(o) for o in b.recorder.values[0][:2]]
    assert not card.of('number from the CPU')
    assert values == pytest.approx([float(o) for o in a.recorder.values[0][:2]], rel=.05)


@pytest.mark.parametrize('method', METHODS)
def test_measured_exported_and_read_again(method, tmp_path):
    "Accuracies, predictions, an exported Learner and saved weights: there as here."
    def tables(learn):
        with learn.no_bar(): return evaluate(learn), learn.get_preds(dl=learn.dls.tests['test'])[0].cpu()
    here, answers = tables(fit(learner(method, {}, 'cpu'), 1))
    with a_card() as card:
        learn = fit(learner(method, {}, CARD, path=tmp_path), 1)
        there, same_answers = tables(learn)
        assert method == 'pair' or not card.of('float64')                           # Apple's cards have none
        assert here.equals(there) and torch.equal(answers, same_answers)
        save_trained(learn, tmp_path/'saved')
        learn.export('learn.pkl')
        again = learner(method, {}, CARD)
        with again.no_bar(), again.no_logging(): again.validate() # where a method's network is made
        load_trained(again, tmp_path/'saved')
        assert all(on(p) for p in again.model.parameters()) and torch.equal(tables(again)[1], answers)
    back = load_learner(tmp_path/'learn.pkl')
    with back.no_bar(): assert torch.equal(back.get_preds(dl=data('cpu').tests['test'])[0], answers)


def test_waits_of_a_measurement():
    "As often a batch, whatever is measured; and batches that are only looked at are large."
    waits = {}
    with a_card() as card:
        learn = fit(learner('rcl', {}, CARD), 1)
        assert learn.dls.train.bs == 16 < 1000 < learn.dls.valid.bs
        for n in (1, 3):
            learn.dls.loaders[1] = learn.dls.train.new(bs=48//n, shuffle=False)
            before = card.waits
            learn.dls.tests = {}
            evaluate(learn)
            waits[n] = card.waits - before
    assert (waits[3] - waits[1])/2 == EVALUATION


@pytest.mark.parametrize('opt', [Adam, partial(OptimWrapper, opt=torch.optim.Adam, fused=True)], ids=['fastai', 'torch'])
@pytest.mark.parametrize('method', ['erm', 'reconstruction', 'cim', 'group_dro'])
def test_optimizers(method, opt):
    here = numbers(fit(learner(method, {}, 'cpu', opt=opt), 1))
    with a_card() as card: there = numbers(fit(learner(method, {}, CARD, opt=opt), 1))
    assert same(here, there) and not card.of('number from the CPU')


@pytest.mark.parametrize('opt', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.Adam)], ids=['fused', 'fastai', 'torch'])
@pytest.mark.parametrize('method', ['erm', 'jigsaw', 'vib'])
def test_a_training_that_moves(method, opt):
    "An epoch here, another there: networks and the optimizer's memory go along."
    here = numbers(fit(fit(learner(method, {}, 'cpu', opt=opt), 1), 1))
    learn = fit(learner(method, {}, 'cpu', opt=opt), 1)
    with a_card():
        learn.dls.to(CARD)
        there = numbers(fit(learn, 1))
        assert all(on(p) for p in learn.model.parameters())
    assert same(here, there)


@pytest.mark.parametrize('method', ['cim', 'vib', 'jigsaw', 'group_dro'])
def test_a_method_added_later(method):
    "Its network is made when the model is there already."
    def trained(device):
        learn = fit(learner('erm', {}, device), 1)
        learn.add_cb(METHODS[method]())
        return numbers(fit(learn, 1))
    here = trained('cpu')
    with a_card() as card: there = trained(CARD)
    assert same(here, there) and not card.of('number from the CPU')


@pytest.mark.parametrize('name', [k for k, f in DATASETS.items() if 'digits' in signature(f).parameters])
def test_data(name, digits):
    few = Digits(digits.x_train[:60], digits.y_train[:60], digits.x_test[:20], digits.y_test[:20])
    def batches(device): return [torch.cat(o) for dl in DATASETS[name](few, bs=20, device=device).loaders for _ in range(2) for o in zip(*dl)]
    here = batches('cpu')
    with a_card() as card:
        there = batches(CARD)
        assert all(map(on, there))
        assert len(here) == len(there) and all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
    assert not card.of('number from the CPU')


def test_photographs():
    "Cropped as on the CPU, by other sums; no batch waits, and none is made image by image."
    def batches(device): return [b for _ in range(2) for b in photo_digits(size=16, bs=499, augment=True, device=device).train]
    here = batches('cpu')
    with a_card() as card:
        dl = photo_digits(size=16, bs=499, augment=True, device=CARD).train
        waits = []
        there = []
        for _ in range(2):
            for b in dl:
                there.append(b)
                waits.append((card.waits, card.launches))
        assert waits[1][0] == waits[0][0] and waits[3][0] == waits[2][0] and waits[1][1] - waits[0][1] < 30
        assert all(on(o) for b in there for o in b) and not card.of('number from the CPU')
        for a, b in zip(here, there[:2]): assert torch.equal(a[1], b[1].cpu()) and torch.equal(a[2], b[2].cpu()) and (a[0] - b[0].cpu()).abs().mean() < .02


def test_tools(monkeypatch):
    "What else takes a model or data: there as here."
    monkeypatch.setattr('dglit.experiments.latent.TSNE.fit_transform', lambda self, f: f[:, :2])
    def found(device):
        learn = fit(learner('erm', {}, device, [WeightAverage()]))
        model, dls = learn.model.eval(), learn.dls
        x, y, d = dls.valid.one_batch()
        with torch.no_grad(): tried = [T3A(model)(x), retrain_last_layer(model, x, y, d, refits=2)(x), *model.state_dict().values()]
        return [o.detach().cpu() for o in [*tried, TENT(model)(x), *repeat_wrong(dls, model, 3).train.dataset.tensors, groups_of(torch.stack([y == 0, y == 1])),
                                           *with_augmented(dls).tests['augmented'].dataset.tensors]], latent_points(learn)
    here, points = found('cpu')
    with a_card() as card: there, same_points = found(CARD)
    assert len(here) == len(there) and all(torch.equal(a, b) for a, b in zip(here, there)) and points.equals(same_points)
    assert not card.of('number from the CPU')


@pytest.mark.parametrize('name', MODELS)
def test_models(name):
    set_seed(0)
    x, model = torch.rand(4, 3, 32, 32), MODELS[name](3, 5, 32).requires_grad_(False)
    y = model(x)
    with a_card(): assert torch.equal(model.to(CARD)(x.to(CARD)).cpu(), y)


def test_a_run_in_float32_is_in_float32(digits):
    "No TF32 in a card's convolutions, and the setting is as it was afterwards."
    few, seen = Digits(digits.x_train[:60], digits.y_train[:60], digits.x_test[:20], digits.y_test[:20]), []
    before = torch.backends.cudnn.allow_tf32
    run(Spec(model='mlp', epochs=1, hidden=[4], precision='fp32'), lambda o: seen.append(torch.backends.cudnn.allow_tf32), digits=few)
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


# The card itself

MIXED = dict(add=lambda t: t + torch.ones(3), cat=lambda t: torch.cat([t, torch.ones(3)]), index=lambda t: t[torch.tensor([0, 1])], generator=lambda t: torch.rand(3, device=CARD, generator=torch.Generator()),
             early=lambda t: t.to('cpu', non_blocking=True), data=lambda t: t + t.new_tensor([1., 2., 3.]).cpu(), numpy=lambda t: t.numpy(), matmul=lambda t: t @ torch.ones(3))
WAITING = dict(item=lambda t: t.sum().item(), bool=lambda t: bool(t.sum() > 0), int=lambda t: int(t[0]), cpu=lambda t: t.cpu(), to=lambda t: torch.ones(3).to(CARD), nonzero=lambda t: t.nonzero(), mask=lambda t: t[t > 0],
               unique=lambda t: t.unique(), equal=lambda t: torch.equal(t, t), made=lambda t: torch.tensor([1., 2.], device=t.device) + t[:2], alike=lambda t: t.new_tensor([1., 2., 3.]) + t, tolist=lambda t: t.tolist(), print=lambda t: f'{t}', compare=lambda t: t[0] in [1.], hurried=lambda t: torch.ones(3).to(CARD, non_blocking=True),
               repeat=lambda t: t.repeat_interleave(t.long()), bincount=lambda t: t.long().bincount(), hot=lambda t: nn.functional.one_hot(t.long()), put=lambda t: t.clone().__setitem__(t > 0, t))
SILENT = dict(add=lambda t: t + 1, where=lambda t: torch.where(t > 0, t, 0.), pinned=lambda t: torch.ones(3).pin_memory().to(CARD, non_blocking=True), hot=lambda t: nn.functional.one_hot(t.long(), 4), zeros=lambda t: torch.zeros(3, device=t.device) + t,
              back=lambda t: (t.clone().requires_grad_()*2).sum().backward(), sort=lambda t: t.sort(), gather=lambda t: t[t.long() - 1], filled=lambda t: t.masked_fill(t > 0, 0.))

@pytest.mark.parametrize('f', MIXED.values(), ids=MIXED)
def test_the_card_refuses(card, f):
    t = torch.tensor([1., 2., 3.]).to(CARD)
    with pytest.raises((RuntimeError, TypeError)): f(t)


@pytest.mark.parametrize('f', [*WAITING.values(), *SILENT.values()], ids=[*WAITING, *(f'no-{k}' for k in SILENT)])
def test_the_card_counts(card, f):
    t = torch.tensor([1., 2., 3.]).to(CARD)
    before = card.waits
    f(t)
    assert (card.waits > before) == (f in WAITING.values())


# The sources

def test_cells_for_a_gpu_find_it():
    "`default_device(False)` keeps a page on the CPU: no cell for a GPU comes after it."
    for nb in (ROOT/'nbs').rglob('*.ipynb'):
        kept = False
        for c in json.loads(nb.read_text(encoding='utf-8'))['cells']:
            s = ''.join(c['source'])
            if c['cell_type'] != 'code': continue
            there = 'default_device(True)' in s or "'cuda'" in s
            assert there or not (kept and '#| gpu' in s), f'{nb.name}: a cell for a GPU, on the CPU: {s[:80]}'
            for m in re.findall(r'default_device\((False|True|None|)', s): kept = m == 'False'


def test_tests_for_a_gpu_use_it():
    "The tests keep to the CPU, too: one for CUDA that makes a Learner or loaders says `default_device(True)`."
    for f in (ROOT/'tests').glob('test_*.py'):
        for marks, body in re.findall(r"(?m)((?:^@pytest.*\n)+)def (test_\w+\(.*(?:\n(?:[ \t].*)?)*)", f.read_text(encoding='utf-8')):
            if 'CUDA' in marks and re.search(r'\b(run|learner|fit|domain_learner|Learner)\(', body): assert 'default_device(True)' in body, f'{f.name}: {body[:60]}'
