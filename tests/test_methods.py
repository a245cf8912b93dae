"What every method promises: any Learner, in company, and nothing left behind."
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import SchedLin
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropy, MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastai.torch_core import default_device
from fastai.vision.learner import vision_learner
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision.models import resnet18

from dglit.core import DglitError, set_seed
from dglit.data.colored_mnist import colored_mnist
from dglit.data.loaders import DomainLoaders
from dglit.data.mnist import Digits
from dglit.data.mnist_mp import mnist_mp
from dglit.experiments.registry import METHODS
from dglit.experiments.run import run
from dglit.experiments.spec import Part, Recipe, Spec
from dglit.learner import BFloat16, domain_learner, evaluate
from dglit.losses.irm import irm_penalty
from dglit.methods.cim import CIM
from dglit.methods.core import DomainMethod, FeatureMethod, Method, SideNet, TakeDomain, step_generator
from dglit.methods.irm import IRM, GroupDRO, VREx
from dglit.methods.jigsaw import PERMUTATIONS, Jigsaw
from dglit.methods.reconstruction import Reconstruction
from dglit.methods.rsc import RSC, rsc_mask, true_class
from dglit.methods.sam import SAM
from dglit.methods.vib import VIB
from dglit.models.mlp import MLP
from dglit.papers.irm import IRM_COLORED_MNIST

NAMES = [k for k, v in METHODS.items() if v]
OPTIMIZERS = dict(fastai=Adam, ranger=ranger, torch=partial(OptimWrapper, opt=torch.optim.AdamW))
DOMAIN = [k for k in NAMES if issubclass(METHODS[k], DomainMethod)]
WEIGHTED = [k for k in NAMES if issubclass(METHODS[k], Method)]
COMPARING = [k for k in DOMAIN if k not in ('group_dro', 'dann')]  # of one domain they make nothing; DANN asks the data


@pytest.fixture(scope='module')
def few(digits): return Digits(digits.x_train[:128], digits.y_train[:128], digits.x_test[:64], digits.y_test[:64])


def tiny():
    "A body of 8 channels and a head with dropout and batch norm: what a method may meet, in little time."
    model = nn.Module()
    model.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    model.head = nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, 10))
    model.forward = lambda x: model.head(model.body(x))
    return model


def learner(few, cbs=(), model=None, bs=32, ids=(0, 1), **kwargs):
    "A Learner on MNIST-MP; where a callback takes domains, every other digit is of a second one."
    set_seed(0)
    dls = mnist_mp(few, bs=bs, size=28)
    if any(isinstance(o, (DomainMethod, TakeDomain)) for o in (cbs if isinstance(cbs, list) else [cbs])):
        halves = lambda dl: (*dl.dataset.tensors, torch.tensor(ids)[torch.arange(len(dl.dataset)) % 2])
        dls = DomainLoaders.from_tensors(halves(dls.train), halves(dls.valid), {}, bs=bs, vocab=dls.vocab, balanced=bs > 1)
    return Learner(dls, model or tiny(), CrossEntropyLossFlat(), lr=1e-3, metrics=accuracy, cbs=cbs, **kwargs)


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


def same(a, b): return all(torch.equal(*o) for o in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
def finite(learn): return all(p.isfinite().all() for p in learn.model.parameters())
def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
def clean(learn): return hooks(learn.model) == 0 and not torch.is_autocast_enabled('cpu')
def side_nets(learn): return [o.net for o in learn.cbs if isinstance(o, SideNet) and o.net is not None]
def in_optimizer(learn): return sorted(id(p) for o in learn.opt.param_lists for p in o)
def all_parameters(learn): return sorted(id(p) for m in [learn.model, *side_nets(learn)] for p in m.parameters())


def every_method(weights=1.):
    "One of each method."
    small = dict(rcl=.01, decov=.01, orthogonality=.1, jigsaw=.1, reconstruction=.1, spectral_decoupling=.01, irm=5., vrex=5., group_dro=.1, cim=.1, vib=1e-3, scl=.1)
    instead = ('pair',) # its loss is in place of the others' sum
    return [METHODS[k](small.get(k, .01)*weights) for k in WEIGHTED if k not in instead] + [METHODS['dropout'](.3), RSC(.3)]


class Cancels(Callback):
    "An end in the middle of a batch."
    order = 4
    def after_pred(self):
        if self.training and self.iter == 2: raise CancelFitException


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('name', NAMES)
def test_leaves_the_learner_as_it_found_it(few, name, opt):
    learn = learner(few, METHODS[name](), opt_func=OPTIMIZERS[opt])
    before = list(learn.model.state_dict())
    fit(learn); fit(learn)
    assert list(learn.model.state_dict()) == before and clean(learn) and finite(learn)
    assert in_optimizer(learn) == all_parameters(learn)
    assert learn.metrics.attrgot('name') == ['accuracy']
    learn.opt.load_state_dict(learn.opt.state_dict())
    learn.remove_cb(METHODS[name])
    assert finite(fit(learn))


@pytest.mark.parametrize('name', NAMES)
def test_the_optimizer_remembers_what_a_method_trains(few, name):
    "From one fit to the next, with fastai's optimizers and with PyTorch's."
    for opt in OPTIMIZERS.values():
        learn = fit(learner(few, METHODS[name](), opt_func=opt))
        state, trained = getattr(learn.opt, 'opt', learn.opt).state, [learn.model, *side_nets(learn)]
        def memory(): return {id(p): {k: id(v) for k, v in state[p].items()} for m in trained for p in m.parameters() if state.get(p)}
        before = memory()
        assert len(before) > .5*sum(len(list(m.parameters())) for m in trained) # RSC and the like may leave some without a gradient
        assert all(state.get(p) for m in side_nets(learn) for p in m.parameters())
        with learn.no_bar(): learn.validate()
        assert memory() == before


# Where a step may be interrupted: from before it has changed the weights to after
BEFORE_THE_STEP = ['before_batch', 'forward', 'after_pred', 'loss', 'after_loss', 'before_backward', 'backward', 'before_step']
AFTER_IT = ['after_step', 'after_batch', 'before_validate', 'validation', 'after_epoch']
ERRORS = [RuntimeError('out of luck'), KeyboardInterrupt(), CancelBatchException(), CancelFitException()]


class Breaks(Callback):
    "Raises an error at an event, of training or between."
    order, run_valid = 60, False
    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.now)
    def now(self): raise self.error


class BrokenLoss:
    "A loss function that raises an error."
    reduction = 'mean'
    def __init__(self, error): self.error = error
    def __call__(self, *args): raise self.error


def interrupted(learn, place, error):
    "Fit until `error` at `place`."
    def now(*_): raise error
    def in_validation(module, *_):
        if not module.training: raise error
    last, loss, cbs, handle = [m for m in learn.model.modules() if isinstance(m, nn.Linear)][-1], learn.loss_func, [], None
    if place == 'forward': handle = last.register_forward_hook(now)
    elif place == 'validation': handle = last.register_forward_hook(in_validation)
    elif place == 'backward': handle = last.register_full_backward_hook(now)
    elif place == 'loss': learn.loss_func = BrokenLoss(error)
    else: cbs = [Breaks(place, error)]
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs)
    except BaseException as e: assert type(e) is type(error), e
    finally:
        if handle: handle.remove()
        learn.loss_func = loss


def no_norm():
    "A network whose forward pass changes nothing in it."
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.MaxPool2d(2)),
                         nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)))


@pytest.mark.parametrize('error', ERRORS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('name', [*NAMES, 'all', 'all with SAM'])
def test_an_interrupt_leaves_nothing(few, name, error):
    "At any place: no hook, no autocast, the same weights if no step was made, and an evaluation that is theirs."
    cbs = [METHODS[name]()] if name in NAMES else [*every_method(), BFloat16()] + [SAM()]*('SAM' in name)
    learn = learner(few.first(32), cbs, no_norm(), bs=32)
    def seen(): return {k: v.clone() for k, v in learn.model.state_dict().items()}, evaluate(learn)
    now, again = seen()
    for place in BEFORE_THE_STEP + AFTER_IT:
        if place in AFTER_IT[2:] and isinstance(error, CancelBatchException): continue  # there is no batch to cancel
        state, accuracies = now, again
        interrupted(learn, place, error)
        assert clean(learn) and not getattr(learn, 'second_pass', False), place
        now, again = seen()
        if place in BEFORE_THE_STEP: assert all(torch.equal(state[k], now[k]) for k in state) and again.equals(accuracies), place
        if name in NAMES:
            x, y = learn.dls.valid.one_batch()[:2]
            with torch.no_grad(): right = (learn.model.eval()(x).argmax(1) == y).float().mean().item()
            assert again.accuracy['valid'] == pytest.approx(100*right, abs=1e-3), place
    fit(learn)
    assert clean(learn) and finite(learn) and in_optimizer(learn) == all_parameters(learn)


@pytest.mark.parametrize('name', WEIGHTED)
def test_a_weight_may_be_a_schedule(few, name):
    a, b = fit(learner(few, METHODS[name](SchedLin(0., 1.)))), fit(learner(few, METHODS[name](SchedLin(0., 0.))))
    assert finite(a) and not same(a, b)


@pytest.mark.parametrize('name', [o for o in WEIGHTED if o not in ('jigsaw', 'edges', 'cim', 'vib')]) # batch norm counts the other images of two; two are in the model
def test_weight_zero_is_plain_training(few, name):
    "To the last bit, on batches with as many examples of each domain."
    assert same(fit(learner(few, METHODS[name](0.))), fit(learner(few, TakeDomain() if name in DOMAIN else ())))


@pytest.mark.parametrize('name', NAMES)
def test_the_same_seed_gives_the_same_network(few, name):
    a, b = (fit(learner(few, METHODS[name]())) for _ in range(2))
    assert same(a, b)
    plain = fit(learner(few, TakeDomain() if name in DOMAIN else ()))
    inner = {k.removeprefix('model.').replace('head.5.layer', 'head.5'): v for k, v in a.model.state_dict().items()}
    assert any(not torch.equal(v, inner[k]) for k, v in plain.model.state_dict().items())


def test_all_together_in_any_order(few):
    "Every method at once: the order in which they are listed changes rounding alone. (Of two edits of the features the first comes first; and jigsaws and edges pass through dropout and batch norm in their order.)"
    make = lambda: [o for o in every_method() if not isinstance(o, (RSC, METHODS['edges'], METHODS['mixup']))]
    a, b = fit(learner(few, make())), fit(learner(few, make()[::-1]))
    p, q = a.model.state_dict(), b.model.state_dict()
    assert set(p) == set(q) and all(torch.allclose(p[k].float(), q[k].float(), atol=1e-4) for k in p)
    assert set(a.recorder.metric_names) == set(b.recorder.metric_names) >= {'rcl', 'de_cov', 'jigsaw', 'irm', 'vr_ex', 'group_dro', 'cim', 'plus', 'minus', 'vib', 'scl'}


@pytest.mark.parametrize('name', NAMES)
def test_degenerate_batches(digits, name):
    "A batch of one image, and batches of one class."
    plain = lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU(), nn.MaxPool2d(2)), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    one_class = digits.y_train == 3
    for n, bs in ((2, 1), (8, 4)):
        x, y = digits.x_train[one_class][:n], digits.y_train[one_class][:n]
        learn = learner(Digits(x, y, x, y), METHODS[name](), plain(), bs=bs)
        if name in COMPARING and bs == 1:
            with pytest.raises(DglitError, match='batch of 1 is all of domain'): fit(learn)
            continue
        fit(learn)
        assert finite(learn) and learn.opt.state_dict()['state'], 'a step was taken'


def test_the_jigsaw_term_is_its_definition(few):
    "Image by image: shuffle the tiles, ask the second head, take the cross-entropy of the permutation."
    class Check(Callback):
        order, run_valid = 6, False
        def after_loss(self):
            j, net = self.learn.jigsaw, self.learn.model
            which = torch.randint(24, (len(self.x),), generator=step_generator(j))
            losses = []
            for x, k in zip(self.x, which):
                p, shuffled = PERMUTATIONS[k], torch.empty_like(x)
                for place in range(4):
                    (a, b), (c, d) = divmod(place, 2), divmod(int(p[place]), 2)
                    shuffled[:, 14*a:14*a+14, 14*b:14*b+14] = x[:, 14*c:14*c+14, 14*d:14*d+14]
                logits = j.net(net[1][:-1](net[0](shuffled[None])))
                losses.append(-logits.log_softmax(1)[0, k])
            assert torch.allclose(torch.stack(losses).mean(), j.term(), rtol=1e-4)
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 5, stride=3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(256, 12), nn.ReLU(), nn.Linear(12, 10)))
    fit(learner(few, [Jigsaw(), Check()], plain))


def test_no_gradient_through_what_rsc_mutes():
    "The body learns from what is left alone: the gradient of the features is that of the head, times the mask."
    torch.manual_seed(0)
    body, head = nn.Conv2d(3, 6, 5), nn.Sequential(nn.Flatten(), nn.Linear(6*16, 10))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    f = body(x).detach().requires_grad_()
    g, = torch.autograd.grad(head(f).gather(1, y[:, None]).sum(), f)
    for places in (False, True):
        mask = rsc_mask(f, g, .5, places).expand_as(f)
        loss = nn.functional.cross_entropy(head(f*mask), y)
        muted, = torch.autograd.grad(loss, f)
        assert (muted[mask == 0] == 0).all() and (muted[mask == 1] != 0).any() and mask.mean() == .5


@pytest.mark.parametrize('cbs', [BFloat16, partial(GradientAccumulation, 64), partial(GradientClip, .1)], ids=['bfloat16', 'accumulation', 'clip'])
@pytest.mark.parametrize('name', NAMES)
def test_with_fastai_callbacks(few, name, cbs):
    learn = learner(few, [METHODS[name](), cbs()])
    if name == 'sam' and hasattr(learn, 'gradient_accumulation'): assert 'a step of several' in error_of(lambda: fit(learn))
    else: assert finite(fit(learn))


@pytest.mark.parametrize('name', NAMES)
def test_a_one_cycle_schedule_and_discriminative_rates(few, name):
    learn = learner(few, METHODS[name](), splitter=lambda m: [list(m.body.parameters()), list(m.head.parameters())])
    with learn.no_bar(), learn.no_logging():
        learn.freeze(); learn.fit_one_cycle(1, 1e-4)
        learn.unfreeze(); learn.fit_one_cycle(1, slice(1e-5, 1e-4))
    assert finite(learn) and all(p.requires_grad for p in learn.model.parameters())


class Items:
    "Images, labels and domains, for fastai's own loaders."
    def __init__(self, n, domains): self.x, self.y, self.domains = torch.randn(n, 3, 32, 32).clamp(-1, 1), torch.arange(n) % 3, domains
    def __len__(self): return len(self.y)
    def __getitem__(self, i): return (self.x[i], self.y[i], i % 2) if self.domains else (self.x[i], self.y[i])
    def new_empty(self): return Items(0, self.domains)


def images(domains=False):
    dls = DataLoaders(*(DataLoader(Items(n, domains), bs=4, device='cpu') for n in (8, 4)))
    dls.c, dls.n_inp = 3, 1
    return dls


@pytest.mark.parametrize('name', NAMES)
def test_on_a_resnet(name, tmp_path):
    "fastai's vision_learner, its three groups of parameters frozen and at rates of their own; export and prediction."
    set_seed(0)
    learn = vision_learner(images(name in DOMAIN), resnet18, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(), cbs=METHODS[name](), path=tmp_path)
    before = list(learn.model.state_dict())
    learn.freeze()
    first = [m for m in learn.model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3 and m.out_channels == 64][0].weight
    kept = first.clone()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-4))
    assert len(learn.opt.param_lists) == 3 and torch.equal(first, kept)
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-5, 1e-3))
    assert finite(learn) and list(learn.model.state_dict()) == before and hooks(learn.model) == 0 and not torch.equal(first, kept)
    assert in_optimizer(learn) == all_parameters(learn)
    learn.export('learn.pkl')
    back, dl = torch.load(tmp_path/'learn.pkl', weights_only=False), DataLoader([(o,) for o in torch.randn(2, 3, 32, 32)], bs=2)
    back.remove_cbs([o for o in back.cbs if type(o).__module__.startswith('dglit')])
    with learn.no_bar(), back.no_bar(): assert torch.equal(*(o.get_preds(dl=dl)[0] for o in (back, learn)))


FRESH = """
import sys, torch
from fastai.learner import load_learner
learn = load_learner(sys.argv[1]+'/learn.pkl')
learn.remove_cbs([o for o in learn.cbs if type(o).__module__.startswith('dglit')])
x = torch.load(sys.argv[1]+'/x.pt')
with torch.no_grad(): torch.save(learn.model.eval()(x), sys.argv[1]+'/z.pt')
"""


@pytest.mark.parametrize('name', ['cim', 'vib'])
def test_what_is_in_the_model_goes_where_the_model_goes(name, tmp_path):
    "SaveModelCallback, save and load, a process without dglit's callbacks, torch.save, torch.export, plain PyTorch."
    set_seed(0)
    make = lambda: vision_learner(images(), resnet18, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(), cbs=METHODS[name](), path=tmp_path)
    learn, x = make(), torch.rand(4, 3, 32, 32)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, cbs=SaveModelCallback(fname='best'))
    with torch.no_grad(): z = learn.model.eval()(x)
    fresh = make()
    with torch.no_grad(): assert not torch.equal(fresh.model.eval()(x), z)
    fresh.load('best')
    with torch.no_grad(): assert torch.equal(fresh.model.eval()(x), z)
    learn.export('learn.pkl'); torch.save(x, tmp_path/'x.pt')
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])             # the data's class is this module's
    subprocess.run([sys.executable, '-c', FRESH, str(tmp_path)], check=True, env={**os.environ, 'PYTHONPATH': here})
    assert torch.allclose(torch.load(tmp_path/'z.pt'), z, atol=1e-5)
    torch.save(learn.model, tmp_path/'model.pt')
    with torch.no_grad(): assert torch.equal(torch.load(tmp_path/'model.pt', weights_only=False)(x), z)
    assert torch.allclose(torch.export.export(learn.model, (x,)).module()(x), z, atol=1e-5)


def test_rsc_leaves_running_means_to_training():
    "The head's look ahead is an evaluation: batch norm counts each batch once."
    set_seed(0)
    learn = vision_learner(images(), resnet18, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(), cbs=RSC(.3))
    fit(learn)
    bn = next(m for m in learn.model[1].modules() if isinstance(m, nn.BatchNorm1d))
    assert bn.num_batches_tracked == 2


def test_what_cannot_be_done_is_said(few):
    flat = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(2352, 8)), nn.Linear(8, 10))
    with pytest.raises(DglitError, match=r'features of shape \(32, 8\): Decoder needs'): fit(learner(few, Reconstruction(), flat))
    for name in ('rcl', 'dropout', 'decov', 'jigsaw', 'rsc', 'orthogonality'): assert finite(fit(learner(few, METHODS[name](), nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(2352, 8)), nn.Linear(8, 10)))))
    whole = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(2352, 10))
    with pytest.raises(DglitError, match='has neither a `body`'): fit(learner(few, RSC(), whole))
    with pytest.raises(DglitError, match='has no convolutional or linear layer'): fit(learner(few, Jigsaw(), nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10), nn.PReLU())))

    class Brighter(Callback):
        def before_batch(self): self.learn.xb = (self.x*3,)
    with pytest.raises(DglitError, match='Decoder draws in'): fit(learner(few, [Reconstruction(), Brighter()]))


def test_irm_takes_any_loss(few):
    "The penalty on the Learner's own loss is that of the definition by double backward, smoothed losses and plain functions included."
    for loss in (CrossEntropyLossFlat(), CrossEntropyLossFlat(label_smoothing=.1), nn.CrossEntropyLoss(), LabelSmoothingCrossEntropy(), nn.functional.cross_entropy):
        learn = learner(few, IRM(1., 0))
        learn.loss_func = loss
        z, y, d = torch.randn(32, 10), torch.arange(32) % 10, torch.arange(32) % 2
        penalty = irm_penalty(z, y, d, learn.irm.losses)
        w = torch.ones(2, requires_grad=True)
        each = torch.stack([loss(w[e]*z[d == e], y[d == e]) for e in (0, 1)])
        slopes, = torch.autograd.grad(each.sum(), w)
        assert torch.allclose(penalty, slopes.pow(2).mean(), rtol=1e-4)
        assert finite(fit(learn))
    learn = learner(few, IRM(1., 0), nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(2352, 1)), nn.Flatten(0)))
    learn.loss_func, learn.metrics = MSELossFlat(), []
    assert finite(fit(learn))


def test_irm_is_the_recipe_by_double_backward(digits):
    "From the same weights and data, in float32, fifty steps: the parameters of the authors' recipe, to 1e-5."
    settings = dict(weight=91257.18613115903, anneal_steps=20, l2=0.00110794568)
    dls = colored_mnist(digits, n=998)
    (x, y, d), models = next(iter(dls.train)), []
    for _ in range(2):
        set_seed(0)
        models.append(MLP(hidden=[390, 390]))
    learn = domain_learner(dls, models[0], IRM(**settings), 'last', BCEWithLogitsLossFlat(), every=50, opt_func=partial(OptimWrapper, opt=torch.optim.Adam), lr=4.898536566546834e-4, wd=0.)
    fit(learn, 50)
    opt = torch.optim.Adam(models[1].parameters(), 4.898536566546834e-4)
    for step in range(50):
        risks, penalties = [], []
        for e in (0, 1):
            scale = torch.tensor(1.).requires_grad_()
            risks.append(nn.functional.binary_cross_entropy_with_logits(models[1](x[d == e])*scale, y[d == e][:, None].float()))
            penalties.append(torch.autograd.grad(risks[-1], [scale], create_graph=True)[0]**2)
        w = settings['weight'] if step >= 20 else 1.
        loss = torch.stack(risks).mean() + settings['l2']*sum(p.norm().pow(2) for p in models[1].parameters()) + w*torch.stack(penalties).mean()
        opt.zero_grad()
        (loss/max(w, 1.)).backward()
        opt.step()
    assert max((p - q).abs().max().item() for p, q in zip(*(m.parameters() for m in models))) < 1e-5


def test_l2_as_weight_decay(digits):
    "Plain training with the recipe's l2 term is Adam with twice the weight decay."
    def trained(cbs, wd):
        set_seed(0)
        return fit(domain_learner(colored_mnist(digits), MLP(hidden=[16, 16]), cbs, 'last', BCEWithLogitsLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.Adam), lr=1e-3, wd=wd), 5)
    a, b, none = (list(trained(*o).model.parameters()) for o in ((IRM(0., l2=.01), 0.), ((), .02), ((), 0.)))
    apart = lambda a, b: max((p - q).abs().max().item() for p, q in zip(a, b))
    assert apart(a, b) < 5e-5 < 5e-3 < apart(a, none)                            # Adam makes much of rounding where a slope is nearly 0


def test_annealing_counts_steps_whatever_else_runs(digits):
    "Validation and predictions between the steps do not start the count again."
    class Look(Callback):
        order, busy = 70, False
        def after_epoch(self):
            if self.busy: return # they are epochs, too
            self.busy = True
            with self.learn.no_bar(), self.learn.no_logging(): self.learn.validate(); self.learn.get_preds()
            self.busy = False

    class Weights(Callback):
        order, run_valid = 6, False
        def __init__(self): self.seen = []
        def after_loss(self): self.seen.append(self.learn.irm.weight_now())
    weights = Weights()
    set_seed(0)
    learn = Learner(colored_mnist(digits, bs=500), MLP(hidden=[8]), BCEWithLogitsLossFlat(), lr=1e-3, cbs=[IRM(7., 5), weights, Look()])
    fit(learn, 5)
    assert weights.seen == [1.]*5 + [7.]*5


def test_group_dro_is_algorithm_1(few):
    "The weights of the domains over four steps, written out; a domain that is missing keeps its own."
    class Risks(Callback):
        order, run_valid = 4, False
        def __init__(self): self.seen = []
        def after_loss(self): self.seen.append(self.learn.group_dro.domain_risks().detach())
    risks = Risks()
    learn = fit(learner(few, [GroupDRO(step_size=.5), risks]))
    q = torch.ones(2)
    for r in risks.seen:
        q = q*(.5*r).exp()
        q = q/q.sum()
    assert torch.allclose(q, learn.group_dro.q, atol=1e-6)
    dro = learn.group_dro
    sums = sum(.5*r for r in risks.seen)
    learn.domain, learn.pred, learn.yb, learn.loss = torch.tensor([0, 2]), torch.randn(2, 10), (torch.tensor([1, 1]),), torch.tensor(0.)
    dro.after_pred(); dro.term()
    new = torch.stack([learn.loss_func(learn.pred[:1], learn.y[:1]), torch.tensor(0.), learn.loss_func(learn.pred[1:], learn.y[1:])])
    assert torch.allclose(dro.q, (torch.cat([sums, torch.zeros(1)]) + .5*new).softmax(0), atol=1e-6)  # as if it had been there, with no risk
    dro.step_size = 1e4
    assert dro.term().isfinite() and dro.q.isfinite().all()                                          # no overflow


def test_balanced_minibatches(digits):
    "Batches of as many of each environment, in mixed precision, unbiased, with weights on the environments."
    for method in (IRM(10., 3, unbiased=True), VREx(10., 3), GroupDRO()):
        set_seed(0)
        learn = domain_learner(colored_mnist(digits, envs=(.3, .2, .1), bs=60, rgb=True), MLP(3, 1, 28, hidden=[16]), method, loss_func=BCEWithLogitsLossFlat(), cbs=BFloat16(), lr=1e-3)
        fit(learn)
        assert finite(learn) and learn.track_domains.curve[-1]['train'] > 50


def test_domains_with_lr_find_export_and_predictions(digits, tmp_path):
    "fastai's own tools on loaders with domains, balanced minibatches included."
    for bs in (None, 100):
        set_seed(0)
        learn = domain_learner(colored_mnist(digits, bs=bs), MLP(hidden=[8]), IRM(10., 2), loss_func=BCEWithLogitsLossFlat(), every=2, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=5)
        fit(learn, 5)
        assert [o['epoch'] for o in learn.track_domains.curve] == [0, 2, 4] and learn.domain is None
        assert len(learn.get_preds()[0]) == 599
        learn.export('learn.pkl')
        assert torch.load(tmp_path/'learn.pkl', weights_only=False).model(torch.rand(2, 2, 14, 14)).shape == (2, 1)


def test_predictions_between_the_steps(digits):
    "Another callback that predicts, at any moment, finds the targets as they should be, and is not cancelled."
    class Predicts(Callback):
        order, seen = 70, 0
        def __init__(self, inner): self.inner = inner
        def after_train(self):
            with self.learn.no_bar(): self.seen += len(self.learn.get_preds(dl=self.dls.valid, inner=self.inner)[0])
    for inner, make in enumerate((lambda cbs: Learner(colored_mnist(digits), MLP(hidden=[8]), BCEWithLogitsLossFlat(), cbs=cbs),
                 lambda cbs: domain_learner(colored_mnist(digits), MLP(hidden=[8]), cbs=cbs, loss_func=BCEWithLogitsLossFlat(), every=3))):
        predicts = Predicts(bool(inner))
        fit(make([IRM(10., 2), predicts]), 4)
        assert predicts.seen == 4*599


def test_methods_name_their_settings():
    spec = Spec(methods='jigsaw+reconstruction', **{'jigsaw.weight': 2., 'reconstruction.weight': .5})
    assert [o.build().weight for o in spec.methods] == [2., .5]


def on(name): # a run that any method can do
    data = Part('colored_mnist', digits='digits', rgb=True) if name in DOMAIN else Part('mnist_mp', digits='digits')
    return Spec(data, 'convnet', name, Recipe(bs=32, epochs=1))


@pytest.mark.parametrize('name', NAMES)
def test_in_a_run(few, name):
    r = run(on(name), digits=few)
    assert r.status == 'done' and torch.isfinite(torch.tensor(r.measured[0]['train_loss']))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('name', NAMES)
def test_on_cuda(few, name):
    default_device(True)
    try: r = run(on(name), digits=few)
    finally: default_device(False)
    assert r.status == 'done' and 'cpu' not in r.device


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('name', NAMES)
def test_half_precision_on_cuda(few, name):
    default_device(True)
    try: learn = fit(learner(few, [METHODS[name](), MixedPrecision()]))
    finally: default_device(False)
    assert finite(learn) and next(learn.model.parameters()).is_cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_irm_full_batch_on_cuda(few):
    "The table's own training, a few steps of it, on the device."
    default_device(True)
    s = IRM_COLORED_MNIST.row('irm').spec
    try: r = run(Spec(s.data, s.model, s.methods, s.recipe, digits='digits', epochs=21), digits=few)
    finally: default_device(False)
    assert r.status == 'done' and len(r.curve) == 3


@pytest.mark.parametrize('name', [*(o for o in NAMES if o != 'sam'), 'all'])
def test_sam_at_radius_zero_is_plain_training(few, name):
    "To the last bit, dropout and batch norm included, with what is logged; above 0 the weights are others."
    cbs = lambda: every_method() if name == 'all' else [METHODS[name]()]
    plain, zero, some = fit(learner(few, cbs())), fit(learner(few, [*cbs(), SAM(0.)])), fit(learner(few, [SAM(.5), *cbs()]))
    assert same(plain, zero) and not same(plain, some) and finite(some) and clean(some)
    assert zero.recorder.values == plain.recorder.values
    assert all(torch.equal(p, q) for a, b in zip(side_nets(plain), side_nets(zero)) for p, q in zip(a.parameters(), b.parameters()))
    norm = [m for m in some.model.modules() if isinstance(m, nn.BatchNorm2d)][0]
    assert norm.num_batches_tracked == [m for m in plain.model.modules() if isinstance(m, nn.BatchNorm2d)][0].num_batches_tracked


def test_sam_under_autocast(few):
    "Both passes compute in bfloat16, and none after them."
    class Types(Callback):
        order, run_valid = 5, False
        def __init__(self): self.seen = []
        def after_pred(self): self.seen.append(self.learn.rcl.features.dtype)
    learn = learner(Digits(few.x_train[:16], few.y_train[:16], few.x_test[:8], few.y_test[:8]), [METHODS['rcl'](), types := Types(), SAM(), BFloat16()], no_norm(), bs=8)
    fit(learn)
    assert types.seen == [torch.bfloat16]*4 and clean(learn) and finite(learn)


class InColumns(Callback):
    "Labels of shape [N,1], as fastai's loaders of tables give them."
    order = -4
    def before_batch(self): self.learn.yb = (self.y[:, None],)


@pytest.mark.parametrize('name', NAMES)
def test_labels_in_a_column(few, name):
    "Labels [N,1] train as [N] do."
    cbs = lambda: [METHODS[name](), TakeDomain()]
    assert same(fit(learner(few, [*cbs(), InColumns()])), fit(learner(few, cbs())))


@pytest.mark.parametrize('name', DOMAIN)
def test_any_ids_of_domains(few, name):
    "Days, negative and huge numbers, in one dimension or a column: the training is that of 0 and 1."
    plain = fit(learner(few, METHODS[name]()))
    for ids in ((20230101, 20230102), (-3, 2*10**12), ([7], [9])):
        other = fit(learner(few, METHODS[name](), ids=ids))
        assert same(other, plain)
        if name == 'group_dro': assert other.group_dro.ids.tolist() == torch.tensor(ids).flatten().tolist() and torch.equal(other.group_dro.q, plain.group_dro.q)


@pytest.mark.parametrize('name', NAMES)
def test_plain_pytorch_loaders(name):
    "Batches (x, y) or (x, y, domain) of PyTorch's own loaders, in fastai's Learner and in ours."
    x, y, d = torch.rand(16, 3, 28, 28), torch.arange(16) % 10, torch.arange(16) % 2
    loaders = lambda: DataLoaders(*(TorchLoader(TensorDataset(x, y, *([d] if name in DOMAIN else [])), 8) for _ in range(2)))
    learn = fit(Learner(loaders(), no_norm(), CrossEntropyLossFlat(), metrics=accuracy, cbs=METHODS[name]()))
    assert finite(learn) and clean(learn)
    ours = domain_learner(loaders(), no_norm(), METHODS[name]())
    assert finite(fit(ours)) and len(ours.track_domains.curve) == 1


@pytest.mark.parametrize('name', DOMAIN)
def test_ids_that_plain_loaders_give(name):
    "Bool and whole floats train as the integers they are; what is no whole number of its own is refused, in training and in measuring."
    x, y, d = torch.rand(16, 3, 28, 28), torch.arange(16) % 10, torch.arange(16) % 2
    def made(d):
        set_seed(0)
        return domain_learner(DataLoaders(*(TorchLoader(TensorDataset(x, y, d), 8) for _ in range(2))), no_norm(), METHODS[name]())
    whole = fit(made(d))
    for ids in (d > 0, d.double()[:, None]):
        assert same(fit(other := made(ids)), whole) and other.track_domains.curve == whole.track_domains.curve
    for ids in (d + .5, d/torch.zeros(16), d*1j, d + torch.tensor(20230101.), torch.stack([d, d], 1)):
        for f in (fit, evaluate): assert error_of(lambda: f(made(ids))).startswith('domains')


def test_features_and_domains_in_one_term(few):
    "A term that needs both derives from both, in either order, and writes term alone."
    for bases in ((FeatureMethod, DomainMethod), (DomainMethod, FeatureMethod)):
        seen = []
        def term(self):
            seen.append((len(self.features), self.domain_index.unique().tolist(), self.domain_risks().shape))
            return self.features.square().mean()
        both = fit(learner(few, type('Both', bases, dict(term=term))(.1)))
        assert seen == [(32, [0, 1], (2,))]*4 and clean(both)


def error_of(f):
    with pytest.raises(DglitError) as e: f()
    return str(e.value)


def test_what_does_not_fit_is_said_before_training(few):
    for name in NAMES:
        learn = learner(few, [METHODS[name](), METHODS[name]()])
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        assert 'is in this Learner twice' in error_of(lambda: fit(learn))
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    few_dls = mnist_mp(few, bs=32, size=28)
    assert error_of(lambda: fit(learner(few, IRM(), ids=(3, 3)))).startswith('IRM compares domains')  # fastai puts nothing before it
    assert 'binary cross-entropy one in all' in error_of(lambda: domain_learner(few_dls, tiny(), loss_func=BCEWithLogitsLossFlat()))
    x, y = torch.rand(16, 4), torch.arange(16) % 4
    def on(y, outputs, loss=None, valid=y):
        return domain_learner(DataLoaders(*(TorchLoader(TensorDataset(x[:len(o)], o), 4) for o in (y, valid))), nn.Linear(4, outputs), loss_func=loss)
    for outputs in (1, 2, 3):
        for loss in (None, nn.CrossEntropyLoss(), BCEWithLogitsLossFlat(), nn.functional.binary_cross_entropy_with_logits, lambda z, y: z.mean(), MSELossFlat()):
            assert f'0 to 3, and this network has {outputs} outputs' in error_of(lambda: on(y, outputs, loss))
    for wrong in (y.float(), torch.eye(4)[y]): assert error_of(lambda: on(wrong, 4, valid=wrong))
    assert "loader of 'train' makes no batch" in error_of(lambda: on(y[:0], 4)) and "of 'valid' makes no" in error_of(lambda: on(y, 4, valid=y[:0]))
    for late in (dict(y=y + 1), dict(valid=torch.cat([y[:8], y[8:] + 1]))):              # where the first batch does not tell
        assert 'some targets are no classes' in error_of(lambda: fit(on(**{**dict(y=y, outputs=4, loss=lambda z, y: z.square().mean()), **late})))
    numbers = TorchLoader(TensorDataset(torch.rand(8, 4), torch.rand(8, 1)), 4)
    assert 'are no classes' in error_of(lambda: domain_learner(DataLoaders(numbers, numbers), nn.Linear(4, 1), loss_func=MSELossFlat()))
    assert 'depth 0: a mask network needs at least 1' in error_of(lambda: CIM(depth=0))
    assert 'GroupDRO has no weights yet' in error_of(lambda: GroupDRO().q)
    assert 'stands before a linear layer, not before ReLU' in error_of(lambda: learner(few, VIB(module=nn.ReLU())))


def test_rsc_with_one_output(few):
    "The score of the first of two classes is minus that of the second: the same masks as with two outputs."
    z, y = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    two = torch.cat([torch.zeros_like(z), z], 1)
    assert torch.allclose(true_class(z, y, True), true_class(two, y, True)) and torch.equal(true_class(z[:, 0], y), true_class(z, y))
    set_seed(0)
    dls = colored_mnist(few, n=64, rgb=True)
    for share in (1., 1/3): assert finite(fit(domain_learner(dls, MLP(3, 1, 28, hidden=[8]), RSC(1/3, share), loss_func=BCEWithLogitsLossFlat())))


def test_two_penalties_are_divided_once(few):
    "IRM with V-REx is one loss with two penalties, divided by the larger weight; l2 of both."
    class Gradient(Callback):
        order = 20
        def before_step(self): self.seen = [p.grad.clone() for p in self.model.parameters()]; raise CancelFitException
    learn = fit(learner(few, [IRM(30., 0, l2=.01), VREx(50., 0), Gradient()], no_norm()))
    fresh = learner(few, TakeDomain(), no_norm())
    x, y, d = next(iter(fresh.dls.train))
    fresh.model.load_state_dict(learn.model.state_dict())
    z = fresh.model(x)
    risks = torch.stack([nn.functional.cross_entropy(z[d == e], y[d == e]) for e in (0, 1)])
    loss = risks.mean() + .01*sum(p.square().sum() for p in fresh.model.parameters()) + 30*irm_penalty(z, y, d) + 50*risks.var(unbiased=False)
    for g, p in zip(torch.autograd.grad(loss/50, list(fresh.model.parameters())), learn.gradient.seen): assert torch.allclose(g, p, atol=1e-5)


@pytest.mark.parametrize('name', ['cim', 'vib'])
def test_a_model_that_has_the_network_keeps_it(few, name, tmp_path):
    "Another callback of the kind, or the same model from a file: the trained network, not a second one."
    learn = fit(learner(few, METHODS[name](), model=MLP(3, 10, 28, hidden=[32])))
    keys, seen = list(learn.model.state_dict()), learn.get_preds()[0]
    torch.save(learn.model, tmp_path/'model.pt')
    learn.model = torch.load(tmp_path/'model.pt', weights_only=False)
    assert torch.equal(learn.get_preds()[0], seen) and list(learn.model.state_dict()) == keys
    again = learner(few, METHODS[name](), model=learn.model)
    assert torch.equal(again.get_preds()[0], seen)
    assert list(fit(again).model.state_dict()) == keys and not torch.equal(again.get_preds()[0], seen)
    assert in_optimizer(again) == all_parameters(again)


def test_domains_are_not_taken_from_other_loaders(few):
    "Of two inputs, a class and a domain the third tensor is the class."
    from dglit.methods.domains import known_domains
    x = torch.zeros(4, 1)
    assert known_domains(DataLoader(TensorDataset(x, x, torch.arange(4), torch.arange(4)), n_inp=2)) is None


def test_dann_with_domains_that_it_was_not_told_of(few):
    dann = METHODS['dann']
    with pytest.raises(DglitError, match=r'tells domains \[0, 1\] apart, the training data have \[0, 2\]'): fit(learner(few, dann(domains=(0, 1)), ids=(0, 2)))
    learn = fit(learner(few, dann()))
    learn.dls = learner(few, dann(), ids=(5, 6)).dls
    with pytest.raises(DglitError, match=r'have \[5, 6\]'): fit(learn)


def test_pair_gives_the_optimizer_back(few):
    learn = fit(learner(few, METHODS['pair'](sgd_lr=.01, anneal_steps=2), opt_func=OPTIMIZERS['torch']))
    assert isinstance(learn.opt.opt, torch.optim.AdamW)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    assert isinstance(learn.opt.opt, torch.optim.AdamW)


def test_a_loss_that_is_no_number_is_not_another_loss(few):
    "Head methods check the loss function at the first step, PAIR weighs its parts: neither takes a NaN for a mistake of the user's."
    for name in ('fishr', 'pair'):
        learn = learner(few, METHODS[name]())
        with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
        fit(learn)


def test_the_curve_outlives_lr_find(few):
    set_seed(0)
    learn = domain_learner(mnist_mp(few, bs=32, size=28), tiny(), [], 'last')
    fit(learn, 2)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    assert len(learn.track_domains.curve) == 2
    assert len(fit(learn).track_domains.curve) == 1


def test_a_mean_of_weights_survives_validation(few):
    from dglit.learner.averaging import WeightAverage
    class Looks(Callback):
        inside = False
        def after_epoch(self): # of which validation is one
            if self.inside: return
            self.inside = True
            self.learn.validate()
            self.inside = False
            counts.append(int(self.weight_average.mean.n_averaged))
    counts = []
    learn = learner(few, [WeightAverage(), Looks()])
    fit(learn, 2)
    assert counts[1] == 2*counts[0]


def test_helpers_see_all_of_the_data(few):
    "Where training leaves the last short batch out."
    from dglit.learner.groups import repeat_wrong
    whole = mnist_mp(few, bs=50, size=28)
    dls = DomainLoaders.from_tensors(whole.train.dataset.tensors, whole.valid.dataset.tensors, {}, bs=50, vocab=whole.vocab, drop_last=True)
    assert len(repeat_wrong(dls, tiny().to(dls.device), 1).train.dataset) == 128


def test_a_target_too_many_is_said(few):
    learn = learner(few, METHODS['rcl']())
    halves = lambda dl: (*dl.dataset.tensors, dl.dataset.tensors[1])
    learn.dls = DomainLoaders.from_tensors(halves(learn.dls.train), halves(learn.dls.valid), {}, bs=32)
    learn.loss_func = lambda z, y, d: nn.functional.cross_entropy(z, y)
    with pytest.raises(DglitError, match='needs one target'): fit(learn)
