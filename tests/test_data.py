"Files that are missing, cut or wrong; loaders inside fastai."
import gzip, os, pickle, resource, struct, sys, types

import numpy as np
import pytest
import torch
import torchvision
import fastai.callback.schedule  # lr_find
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn

from dglit.core import DataError, DglitError, generator
from dglit.data import mnist
from dglit.data.background_mnist import background_mnist
from dglit.data.colored_mnist import color_environment, colored_mnist
from dglit.data.loaders import DomainLoaders, TensorLoader
from dglit.data.mnist import Digits, digits_of, load_mnist, read_idx
from dglit.data.mnist_mp import MP_COLORS, mnist_mp, mnist_plain, mnist_up, paint
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
    (lambda f: f.write_bytes(gzip.compress(idx(np.zeros((6, 28, 28), np.uint8)) + bytes(9))), 'more than 4704 bytes'),
    (lambda f: f.write_bytes(bytes([0, 0, 8, 3]) + struct.pack('>3I', 2**31, 2**31, 4)), 'expected 268,435,456 bytes at most'),
    (lambda f: f.write_bytes(bytes([0, 0, 8, 3]) + struct.pack('>3I', 0, 2**32-1, 2**32-1)), 'expected 268,435,456 bytes at most'),
    (lambda f: (f.unlink(), os.mkfifo(f)), 'no regular file'),
    (lambda f: f.write_bytes(b'<html>'), 'magic number'),
    (lambda f: f.write_bytes(b''), 'magic number'),
    (lambda f: f.unlink(), 'lacks train-images-idx3-ubyte')])
def test_a_wrong_file_is_named(small, spoil, says):
    f = small/'MNIST'/'raw'/'train-images-idx3-ubyte.gz'
    spoil(f)
    with pytest.raises(DataError, match=says) as e: load_mnist(small, download=False)
    assert 'train-images' in str(e.value) and 'load_digits()' in str(e.value)


def test_a_small_file_unpacks_to_no_more_than_it_says(tmp_path):
    "Half a gigabyte in half a megabyte, behind headers that hide it and headers that own up to it."
    f, limit = tmp_path/'bomb.gz', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n in (10, 2**29):
        with gzip.open(f, 'wb', compresslevel=1) as out:
            out.write(bytes([0, 0, 8, 1]) + struct.pack('>I', n))
            for _ in range(32): out.write(bytes(2**24))
        assert f.stat().st_size < 4e6
        with pytest.raises(DataError, match='more than 10 bytes|536,870,912|bytes at most'): read_idx(f, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 200_000                    # kilobytes


def test_another_mnist_is_read_and_named(small):
    with pytest.warns(UserWarning, match="train-images-idx3-ubyte.gz is not MNIST's file"): load_mnist(small, download=False)
    f = small/'MNIST'/'raw'/'t10k-labels-idx1-ubyte.gz'
    f.write_bytes(gzip.compress(idx(np.array([0, 1, 10, 3], np.uint8))))
    with pytest.raises(DataError, match='t10k-labels.*: label 10, expected 0 to 9'): load_mnist(small, download=False)


def test_names_with_escapes_do_not_reach_the_terminal(tmp_path):
    folder = tmp_path/'\x1b[31mred'
    folder.mkdir()
    (folder/'file').write_bytes(b'no')
    for f in (lambda: read_idx(folder/'file', 3), lambda: load_mnist(folder, download=False)):
        with pytest.raises(DataError) as e: f()
        assert '\x1b' not in str(e.value) and r'\x1b[31mred' in str(e.value)


def test_digits_by_name(digits):
    assert digits_of('digits') is digits_of('digits') and digits_of(digits) is digits
    for dataset in (mnist_mp, mnist_up, mnist_plain, colored_mnist, background_mnist):
        a, b = dataset('digits', bs=64).train.dataset.tensors, dataset(digits, bs=64).train.dataset.tensors
        assert all(map(torch.equal, a, b))
        with pytest.raises(DglitError, match="unknown digits 'mnits': did you mean 'mnist'"): dataset('mnits')


@pytest.mark.parametrize('dataset,settings,says', [
    *[(o, kw, says) for o in (mnist_mp, mnist_up, mnist_plain) for kw, says in (
        (dict(size=100_000), 'size 100000: needed 28 to 512'), (dict(size=0), 'size 0'), (dict(low=float('nan')), 'low nan'),
        (dict(low=float('-inf')), 'low -inf'), (dict(low=1), 'low 1'))],
    *[(o, dict(bs=bs), f'bs {bs}: needed 1 or more') for o in (mnist_mp, mnist_up, mnist_plain, colored_mnist, background_mnist) for bs in (0, -1)],
    (colored_mnist, dict(envs=.2), 'envs 0.2: needed a list'), (colored_mnist, dict(envs=[]), 'needed a list'),
    (colored_mnist, dict(envs=[.1, float('nan')]), 'probability nan'), (colored_mnist, dict(test_env=-.1), 'probability -0.1'),
    (colored_mnist, dict(label_noise=2), 'probability 2'), (colored_mnist, dict(copies=0), 'copies 0'), (colored_mnist, dict(n=1), 'n 1'),
    (background_mnist, dict(alpha=float('nan')), 'alpha nan'), (background_mnist, dict(alpha=-1), 'alpha -1'), (background_mnist, dict(classes=3), 'classes 3')])
def test_settings_are_refused_before_anything_is_loaded(monkeypatch, dataset, settings, says):
    monkeypatch.setattr(mnist, '_named', lambda *_: pytest.fail('loaded'))
    with pytest.raises(DglitError, match=says): dataset(**settings)


def test_ten_classes_on_the_same_images(digits):
    two, ten = background_mnist(digits, 10., bs=64), background_mnist(digits, 10., 10, bs=64)
    for a, b in zip(two.loaders, ten.loaders):
        (x, half, d), (x10, y, d10) = a.dataset.tensors, b.dataset.tensors
        assert torch.equal(x, x10) and torch.equal(d, d10) and torch.equal(half, (y >= 5).long())
    assert ten.c == 10 and two.vocab == ['0 to 4', '5 to 9']


def test_floats_are_refused(digits):
    x, y = torch.from_numpy(digits.x_train)[:, None], torch.from_numpy(digits.y_train)
    for floats in (x/255, x/127.5 - 1, x.double(), x.long()):
        with pytest.raises(DglitError, match='needed uint8'): DomainLoaders.from_tensors((floats, y), (x, y), {})
    with pytest.raises(DglitError, match='needed uint8'): paint(digits.x_train/255, MP_COLORS[0])
    with pytest.raises(DataError, match='needed images uint8'): Digits(digits.x_train/255, digits.y_train, digits.x_test, digits.y_test)


def test_targets_that_are_no_classes(digits):
    x, y = torch.from_numpy(digits.x_train)[:, None], torch.from_numpy(digits.y_train)
    for labels, says in ((y + 1, 'labels 1 to 10, needed 0 to 9'), (y - 1, 'labels -1 to 8'), (y + .5, 'labels: 6.5 in torch.float32'), (y/0., 'labels: inf'),
                         (y[:5], r'labels of shape \(5,\) for 1198'), (torch.zeros(1198, 10), r'labels of shape \(1198, 10\)')):
        with pytest.raises(DglitError, match=says): DomainLoaders.from_tensors((x, labels), (x, y), {}, vocab=range(10))
        with pytest.raises(DglitError, match=f'odd: {says}'): DomainLoaders.from_tensors((x, y), (x, y), dict(odd=(x, labels)), vocab=range(10))
    for labels in (y[:, None], y.double(), y.to(torch.int32)[:, None], y.numpy()):
        assert torch.equal(DomainLoaders.from_tensors((x, labels), (x, y), {}, vocab=range(10)).train.dataset.tensors[1], y)
    heights = DomainLoaders.from_tensors((x, y/3), (x, y/3), {})                                        # without a vocab, anything
    assert torch.equal(heights.train.dataset.tensors[1], y/3)


@pytest.mark.parametrize('ids', [[20230101, 20230102], [-7, 2*10**12], [False, True], [3., 5.]])
def test_domains_by_any_whole_number(digits, ids):
    x, y = torch.from_numpy(digits.x_train)[:, None], torch.from_numpy(digits.y_train)
    d = torch.tensor(ids)[(torch.arange(1198) % 5 > 3).long()][:, None]
    dls = DomainLoaders.from_tensors((x, y, d), (x, y, d), {}, bs=40, balanced=True, vocab=range(10))
    for *_, b in dls.train: assert b.unique(return_counts=True)[1].tolist() == [len(b)/2]*2
    assert dls.valid.dataset.tensors[2].unique().tolist() == [int(i) for i in ids]
    with pytest.raises(DglitError, match='train: domains: 0.5'): DomainLoaders.from_tensors((x, y, d*0 + .5), (x, y, d), {})


def test_a_loader_splits_over_processes(learn, monkeypatch):
    "fastai's DistributedDL asks for batches of some places: together the ranks give every example, and the same as one process."
    monkeypatch.setitem(sys.modules, 'accelerate', types.SimpleNamespace(Accelerator=type('Accelerator', (), {'__init__': lambda self: None})))
    distributed = pytest.importorskip('fastai.distributed')
    monkeypatch.setattr(distributed.DistributedDL, '_broadcast', lambda self, t, rank: [int(i) for i in t])
    for dl in (learn.dls.valid, learn.dls.train.new(), learn.dls.valid.new(bs=None)):
        ranks = [list(distributed.DistributedDL(dl.new(), rank, 2)) for rank in (0, 1)]
        whole = list(dl.new())
        for k in (0, 1): assert torch.equal(torch.cat([o[k] for r in ranks for o in r])[:len(dl.dataset)], torch.cat([o[k] for o in whole]))
    assert {len(o[1]) for o in distributed.DistributedDL(learn.dls.train.new(drop_last=True), 0, 2)} == {100}


def test_loaders_are_named_a_device_pickled_and_exported(learn, digits, tmp_path):
    dls = learn.dls.to('cpu')
    assert dls.device == torch.device('cpu') and dls.train.device == torch.device('cpu')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    again = pickle.loads(pickle.dumps(dls))
    for _ in range(2): assert all(map(torch.equal, [y for _, y in dls.train], [y for _, y in again.train]))   # mid-way, the same orders follow
    learn.path = tmp_path
    learn.export('model.pkl')
    assert (tmp_path/'model.pkl').stat().st_size < 1e6                                              # without the data
    loaded = load_learner(tmp_path/'model.pkl')
    dl = learn.dls.tests['grey']
    with learn.no_bar(), loaded.no_bar(): assert torch.equal(loaded.get_preds(dl=dl)[0], learn.get_preds(dl=dl)[0])


def test_loaders_around_fastais_export(learn, digits, tmp_path):
    from fastai.data.core import Datasets, TfmdDL
    x = torch.from_numpy(digits.x_train).float().div(255).flatten(1)
    data = Datasets(range(99), [[lambda i: x[i]], [lambda i: torch.tensor(digits.y_train[i])]])
    dls = DomainLoaders(TfmdDL(data, bs=9, shuffle=True), TfmdDL(data, bs=9), dict(again=TfmdDL(data, bs=9)), range(10))
    empty = dls.new_empty()
    assert [len(o.dataset) for o in empty.loaders] == [0, 0, 0] and list(empty.tests) == ['again'] and empty.vocab == dls.vocab


def test_training_data_that_make_no_batch(digits):
    x, y = torch.from_numpy(digits.x_train)[:, None], torch.from_numpy(digits.y_train)
    dls = DomainLoaders.from_tensors((x, y), (x, y), {}, bs=100, drop_last=True, vocab=range(10))
    assert [len(b) for _, b in dls.train] == [100]*11 and len(list(dls.valid)) == 12
    with pytest.raises(DglitError, match='1198 images make no batch of 1199'): DomainLoaders.from_tensors((x, y), (x, y), {}, bs=1199, drop_last=True)
    for train, valid in (((x[:0], y[:0]), (x, y)), ((x, y), (x[:0], y[:0]))):
        with pytest.raises(DglitError, match='(train|valid): no images'): DomainLoaders.from_tensors(train, valid, {})
    with pytest.raises(DglitError, match='4 tensors, needed 2 or 3'): DomainLoaders.from_tensors((x, y, y, y), (x, y), {})


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
