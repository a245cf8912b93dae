"Losses, data and methods of the family: types, domains by any number, transforms, other people's Learners."
from functools import partial

import pytest
import torch
from fastai.callback.progress import ProgressCallback  # noqa: F401 learn.no_bar()
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dglit.core import DglitError, set_seed
from dglit.data.colored_mnist import colored_mnist
from dglit.data.loaders import DomainLoaders
from dglit.data.mnist import load_digits
from dglit.learner import domain_learner
from dglit.losses.birm import birm_penalty
from dglit.losses.feature_statistics import coral_penalty, feature_variance, mmd_penalty
from dglit.losses.head_gradients import fishr_penalty, hessian_penalty, iga_penalty
from dglit.losses.irm import irm_penalty
from dglit.methods.alignment import CORAL, DANN, MMD
from dglit.methods.bottleneck import BIRM, IBERM
from dglit.methods.edges import EdgeLoss
from dglit.methods.head_gradients import IGA, Fishr, HessianAlignment
from dglit.methods.irm import IRM, VREx
from dglit.methods.mixstyle import MixStyle
from dglit.methods.mixup import DomainMixup
from dglit.methods.pair import PAIR
from dglit.models.mlp import MLP

HEAD = dict(fishr=fishr_penalty, uncentered=partial(fishr_penalty, centered=False), iga=iga_penalty, hgp=hessian_penalty,
            diagonal=partial(hessian_penalty, curvature='diagonal'))
FEATURE = dict(variance=feature_variance, coral=coral_penalty, mmd=mmd_penalty)
METHODS = dict(fishr=Fishr, hgp=HessianAlignment, diagonal=partial(HessianAlignment, curvature='diagonal'), iga=IGA,
               hutchinson=partial(HessianAlignment, curvature='diagonal', probes=2), ib=IBERM, birm=BIRM, pair=PAIR,
               coral=CORAL, mmd=MMD, dann=DANN, edges=EdgeLoss, mixup=DomainMixup)
COMPARE = [k for k in METHODS if k not in ('ib','edges')]
adam = partial(OptimWrapper, opt=torch.optim.Adam)


def per_environment(penalty, z, y, f, d):
    "The penalty from whole gradients and Hessians by autograd, environment by environment."
    K = z.shape[1]
    w = torch.linalg.lstsq(torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype)], 1), z).solution.T
    ft = torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype)], 1)
    def each(w, i):
        o = w.view(K, -1) @ ft[i]
        return nn.functional.cross_entropy(o[None], y[i:i+1]) if K > 1 else nn.functional.binary_cross_entropy_with_logits(o, y[i:i+1].to(o))
    ids = d.unique().tolist()
    risk = lambda e: lambda w: torch.stack([each(w, i) for i in (d == e).nonzero()[:,0].tolist()]).mean()
    flat = w.flatten()
    g = torch.stack([torch.func.grad(risk(e))(flat) for e in ids])
    apart = lambda v, c: (v - c).square().sum(1).mean()
    if penalty == 'iga': return apart(g, g.mean(0))
    if penalty in ('fishr','uncentered'):
        per = {e: torch.stack([torch.func.grad(partial(each, i=i))(flat) for i in (d == e).nonzero()[:,0].tolist()]) for e in ids}
        v = torch.stack([p.var(0, unbiased=False) if penalty == 'fishr' else p.square().mean(0) for p in per.values()])
        return apart(v, v.mean(0))
    H = torch.stack([torch.func.hessian(risk(e))(flat) for e in ids])
    if penalty == 'diagonal': a,c = H.diagonal(dim1=1, dim2=2), H.mean(0).diagonal()
    else: a,c = torch.einsum('eij,ej->ei', H, g), H.mean(0) @ g.mean(0)
    return apart(a, c) + apart(g, g.mean(0))


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 14), st.integers(1, 4), st.sampled_from([1, 3]), st.integers(2, 4), st.integers(0, 2**31), st.sampled_from(list(HEAD)))
def test_closed_forms_equal_autograd(n, D, K, E, seed, name):
    g = torch.Generator().manual_seed(seed)
    f,w = torch.randn(n, D, generator=g, dtype=torch.float64), torch.randn(D+1, K, generator=g, dtype=torch.float64)
    z = torch.cat([f, torch.ones(n, 1, dtype=f.dtype)], 1) @ w
    y,d = torch.randint(max(K, 2), (n,), generator=g), torch.randint(E, (n,), generator=g)
    assert torch.allclose(HEAD[name](z, y, f, d, E), per_environment(name, z, y, f, d), atol=1e-10)


@pytest.mark.parametrize('name', [*HEAD, *FEATURE])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('domains', [torch.arange(12) % 3, torch.zeros(12), torch.arange(12)], ids=['three', 'one', 'each'])
def test_types_and_degenerate_batches(name, dtype, domains):
    f,z,y = torch.randn(12, 4).to(dtype).requires_grad_(), torch.randn(12, 3).to(dtype).requires_grad_(), torch.arange(12) % 3
    loss = HEAD[name](z, y, f, domains.long(), 12) if name in HEAD else FEATURE[name](f, domains.long(), 12)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.isfinite() and loss >= 0
    loss.backward()
    assert f.grad.dtype == dtype and f.grad.isfinite().all()


def test_vmap_and_autocast():
    f,z,y,d = torch.randn(5, 12, 4), torch.randn(5, 12, 3), torch.arange(12) % 3, torch.arange(12) % 2
    for penalty in HEAD.values():
        each = torch.func.vmap(lambda z, f: penalty(z, y, f, d, 2))(z, f)
        assert torch.allclose(each, torch.stack([penalty(a, y, b, d, 2) for a,b in zip(z, f)]), atol=1e-6)
        with torch.autocast('cpu', torch.bfloat16): inside = penalty(z[0], y, f[0], d, 2)
        assert torch.allclose(inside, penalty(z[0], y, f[0], d, 2), atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16): inside = birm_penalty(z[0], y, d, 2), coral_penalty(f[0], d, 2)
    assert torch.allclose(torch.stack(inside), torch.stack([birm_penalty(z[0], y, d, 2), coral_penalty(f[0], d, 2)]), atol=1e-6)


def test_birm_without_spread_is_irm():
    z,y,d = torch.randn(30, 4).double(), torch.randint(4, (30,)), torch.arange(30) % 3
    assert torch.allclose(birm_penalty(z, y, d, 3, 0.), irm_penalty(z, y, d, n_domains=3), atol=1e-12)


def loaders(c_out=1, ids=(0, 1), column=False, n=48):
    "Coloured digits, with domains by any number and labels in either shape."
    x,y,d = colored_mnist(load_digits(), n=n, device='cpu').train.dataset.tensors
    data = x, (y[:,None] if column else y), torch.tensor(ids)[d]
    return DomainLoaders.from_tensors(data, data, {}, bs=None, device='cpu', low=0., vocab=['a','b'])


def train(methods, dls=None, c_out=1, steps=3, model=None, **kwargs):
    set_seed(0)
    loss = BCEWithLogitsLossFlat() if c_out == 1 else CrossEntropyLossFlat()
    learn = domain_learner(dls or loaders(), model or MLP(c_out=c_out, hidden=[8]), methods, 'last', loss, every=steps,
                           opt_func=adam, lr=1e-2, wd=0., **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(steps)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def begun(name, weight=1.):
    "A method that acts from the first step."
    return METHODS[name](weight, anneal_steps=0) if name not in ('coral','mmd','dann','edges','mixup') else METHODS[name](weight)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('c_out', [1, 2])
def test_any_domain_ids_and_label_shapes(name, c_out):
    plain = train((), c_out=c_out)
    usual = train(begun(name), c_out=c_out)
    assert not torch.equal(usual, plain)
    assert torch.equal(train(begun(name, 0.), c_out=c_out), plain)
    assert torch.equal(train(begun(name), loaders(ids=(20230101, 2_000_000_000_000)), c_out), usual)
    assert torch.allclose(train(begun(name), loaders(column=True), c_out), usual, atol=1e-6)


@pytest.mark.parametrize('name', COMPARE)
def test_one_domain_is_refused(name):
    with pytest.raises(DglitError, match='mix them'): train(begun(name), loaders(ids=(5, 5)))


def test_they_compose():
    every = lambda: [Fishr(1.), IGA(1.), HessianAlignment(1.), IBERM(.1), BIRM(1.), CORAL(.1), MMD(.1), DANN(), EdgeLoss(), DomainMixup(), IRM(1.), VREx(1.)]
    a,b = train(every()), train(every()[::-1])
    assert a.isfinite().all() and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize('name', COMPARE)
def test_bfloat16(name):
    from dglit.learner import BFloat16
    assert train(begun(name), steps=1, cbs=BFloat16()).isfinite().all()


def test_vision_learner_with_a_linear_last_layer():
    from fastai.vision.all import vision_learner, resnet18
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    data = x, torch.arange(8) % 2, torch.arange(8)//4
    dls = DomainLoaders.from_tensors(data, data, {}, bs=8, device='cpu', vocab=['a','b'])
    for methods in ([Fishr(1., 0)], [HessianAlignment(1., 0), CORAL(.1)], [IBERM(.1), BIRM(1., 0)], [DANN()], [PAIR(anneal_steps=0)]):
        learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, n_out=2, cbs=methods, loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert all(p.isfinite().all() for p in learn.model.parameters())


def test_head_methods_refuse_what_their_formulas_are_not_for():
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.Conv2d(4, 1, 12), nn.Flatten()))
    with pytest.raises(DglitError, match='linear'): train(Fishr(), model=conv)
    with pytest.raises(DglitError, match='earlier layer'): train(MixStyle(1.))
