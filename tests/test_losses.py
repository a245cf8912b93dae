"Types, devices, transforms and properties that the notebooks of the losses leave out."
from math import inf

import pytest
import pytorch_msssim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dglit.core import DglitError
from dglit.losses.bottleneck import gaussian_kl
from dglit.losses.decov import decov
from dglit.losses.irm import SLOPES, domain_means, irm_penalty, scale_slopes
from dglit.losses.ms_ssim import ms_ssim
from dglit.losses.orthogonality import double_soft_orthogonality
from dglit.losses.rcl import l1_distances, rescale, reverse_contrastive_loss
from dglit.losses.triplets import draw_triplets, inner_product, sample_triplets, scl_loss, triplet_similarity

MARGINS = [0.2, 0.4, 0.6, 0.8, 0.9, 1., inf]


def loop(f, y, m):
    "Algorithm 1 on rescaled features."
    total = f.sum()*0
    for i in range(len(f)):
        d = (f[i] - f).abs().sum(1)
        mates = [j for j in range(len(f)) if y[j] == y[i] and j != i]
        if not mates: continue
        p = min(mates, key=lambda j: d[j].item())
        d_n = min((d[j].item() for j in range(len(f)) if y[j] != y[i]), default=inf)
        if m == inf or d[p].item() < m*d_n: total = total - (f[i] - f[p].detach()).abs().sum()
    return total/len(f)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(1, 5), st.sampled_from(MARGINS), st.integers(0, 2**31))
def test_equals_the_loop(n, d, classes, m, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast, slow = reverse_contrastive_loss(a, y, m), loop(rescale(b), y, m)
    assert torch.allclose(fast, slow, atol=1e-12)
    fast.backward(); slow.backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 24), st.sampled_from(MARGINS), st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-10, 10))
def test_scale_and_shift_of_features_do_not_matter(n, m, seed, scale, shift):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)
    assert torch.allclose(reverse_contrastive_loss(x, y, m), reverse_contrastive_loss(x*scale + shift, y, m), atol=1e-9)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('m', MARGINS)
@pytest.mark.parametrize('y', [torch.zeros(8), torch.arange(8), torch.arange(8) // 2], ids=['one class', 'no mates', 'pairs'])
def test_types_and_degenerate_batches(dtype, m, y):
    x = torch.randn(8, 2, 3, 3).to(dtype).requires_grad_()
    loss = reverse_contrastive_loss(x, y.long(), m)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.isfinite() and loss <= 0
    loss.backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize('per', ['feature', 'channel', 'batch'])
def test_autocast(per):
    conv = torch.nn.Conv2d(3, 8, 3)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    with torch.autocast('cpu', torch.bfloat16):
        f = conv(x)
        loss = reverse_contrastive_loss(f, y, .9, per)
    assert f.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, reverse_contrastive_loss(f.float(), y, .9, per))
    loss.backward()
    assert conv.weight.grad.isfinite().all()


def test_vmap_and_grad():
    f, y = torch.randn(3, 12, 5), torch.randint(0, 3, (3, 12))
    many = torch.func.vmap(lambda a, b: reverse_contrastive_loss(a, b, .9))(f, y)
    assert torch.allclose(many, torch.stack([reverse_contrastive_loss(a, b, .9) for a, b in zip(f, y)]))
    assert torch.func.vmap(torch.func.grad(reverse_contrastive_loss))(f, y).isfinite().all()


def test_traces_without_a_break():
    f, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
    compiled = torch.compile(reverse_contrastive_loss, fullgraph=True, backend='eager')
    assert torch.equal(compiled(f, y, .9), reverse_contrastive_loss(f, y, .9))


def test_distances_carry_no_gradient(): assert not l1_distances(torch.randn(4, 3, requires_grad=True)).requires_grad


def test_unknown_reading():
    with pytest.raises(DglitError, match="unknown per 'features': did you mean 'feature'"): rescale(torch.randn(2, 3), 'features')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('m', MARGINS)
def test_cuda_agrees(m):
    f, y = torch.randn(64, 8, 5, 5), torch.randint(10, (64,))
    assert torch.allclose(reverse_contrastive_loss(f.cuda(), y.cuda(), m).cpu(), reverse_contrastive_loss(f, y, m), rtol=1e-4)


# The penalties of the rivals

def covariance_loop(h):
    c = [[((h[:, i] - h[:, i].mean())*(h[:, j] - h[:, j].mean())).mean() for j in range(h.shape[1])] for i in range(h.shape[1])]
    return sum(c[i][j]**2 for i in range(len(c)) for j in range(len(c)) if i != j)/2 + h.sum()*0


def orthogonality_by_eigenvalues(w):
    s = torch.linalg.svdvals(w.flatten(1))**2
    return 2*((s - 1)**2).sum() + abs(w.shape[0] - w[0].numel())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**31))
def test_decov_equals_the_loop(n, c, seed):
    h = torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(decov(h), covariance_loop(h), atol=1e-12)
    assert torch.allclose(decov(h + 7), decov(h), atol=1e-10)                   # a shift changes nothing


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
def test_orthogonality_equals_its_eigenvalues(k, d, seed):
    w = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(double_soft_orthogonality(w), orthogonality_by_eigenvalues(w), atol=1e-9)
    assert double_soft_orthogonality(w) >= abs(k - d) - 1e-9


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('loss', [decov, double_soft_orthogonality])
def test_penalties_in_every_type(loss, dtype):
    for shape in ((6, 4, 3, 3), (1, 4), (6, 1)):
        x = (torch.randn(shape)/4).to(dtype).requires_grad_()
        value = loss(x)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.isfinite()
        value.backward()
        assert x.grad.dtype == dtype and x.grad.isfinite().all()


@pytest.mark.parametrize('loss', [decov, double_soft_orthogonality])
def test_penalties_transform(loss):
    x = torch.randn(3, 6, 4)
    many = torch.func.vmap(loss)(x)
    assert torch.allclose(many, torch.stack([loss(o) for o in x]))
    assert torch.allclose(torch.compile(loss, fullgraph=True, backend='eager')(x[0]), many[0])
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(loss(x[0]), loss(x[0].clone())) and loss(x[0]).dtype == torch.float32
    assert torch.allclose(loss(x[0]), many[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('loss', [decov, double_soft_orthogonality])
def test_penalties_on_cuda(loss):
    x = torch.randn(64, 8, 5, 5)
    assert torch.allclose(loss(x.cuda()).cpu(), loss(x), rtol=1e-4)


PLAIN = dict(cross_entropy=torch.nn.functional.cross_entropy, binary_cross_entropy=torch.nn.functional.binary_cross_entropy_with_logits, squared_error=torch.nn.functional.mse_loss)


def an_irm_batch(loss, n, domains, seed, dtype=torch.float64):
    "Inputs of a small network, targets and domains."
    g = torch.Generator().manual_seed(seed)
    x, d = torch.randn(n, 4, generator=g, dtype=dtype), torch.randint(domains, (n,), generator=g)
    y = torch.randint(3, (n,), generator=g) if loss == 'cross_entropy' else (torch.rand(n, 1, generator=g) > .5).to(dtype)
    weights = torch.randn(4, 3 if loss == 'cross_entropy' else 1, generator=g, dtype=dtype, requires_grad=True)
    return x, weights, y, d


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SLOPES)), st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**31))
def test_irm_penalty_is_the_double_backward(loss, n, domains, seed):
    "Value and gradients of the parameters, in float64."
    x, w, y, d = an_irm_batch(loss, n, domains, seed)
    penalties = []
    for e in d.unique():
        scale = torch.tensor(1., dtype=torch.float64, requires_grad=True)
        slope, = torch.autograd.grad(PLAIN[loss](scale*((x @ w).tanh()*3)[d == e], y[d == e]), scale, create_graph=True)
        penalties.append(slope**2)
    slow, each = torch.stack(penalties).mean(), lambda z, y: PLAIN[loss](z, y, reduction='none').flatten(1).sum(1) if y.ndim > 1 else PLAIN[loss](z, y, reduction='none')
    for fast in (irm_penalty((x @ w).tanh()*3, y, d, loss), irm_penalty((x @ w).tanh()*3, y, d, each)):
        assert abs(fast - slow) < 1e-10
        assert torch.allclose(*(torch.autograd.grad(o, w, retain_graph=True)[0] for o in (fast, slow)), rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(SLOPES)), st.integers(2, 12), st.integers(0, 2**31))
def test_the_unbiased_penalty_is_the_mean_over_pairs(loss, n, seed):
    x, w, y, _ = an_irm_batch(loss, n, 1, seed)
    t = scale_slopes(x @ w, y, loss)
    pairs = sum(t[i]*t[j] for i in range(n) for j in range(n) if i != j)/(n*(n-1))
    assert torch.allclose(irm_penalty(x @ w, y, loss=loss, unbiased=True), pairs, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('loss', SLOPES)
@pytest.mark.parametrize('unbiased', [False, True])
@pytest.mark.parametrize('d', [torch.zeros(8), torch.arange(8), torch.arange(8) // 4 * 5], ids=['one domain', 'each its own', 'a gap'])
def test_irm_types_and_degenerate_batches(dtype, loss, unbiased, d):
    x, w, y, _ = an_irm_batch(loss, 8, 1, 0)
    z = (x @ w).detach().to(dtype).requires_grad_()
    penalty = irm_penalty(z, y, d.long(), loss, unbiased)
    assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and penalty.isfinite()
    penalty.backward()
    assert z.grad.dtype == dtype and z.grad.isfinite().all()
    assert irm_penalty(z.detach()*1e4 if dtype != torch.float16 else z.detach(), y, d.long(), loss).isfinite()


def test_irm_under_autocast_vmap_and_grad():
    layer = torch.nn.Linear(4, 3)
    x, y, d = torch.randn(12, 4), torch.randint(3, (12,)), torch.arange(12) % 2
    with torch.autocast('cpu', torch.bfloat16): penalty = irm_penalty(layer(x), y, d)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert layer.weight.grad.isfinite().all()
    z = torch.randn(5, 12, 3)
    f = lambda z: irm_penalty(z, y, d, n_domains=2)
    assert torch.allclose(torch.func.vmap(f)(z), torch.stack([f(o) for o in z]))
    assert torch.func.vmap(torch.func.grad(f))(z).isfinite().all()


def test_domain_means():
    v, d = torch.randn(50, dtype=torch.float64), torch.randint(4, (50,))
    means, counts = domain_means(v, d, 6)
    assert torch.equal(counts, d.bincount(minlength=6).double()) and (means[4:] == 0).all()
    assert torch.allclose(means[:4], torch.stack([v[d == e].mean() for e in range(4)]))


# Images that look alike, and triplets

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(161, 200), st.integers(161, 200), st.floats(0, 1), st.integers(0, 2**31))
def test_ms_ssim_is_pytorch_msssims(channels, h, w, noise, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, channels, h, w, generator=g)
    y = (x + noise*torch.randn(x.shape, generator=g)).clamp(0, 1)
    assert torch.allclose(ms_ssim(x, y, 11, 5), pytorch_msssim.ms_ssim(x, y, data_range=1., size_average=False), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 5, 7, 11]), st.integers(1, 5))
def test_ms_ssim_fits_or_says_what_does(h, w, win, levels):
    "On any size it runs, or names a number of levels, or a window, with which it does."
    x = torch.rand(1, 1, h, w)
    try: v = ms_ssim(x, 1-x, win, levels)
    except DglitError as e:
        name, _, n = str(e).partition('too small')[2].partition('can be at most ')
        fits = dict(win_size=win, levels=int(n)) if name.endswith('levels ') else dict(win_size=int(n), levels=1)
        assert ms_ssim(x, 1-x, **fits).isfinite()
        with pytest.raises(DglitError): ms_ssim(x, 1-x, **(dict(fits, levels=fits['levels']+1) if name.endswith('levels ') else dict(fits, win_size=fits['win_size']+2)))
    else: assert v.shape == (1,) and 0 <= v <= 1


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('floor', [0., 1e-6])
@pytest.mark.parametrize('y', [torch.zeros, torch.ones, torch.rand], ids=['black', 'white', 'noise'])
def test_ms_ssim_in_every_type(dtype, floor, y):
    x, y = torch.zeros(4, 3, 28, 28).to(dtype).requires_grad_(), y(4, 3, 28, 28).to(dtype)
    v = ms_ssim(x, y, floor=floor)
    assert v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and v.isfinite().all()
    v.sum().backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_ms_ssim_under_vmap_and_autocast():
    x, y = torch.rand(2, 5, 3, 28, 28)
    assert torch.allclose(torch.func.vmap(ms_ssim)(x, y), ms_ssim(x, y), atol=1e-6)
    assert torch.func.vmap(torch.func.grad(ms_ssim))(x, y).isfinite().all()
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(ms_ssim(x, y), ms_ssim(x, y))
    compiled = torch.compile(ms_ssim, fullgraph=True, backend='eager')
    assert torch.allclose(compiled(x, y), ms_ssim(x, y), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 2**31))
def test_triplets(labels, seed):
    y, g = torch.tensor(labels), torch.Generator().manual_seed(seed)
    positive, negative, there = sample_triplets(y, g)
    count = y.bincount()[y]
    assert torch.equal(there, (count > 1) & (count < len(y))) and torch.equal(y[positive], y)
    assert torch.equal(positive.sort().values, torch.arange(len(y)))                     # each is somebody's positive, once,
    assert (positive != torch.arange(len(y)))[count > 1].all()                           # and nobody's own
    assert (y[negative] != y)[there].all()
    for c in y.unique():
        used = negative[(y == c) & there].bincount(minlength=len(y))[y != c]
        assert not len(used) or used.max() - used.min() <= 1                             # negatives take turns
    positive, negative, both = draw_triplets(y, y.flip(0), g)
    assert both.all() if len(y.unique()) > 1 else not both.any()
    assert torch.equal(y.flip(0)[positive], y) and (y.flip(0)[negative] != y)[both].all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_contrasts_in_every_type_and_without_triplets(dtype):
    x, e = torch.rand(6, 3, 28, 28).to(dtype).requires_grad_(), torch.randn(6, 8).to(dtype).requires_grad_()
    for there in (torch.ones(6).bool(), torch.zeros(6).bool()):
        for value, of in ((sum(triplet_similarity(x, x.flip(0), x.flip(2), there)), x), (sum(triplet_similarity(x, x.flip(0), x, there, inner_product)), x), (scl_loss(e, e.flip(0), e*0, there), e)):
            of.grad = None
            value.backward()
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.isfinite() and of.grad.isfinite().all()
            assert there.any() or value == 0
    mean = torch.randn(4, 3).to(dtype).requires_grad_()
    gaussian_kl(mean, mean.exp()).backward()
    assert mean.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_ms_ssim_and_triplets_on_cuda():
    x, y = torch.rand(2, 64, 3, 28, 28)
    assert torch.allclose(ms_ssim(x.cuda(), y.cuda()).cpu(), ms_ssim(x, y), atol=1e-5)
    labels = torch.arange(64) % 5
    for a, b in zip(sample_triplets(labels, torch.Generator().manual_seed(0)), sample_triplets(labels.cuda(), torch.Generator().manual_seed(0))): assert torch.equal(a, b.cpu())
