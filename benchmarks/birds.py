"""Two methods that stand beside the table of birds, as they are more than one training: the last layer fitted anew to balanced validation groups
(DFR, Kirichenko et al. 2023), and a second training in which the mistakes of a first are repeated (JTT, Liu et al. 2021). A line of JSON for each.
Usage: python benchmarks/birds.py dfr RECORDS SEED FILE.jsonl [NAME=VALUE ...]      after the plain training that the search in RECORDS picked, and after none
       python benchmarks/birds.py jtt DRAW SEED FILE.jsonl [NAME=VALUE ...]         recipe number DRAW of the search, and a draw of JTT's own settings"""
import json, sys
from dataclasses import replace

import numpy as np
import torch

from dglit.cli import settings_given
from dglit.experiments.record import read_runs
from dglit.experiments.run import fit, learner_of
from dglit.experiments.spec import options_of
from dglit.learner.groups import repeat_wrong, retrain_last_layer
from dglit.learner.measuring import evaluate
from dglit.models.backbone import features_of
from dglit.papers.photographs import RECIPES, SEARCHES, birds_spec

STRENGTHS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.)


def accuracies(model, x, y, g):
    "Percent of each group."
    with torch.no_grad(): right = torch.cat([model(o) for o in x.split(256)]).argmax(1) == y
    return [round(100*right[g == k].double().mean().item(), 4) for k in g.unique()]


def refitted(learn, seed):
    "The last layer fitted to one half of the validation images at each strength, the other half picks; then to all."
    body, model = learn.model.body, learn.model.head.cpu().eval()
    x, y, g = features_of(body, learn.dls.valid)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    a, b = order[::2], order[1::2]
    tried = {C: min(accuracies(retrain_last_layer(model, x[a], y[a], g[a], C, seed=seed), x[b], y[b], g[b])) for C in STRENGTHS}
    C = max(tried, key=tried.get)
    groups = accuracies(retrain_last_layer(model, x, y, g, C, seed=seed), *features_of(body, learn.dls.tests['test']))
    learn.model.head.to(learn.dls.device)
    return dict(C=C, half_worst=tried[C], groups=groups, worst=min(groups))


def dfr(records, seed, changes):
    plain = replace(birds_spec() if records == 'none' else SEARCHES['erm'].pick(read_runs(records), **changes), seed=seed)
    learn = learner_of(plain, 'best:valid[worst]')
    yield dict(method='dfr', after='no training', seed=seed, **refitted(learn, seed))
    if records == 'none': return
    run = fit(learn, plain)
    yield dict(method='dfr', after='plain training', seed=seed, plain=run.at('best:valid[worst]'), **refitted(learn, seed))


def jtt(draw, seed, changes):
    rng = np.random.default_rng(100 + draw)
    first, times = int(rng.integers(1, 3)), int(rng.choice([5, 20, 50]))
    spec = replace(birds_spec(**RECIPES[draw]), seed=seed, **changes)
    learn = learner_of(one := replace(spec, epochs=first), 'last')
    fit(learn, one)
    dls = learn.dls
    dls.train.augment = False
    again = repeat_wrong(dls, learn.model, times)
    again.train.augment, again.group_names = spec.data['augment'], dls.group_names
    more = len(again.train.dataset)/len(dls.train.dataset)
    two = replace(spec, epochs=max(1, round(spec.recipe.epochs/more)) if more < spec.recipe.epochs else 1)
    second = learner_of(two, 'best:valid[worst]')
    second.dls.train = again.train
    second.dls.loaders[0] = again.train
    run = fit(second, two)
    yield dict(method='jtt', draw=draw, seed=seed, first=first, times=times, repeated=round(more, 2), epochs=two.recipe.epochs,
               at={o: run.at(o) for o in ('best:valid[worst]', 'best:valid')})


def main():
    what, given, seed, file, *pairs = sys.argv[1:]
    spec = birds_spec()
    changes = settings_given(pairs, options_of((spec.data, spec.model)))
    lines = dfr(given, int(seed), changes) if what == 'dfr' else jtt(int(given), int(seed), changes)
    for o in lines:
        with open(file, 'a') as f: f.write(json.dumps(o) + '\n')
        print(o)


if __name__ == '__main__': main()
