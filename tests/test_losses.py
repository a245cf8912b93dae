"Types, devices, transforms and properties that the notebooks of the losses leave out."
from functools import partial
from math import inf

import pytest
import pytorch_msssim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dglit.core import DglitError
from dglit.losses.bottleneck import gaussian_kl
from dglit.losses.decov import decov
from dglit.losses.domains import domain_index, domain_means, mean_over_domains, variance_over_domains
from dglit.losses.irm import SLOPES, irm_penalty, scale_slopes
from dglit.losses.ms_ssim import ms_ssim
from dglit.losses.orthogonality import double_soft_orthogonality
from dglit.losses.rcl import l1_distances, rescale, reverse_contrastive_loss
from dglit.losses.triplets import cim_loss, draw_triplets, inner_product, sample_triplets, scl_loss, triplet_similarity

# What holds for every loss: a case is a function of features [N,6], labels [N] (0 to 2) and domains [N]

def each_loss(z, y): return cross_entropy(z, y.reshape(-1), reduction='none')
def image(x): return (x[:, None, :, None]*x[:, None, None, :]).sigmoid()
def triplets(x): return image(x), image(x.flip(1)), image(1 - x)
WINDOW = dict(win_size=3, levels=2, floor=.01)

CASES = dict(
    rcl=lambda x, y, d: reverse_contrastive_loss(x, y, .9),
    rcl_without_limit=lambda x, y, d: reverse_contrastive_loss(x, y),
    decov=lambda x, y, d: decov(x),
    orthogonality=lambda x, y, d: double_soft_orthogonality(x),
    gaussian_kl=lambda x, y, d: gaussian_kl(x, x.exp()),
    irm=lambda x, y, d: irm_penalty(x, y, d),
    irm_unbiased=lambda x, y, d: irm_penalty(x, y, d, unbiased=True),
    irm_of_a_function=lambda x, y, d: irm_penalty(x, y, d, each_loss),
    irm_binary=lambda x, y, d: irm_penalty(x[:, 0], y > 0, d, 'binary_cross_entropy'),
    irm_squared=lambda x, y, d: irm_penalty(x[:, :1], y, d, 'squared_error'),
    risk=lambda x, y, d: mean_over_domains(*domain_means(each_loss(x, y), d)),
    variance=lambda x, y, d: variance_over_domains(*domain_means(each_loss(x, y), d)),
    ms_ssim=lambda x, y, d: ms_ssim(*triplets(x)[:2], **WINDOW).mean(),
    cim=lambda x, y, d: cim_loss(*triplet_similarity(*triplets(x), y > 0, partial(ms_ssim, **WINDOW))),
    cim_gram=lambda x, y, d: cim_loss(*triplet_similarity(*triplets(x), y > 0, inner_product)),
    scl=lambda x, y, d: scl_loss(x, x.flip(1), 1 - x, y > 0))
LABELLED = [k for k in CASES if k.startswith(('rcl', 'irm', 'cim', 'scl'))]
OF_DOMAINS = [k for k in CASES if k.startswith(('irm', 'risk', 'variance'))]
every_loss = pytest.mark.parametrize('name', CASES)


def a_batch(n=12, *stack, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*stack, n, 6, generator=g, dtype=dtype), *(torch.randint(3, (*stack, n), generator=g) for _ in 'yd')


@every_loss
def test_many_batches_side_by_side(name):
    f, many = CASES[name], a_batch(12, 4)
    assert torch.allclose(torch.func.vmap(f)(*many), torch.stack([f(*o) for o in zip(*many)]))
    slow = [torch.autograd.grad(f(x.requires_grad_(), y, d), x)[0] for x, y, d in zip(*many)]
    assert torch.allclose(torch.func.vmap(torch.func.grad(f))(*many), torch.stack(slow))


@every_loss
def test_compiles_without_a_break(name):
    f, batch = CASES[name], a_batch()
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(f, fullgraph=True, backend='eager')(*batch), f(*batch))


class Waits(TorchDispatchMode):
    "Refuses what a card must wait for: a number brought to the program, a shape that the data decide."
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.removeprefix('aten::')
        masked = name == 'index' and any(o is not None and o.dtype == torch.bool for o in args[1])
        assert not masked and name not in ('_local_scalar_dense', 'nonzero', 'equal', 'masked_select', '_unique2'), name
        return f(*args, **(kwargs or {}))


@every_loss
def test_waits_for_nothing(name):
    x, y, d = a_batch()
    CASES[name](x, y, d) # constants that are made once
    with Waits(): torch.autograd.grad(CASES[name](x.requires_grad_(), y, d), x)


@every_loss
def test_order_of_the_batch(name):
    batch, p = a_batch(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(CASES[name](*(o[p] for o in batch)), CASES[name](*batch))


@pytest.mark.parametrize('name', [k for k in CASES if not k.startswith('rcl')]) # whose positives are held: see its page
def test_gradient_is_that_of_calculus(name):
    x, y, d = a_batch()
    assert torch.autograd.gradcheck(lambda x: CASES[name](x, y, d), x.requires_grad_())


@every_loss
@pytest.mark.parametrize('n', [1, 8])
@pytest.mark.parametrize('zero', [False, True])
def test_degenerate_batch(name, n, zero):
    "One class, one domain; perhaps one example, perhaps no difference between them."
    x = (a_batch(n)[0]*(0 if zero else 1)).requires_grad_()
    value = CASES[name](x, torch.zeros(n).long(), torch.zeros(n).long())
    gradient, = torch.autograd.grad(value, x)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize('name', dict.fromkeys([*LABELLED, *OF_DOMAINS]))
def test_labels_and_domains_in_a_column(name):
    x, y, d = a_batch()
    assert torch.equal(CASES[name](x, y[:, None], d[:, None]), CASES[name](x, y, d))


@pytest.mark.parametrize('name', LABELLED)
@pytest.mark.parametrize('wrong', [lambda y: y[:1], lambda y: y[:, None].expand(-1, 3), lambda y: torch.cat([y, y])], ids=['one', 'a table', 'twice'])
def test_labels_that_do_not_fit(name, wrong):
    x, y, d = a_batch()
    if name != 'irm_of_a_function' or len(wrong(y)) != len(y): # what a function takes is its own
        with pytest.raises(DglitError): CASES[name](x, wrong(y), d)


@pytest.mark.parametrize('name', ['rcl', 'rcl_without_limit', 'irm', 'irm_unbiased'])
def test_labels_that_are_no_classes(name):
    x, y, d = a_batch()
    for wrong in (y + .5, y/0., y*1j) + ((y - 1, y + 6) if name.startswith('irm') else ()):
        with pytest.raises(DglitError, match='labels'): CASES[name](x, wrong, d)


def test_images_that_are_no_images():
    x = torch.rand(2, 1, 28, 28)
    for wrong in ((255*x).byte(), x[..., :20], x.expand(-1, 3, -1, -1)):
        with pytest.raises(DglitError, match='needed two alike'): ms_ssim(x, wrong)


@pytest.mark.parametrize('name', OF_DOMAINS)
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-2**62, 2**62), min_size=3, max_size=3, unique=True), st.integers(0, 99))
def test_a_domain_is_only_a_name(name, ids, seed):
    x, y, d = a_batch(seed=seed)
    for names in (torch.tensor(ids), torch.tensor([20230101, 20230102, 20230103]), torch.tensor([2_000_000_000_001, 0, -1])):
        assert torch.allclose(CASES[name](x, y, names[d]), CASES[name](x, y, d), atol=1e-12)
    assert torch.allclose(CASES[name](x, y, d.double()), CASES[name](x, y, d.byte()))
    assert torch.allclose(CASES[name](x, y, d > 0), CASES[name](x, y, (d > 0).long()))
    for wrong in (d[:1], d + .5, d/torch.zeros(12), torch.tensor(20230101.)*(d + 1)):
        with pytest.raises(DglitError, match='domains'): CASES[name](x, y, wrong)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-5, 0, 1, 7, 20230101, 20230102, 2*10**12]), min_size=1, max_size=30), st.integers(1, 3))
def test_domain_means_are_the_loops(days, k):
    d, v = torch.tensor(days), torch.randn(len(days), k, dtype=torch.float64)
    means, counts = domain_means(v, d)
    index, ids = domain_index(d[:, None])
    assert ids.tolist() == sorted(set(days)) and torch.equal(ids[index], d) and len(counts) == len(days)
    assert counts[:len(ids)].tolist() == [days.count(i) for i in ids.tolist()] and not counts[len(ids):].any()
    assert torch.allclose(means[:len(ids)], torch.stack([v[d == i].mean(0) for i in ids])) and not means[len(ids):].any()
    for a, b in zip(domain_means(v, index, len(ids)), (means, counts)): assert torch.allclose(a, b[:len(ids)])
    assert torch.allclose(variance_over_domains(means[:, 0], counts), means[:len(ids), 0].var(unbiased=False))


def test_domain_means_count_in_float32():
    v = torch.ones(3000, dtype=torch.bfloat16)
    means, counts = domain_means(v, torch.zeros(3000, dtype=torch.int32), 2)
    assert counts.tolist() == [3000, 0] and means.tolist() == [1, 0] and means.dtype == torch.float32
    with pytest.raises(DglitError, match='domains outside 0 to 1'): domain_means(v, torch.full((3000,), 20230101), 2)


class Without(TorchDispatchMode):
    "A device that lacks an operator."
    def __init__(self, name): super().__init__(); self.name = name
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if self.name in f._schema.name: raise NotImplementedError(self.name)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize('m', [.9, inf])
def test_rcl_where_pdist_is_missing(m):
    x, y, _ = a_batch(32)
    with Without('_pdist_forward'): lacking = reverse_contrastive_loss(x, y, m)
    assert torch.allclose(lacking, reverse_contrastive_loss(x, y, m)) and lacking < 0


def test_windows_made_in_evaluation_serve_in_training():
    from dglit.losses.ms_ssim import _kept
    _kept.cache_clear()
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    with torch.inference_mode(): ms_ssim(x, x)
    ms_ssim(x, 1 - x).sum().backward()
    assert _kept.cache_info().misses == 3 and x.grad.isfinite().all()


# The reverse contrastive loss

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


def test_irm_under_autocast():
    layer = torch.nn.Linear(4, 3)
    x, y, d = torch.randn(12, 4), torch.randint(3, (12,)), torch.arange(12) % 2
    with torch.autocast('cpu', torch.bfloat16): penalty = irm_penalty(layer(x), y, d)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert layer.weight.grad.isfinite().all()


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
