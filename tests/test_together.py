"Seeds side by side leave the records that one training after another leaves."
from dataclasses import replace
from inspect import signature

import pytest, torch
from card import CARD, a_card
from torch.utils._python_dispatch import TorchDispatchMode

from dglit.data.mnist import Digits
from dglit.experiments.registry import METHODS
from dglit.experiments.run import learner_of, run
from dglit.experiments.spec import Spec
from dglit.experiments.together import NotTogether, lead_of, run_seeds, sweep_together
from dglit.methods.core import DomainMethod

SIDE_BY_SIDE = ['erm', 'rcl', 'dropout', 'orthogonality', 'decov', 'spectral_decoupling', 'irm', 'vrex', 'group_dro', 'vib', 'scl',
                'iberm', 'birm', 'coral', 'mmd', 'edges', 'cim', 'fishr', 'hessian', 'iga', 'mixup'] # a new method's name joins when the test below says so; none leaves


@pytest.fixture(scope='module')
def few(digits): return Digits(digits.x_train[:96], digits.y_train[:96], digits.x_test[:48], digits.y_test[:48])


def spec_of(name, model='mlp', **settings):
    "Some steps of a method, on data that it can use."
    domains = METHODS[name] and issubclass(METHODS[name], DomainMethod)
    where = dict(data='colored_mnist', rgb=True) if domains else dict(data='mnist_mp')
    net = {'mlp.hidden': [16]} if model == 'mlp' else {}
    return Spec(model=model, methods=name, **{**dict(bs=32, epochs=2, precision='fp32'), **where, **net, **settings})


def differ(together, one):
    "The largest difference of any number in two lists of records, which are else alike."
    assert [(o.spec, o.status, o.domains, o.data_hash) for o in together] == [(o.spec, o.status, o.domains, o.data_hash) for o in one]
    assert [[list(line) for line in o.measured] for o in together] == [[list(line) for line in o.measured] for o in one]
    return max(abs(x[k] - y[k]) for p, q in zip(together, one) for x, y in zip(p.measured, q.measured) for k in x)


def both(spec, few, seeds=(0, 7)):
    said = []
    return run_seeds(spec, seeds, said.append, digits=few), [run(replace(spec, seed=o), digits=few) for o in seeds], said


@pytest.mark.parametrize('name', METHODS)
def test_as_one_by_one(few, name):
    spec = spec_of(name)
    try: together, one, said = both(spec, few)
    except ValueError as e: # what a training of one seed would say, too
        with pytest.raises(ValueError): run(spec, digits=few)
        return
    assert differ(together, one) < 2e-4
    assert not (said and name in SIDE_BY_SIDE), said
    assert said or name in SIDE_BY_SIDE, f'the seeds of {name} are trained side by side: add it to SIDE_BY_SIDE'
    assert together[0].measured != together[1].measured


@pytest.mark.parametrize('changes', [dict(bs=None), dict(opt='adam', wd=.1), dict(schedule='flat_cos', epochs=4, every=3), dict(momentum=0.)], ids=str)
def test_recipes(few, changes):
    together, one, said = both(spec_of('group_dro', **changes), few)
    assert not said and differ(together, one) < 1e-5


def test_positives_of_all_training_data_are_each_seeds_own(few):
    "The loader that serves all seeds has no data to draw from: these go one by one."
    together, one, said = both(spec_of('scl', sample='train'), few)
    assert said and differ(together, one) == 0


def test_a_convolutional_network(few):
    together, one, said = both(spec_of('decov', 'convnet', epochs=1), few, (0, 1))
    assert not said and differ(together, one) < 1e-4


def test_one_that_diverges_leaves_the_others(few):
    "A seed whose loss is no number ends, as it would alone; the records of the others are as they were."
    spec = spec_of('erm', lr=.1, epochs=3)
    specs = [replace(spec, seed=o) for o in (0, 1)]
    learners = [learner_of(o, digits=few) for o in specs]
    with torch.no_grad(): learners[0].model.head.bias += float('inf')
    lead = lead_of(specs[0], learners, [0, 1], digits=few)
    for o in (lead, *learners): o.remove_cbs([c for c in o.cbs if c.name == 'progress'])
    with lead.no_logging(), learners[0].no_logging(), learners[1].no_logging(): lead.fit(3)
    assert [len(o.track_domains.curve) for o in learners] == [0, 3]
    alone = run(specs[1], digits=few)
    assert learners[1].track_domains.curve[-1] == pytest.approx(alone.measured[-1], abs=1e-5)


class Count(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.n += not any(r.alias_info is not None and not r.alias_info.is_write for r in f._schema.returns)
        return f(*args, **(kwargs or {}))


def operators(spec, seeds, few):
    "Operators of a step: those of two epochs less those of one, over the steps of an epoch."
    def of(epochs):
        s = replace(spec, recipe=replace(spec.recipe, epochs=epochs, every=100))
        with Count() as count: run_seeds(s, seeds, digits=few)
        return count.n
    return (of(4) - of(3))/3


def test_sixteen_seeds_take_not_many_more_operators(few):
    one, many = (operators(spec_of('irm'), range(n), few) for n in (1, 16))
    assert many < 3*one, 'one after another take sixteen times as many'


def test_a_sweep(few, tmp_path):
    specs = [replace(spec_of(m, epochs=1), seed=o) for m in ('erm', 'decov') for o in range(2)]
    done = []
    runs = sweep_together(specs, tmp_path, lambda r, n, of: done.append((r.spec, n, of)), digits=few)
    assert [o.spec for o in runs] == specs and done == [(o, i, 4) for i, o in enumerate(specs, 1)]
    assert len(list(tmp_path.glob('*.json'))) == 4
    again = sweep_together(specs, tmp_path, lambda *a: done.append(a), digits=few)
    assert len(done) == 4 and [o.measured for o in again] == [o.measured for o in runs]


@pytest.mark.parametrize('name', ['erm', 'irm', 'vib', 'cim'])
def test_on_a_card(few, name):
    "The first real card showed that weights were stacked before they were there. No step waits: there is no Recorder to ask for the loss."
    spec, said, waits = spec_of(name, every=10), [], {}
    here = run_seeds(spec, (0, 7), digits=few)
    for bs in (32, 16): # three steps an epoch, and six
        with a_card() as card: there = run_seeds(replace(spec, bs=bs), (0, 7), said.append, digits=few, device=CARD)
        waits[bs] = card.waits
        if bs == 32: assert differ(there, here) < 1e-5
    assert not said and waits[16] <= waits[32] # fewer: what is copied once was there already
