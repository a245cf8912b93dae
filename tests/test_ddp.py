"Two processes, each with half of every batch, train the network that one trains with the whole; or a method says that it cannot."
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from dglit.core import DglitError, set_seed
from dglit.data.loaders import DomainLoaders
from dglit.experiments.registry import METHODS
from dglit.methods.core import TakeDomain
from dglit.methods.distributed import gathered, ranks, whole_of

TWO = 2
pytestmark = pytest.mark.xdist_group('ddp')  # all look at one pair of processes


STRONGER = dict(decov=dict(weight=1.)) # than by default, so that it shows in six steps
def made(name): return METHODS[name](**STRONGER.get(name, {})) if METHODS[name] else None
def claims(name): # of the classes alone: whether no base says `whole = None`
    return METHODS[name] is None or None not in [vars(c)['whole'] for c in METHODS[name].__mro__ if 'whole' in vars(c)]
CLAIMED, OTHERS = [k for k in METHODS if claims(k)], [k for k in METHODS if not claims(k)]


class Part(Callback):
    "Each process sees its part of a batch, and trains the model under DDP."
    order = -50
    def before_fit(self):
        if ranks() > 1: self.learn.model = DistributedDataParallel(self.learn.model)
    def before_batch(self):
        n = len(self.x)//ranks()
        mine = slice(n*distributed.get_rank(), n*(distributed.get_rank() + 1)) if ranks() > 1 else slice(None)
        if self.training: self.learn.xb, self.learn.yb = (tuple(o[mine] for o in b) for b in (self.xb, self.yb))
    def after_fit(self): self.learn.model = getattr(self.model, 'module', self.model)


def trained(name):
    "The weights after six steps; the sentence, where there are none."
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    def part(n): return torch.randint(256, (n, 3, 20, 20), generator=g, dtype=torch.uint8), torch.randint(3, (n,), generator=g), 3 + 2*torch.randint(3, (n,), generator=g)
    dls = DomainLoaders.from_tensors(part(96), part(16), {}, bs=32, device='cpu', vocab=range(3))
    body = nn.Sequential(nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)))
    learn = Learner(dls, model, CrossEntropyLossFlat(), lr=.01, cbs=[TakeDomain(), Part(), *([made(name)] if METHODS[name] else [])],
                    opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    learn.seed = 0
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
    except DglitError as e: return str(e)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=TWO)
    x = torch.arange(6.).view(3, 2) + 10*rank
    x.requires_grad_()
    (gathered(x)**2).sum().backward()
    torch.save(dict(gathered=gathered(x.detach()), slope=x.grad, **{k: trained(k) for k in METHODS}), f'{folder}/{rank}.pt')
    distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    multiprocessing.spawn(process, (str(folder),), TWO)
    return [torch.load(folder/f'{o}.pt') for o in range(TWO)]


@pytest.mark.parametrize('name', CLAIMED)
def test_two_processes_are_one(two, name):
    one = trained(name)
    for o in two:
        assert isinstance(o[name], torch.Tensor), o[name]
        assert torch.allclose(o[name], one, atol=1e-6, rtol=0)
    assert METHODS[name] is None or not torch.allclose(one, two[0]['erm'], atol=1e-5), 'the method changes something'


@pytest.mark.parametrize('name', OTHERS)
def test_or_it_is_said(two, name):
    for o in two: assert 'cannot be trained by 2 processes' in o[name], o[name]


def test_gathered(two):
    "All parts in order, and twice the slope of one's own."
    whole = torch.cat([torch.arange(6.).view(3, 2), torch.arange(6.).view(3, 2) + 10])
    for o, mine in zip(two, whole.chunk(2)):
        assert torch.equal(o['gathered'], whole) and torch.equal(o['slope'], 2*2*mine)


def test_a_batch_of_each_would_not_do():
    "What this is for: the variance of risks over two halves is not that of the whole."
    assert {'irm', 'vrex', 'group_dro', 'rcl', 'decov', 'reconstruction', 'erm'} <= set(CLAIMED)
