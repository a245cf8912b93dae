"Files that are missing, cut or wrong; loaders inside fastai."
import gzip, struct

import numpy as np
import pytest
import torch
import torchvision
import fastai.callback.schedule  # lr_find
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn

from dglit.core import DataError, DglitError, generator
from dglit.data import mnist
from dglit.data.colored_mnist import color_environment, colored_mnist
from dglit.data.loaders import DomainLoaders
from dglit.data.mnist import load_mnist
from dglit.data.mnist_mp import mnist_mp
from dglit.learner import domain_learner, evaluate
from dglit.methods.core import TakeDomain
from dglit.models.mlp import MLP


def idx(a): return bytes([0, 0, 8, a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes()


@pytest.fixture
def small(monkeypatch, tmp_path):
    "A folder with an MNIST of 6 training and 4 test digits, as gzipped IDX files."
    monkeypatch.setattr(mnist, '_counts', dict(train=6, test=4))
    raw = tmp_path/'MNIST'/'raw'
    raw.mkdir(parents=True)
    for k, name in mnist._files.items():
        n = mnist._counts[k[2:]]
        a = np.arange(n*784, dtype=np.uint8).reshape(n, 28, 28) if k[0] == 'x' else np.arange(n, dtype=np.uint8)
        (raw/f'{name}.gz').write_bytes(gzip.compress(idx(a)))
    return tmp_path


def test_reads_gzipped_and_plain(small, monkeypatch):
    d = load_mnist(small, download=False)
    assert d.x_train.shape == (6, 28, 28) and d.y_test.tolist() == [0, 1, 2, 3] and d.y_test.dtype == np.int64
    for f in (small/'MNIST'/'raw').iterdir(): f.with_suffix('').write_bytes(gzip.decompress(f.read_bytes())); f.unlink()
    monkeypatch.setenv('DGLIT_DATA', str(small))
    assert np.array_equal(load_mnist(download=False).x_train, d.x_train)


@pytest.mark.parametrize('spoil,says', [
    (lambda f: f.write_bytes(gzip.compress(idx(np.zeros((5, 28, 28), np.uint8)))), r'shape \(5, 28, 28\), expected \(6, 28, 28\)'),
    (lambda f: f.write_bytes(gzip.compress(idx(np.zeros((6, 28, 28), np.uint8))[:-7])), '4697 bytes of data, expected 4704'),
    (lambda f: f.write_bytes(gzip.compress(idx(np.zeros(6, np.uint8)))), 'magic number 00000801'),
    (lambda f: f.write_bytes(f.read_bytes()[:50]), 'cannot be read'),
    (lambda f: f.write_bytes(f.read_bytes()[:40] + b'\x00\x01\x02' + f.read_bytes()[43:]), 'cannot be read'),
    (lambda f: f.write_bytes(b'<html>'), 'magic number'),
    (lambda f: f.write_bytes(b''), 'magic number'),
    (lambda f: f.unlink(), 'lacks train-images-idx3-ubyte')])
def test_a_wrong_file_is_named(small, spoil, says):
    f = small/'MNIST'/'raw'/'train-images-idx3-ubyte.gz'
    spoil(f)
    with pytest.raises(DataError, match=says) as e: load_mnist(small, download=False)
    assert 'train-images' in str(e.value) and 'load_digits()' in str(e.value)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def broken(root, download):
        raw = tmp_path.__class__(root)/'MNIST'/'raw'
        raw.mkdir(parents=True)
        (raw/'train-images-idx3-ubyte').write_bytes(b'half')
        raise RuntimeError('connection lost')
    monkeypatch.setattr(torchvision.datasets, 'MNIST', broken)
    with pytest.raises(DataError, match=r'download failed \(connection lost\).*DGLIT_DATA.*load_digits'): load_mnist(tmp_path)
    assert not [f for f in tmp_path.rglob('*') if f.is_file()]


def test_a_download_is_moved_into_place(small, tmp_path_factory, monkeypatch):
    import shutil
    monkeypatch.setattr(torchvision.datasets, 'MNIST', lambda root, download: shutil.copytree(small/'MNIST', f'{root}/MNIST'))
    new = tmp_path_factory.mktemp('new')
    assert len(load_mnist(new).x_train) == 6 and sorted(o.name for o in new.iterdir()) == ['MNIST']
    assert len(load_mnist(new, download=False).x_train) == 6


@pytest.fixture
def learn(digits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3*28*28, 10))
    return Learner(mnist_mp(digits, bs=100, size=28), net, CrossEntropyLossFlat())


def test_loaders_in_fastai(learn, digits):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        preds, targets = learn.get_preds(dl=learn.dls.tests['grey'])
        assert preds.shape == (599, 10) and targets.tolist() == digits.y_test.tolist()
        assert learn.get_preds(ds_idx=0)[1].tolist() == digits.y_train.tolist()              # unshuffled, nothing dropped
        shuffled = learn.get_preds(dl=learn.dls.train.new(drop_last=True))                     # put back in order
        assert shuffled[1].tolist() == digits.y_train.tolist()
        assert learn.validate(dl=learn.dls.tests['grey'])[0] > 0
        x, _, t = learn.get_preds(dl=learn.dls.valid, with_input=True)
        assert torch.equal(x, learn.dls.valid.new(bs=None).one_batch()[0])
        assert isinstance(learn.lr_find(show_plot=False, num_it=20).valley, float)


def test_a_pixel_takes_a_byte(learn):
    tensors = sum(t.numel()*t.element_size() for dl in learn.dls.loaders for t in dl.dataset.tensors)
    images = 3*28*28*(1198 + 2*599)
    assert tensors == images + 8*(1198 + 2*599)               # a byte a pixel


@pytest.mark.parametrize('flip', [0., .1, .2, .9, 1.])
@pytest.mark.parametrize('noise', [0., .25])
def test_coins_fall_as_often_as_they_should(flip, noise):
    "Labels and colours of an environment, within four standard deviations of the binomial."
    n = 20_000
    images, digits = np.full((n, 28, 28), 255, np.uint8), np.arange(n) % 10
    x, y = color_environment(images, digits, flip, noise, generator(0, 'test'))
    green = x[:, 1].flatten(1).amax(1) > 0
    assert (x.flatten(2).amax(2).sum(1, dtype=torch.long) == 255).all()                          # one channel alone is lit
    for share, p in (((y != torch.from_numpy(digits < 5)), noise), (green.long() != y, flip)):
        assert abs(share.double().mean() - p) <= 4*(p*(1-p)/n)**.5
    assert abs(((green.long() != y) & (y != torch.from_numpy(digits < 5))).double().mean() - flip*noise) < .02        # independent of each other


def test_colored_mnist_is_dealt_as_the_authors_deal_it(digits):
    "Even places to one environment, odd ones to the other; the last sixth to the test; the validation digits are nobody else's."
    dls = colored_mnist(digits, label_noise=0., envs=(0., 1.))
    x, y, d = dls.train.dataset.tensors
    green = x[:, 1].flatten(1).amax(1) > 0
    assert (green[d == 0] == (y[d == 0] == 1)).all() and (green[d == 1] != (y[d == 1] == 1)).all()
    shapes = lambda t: [o.tobytes() for o in t.sum(1, dtype=torch.uint8).numpy()]
    assert shapes(dls.tests['test'].dataset.tensors[0]) == [o.tobytes() for o in digits.x_train[-199:, ::2, ::2]]
    assert sorted(shapes(x)) == sorted(o.tobytes() for o in digits.x_train[:-199, ::2, ::2])
    assert sorted(shapes(dls.valid.dataset.tensors[0])) == sorted(o.tobytes() for o in digits.x_test[:, ::2, ::2])
    ten = colored_mnist(digits, copies=10).train.dataset.tensors
    assert len(ten[1]) == 9990 and abs(ten[2].double().mean() - .5) < 1e-3


def test_balanced_loaders_in_fastai(digits):
    "Training is balanced and shuffled, domains of unequal size included; predictions come once each, in the data's order."
    t = torch.from_numpy
    d = (torch.arange(1198) % 5 > 3).long()
    train, valid = (t(digits.x_train)[:, None], t(digits.y_train), d), (t(digits.x_test)[:, None], t(digits.y_test), torch.zeros(599).long())
    dls = DomainLoaders.from_tensors(train, valid, {}, bs=40, balanced=True, vocab=range(10))
    assert all(o[2].sum()*2 == len(o[2]) for o in dls.train) and sum(len(o[2]) for o in dls.train) == 2*(d == 0).sum() == dls.train.n
    seen = torch.cat([o[0][o[2] == 0] for o in dls.train])
    assert len(seen.flatten(1).unique(dim=0)) == len(train[0][d == 0].flatten(1).unique(dim=0))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), CrossEntropyLossFlat(), cbs=TakeDomain())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        assert learn.get_preds(ds_idx=0)[1].tolist() == digits.y_train.tolist()
    with pytest.raises(DglitError, match='bs 41 cannot hold as many of each of 2 domains'): dls.train.new(bs=41)
    with pytest.raises(DglitError, match='needed images, targets and domains'): DomainLoaders.from_tensors(train[:2], valid, {}, balanced=True)


def test_evaluate_looks_into_domains(digits):
    learn = domain_learner(colored_mnist(digits), MLP(), loss_func=BCEWithLogitsLossFlat())
    table = evaluate(learn)
    assert list(table.index) == ['valid', 'valid[0]', 'valid[1]', 'valid[worst]', 'test'] and table.n.drop('valid[worst]').tolist() == [599, 300, 299, 199]
    a = table.accuracy*table.n
    assert abs(a['valid'] - a['valid[0]'] - a['valid[1]']) < .1 and table.accuracy['valid[worst]'] == table.accuracy[1:3].min()
