"""The linear unit tests by the search of IB-IRM's authors (and by one with higher learning rates); all draws and seeds of a method at once, a line a training.

Usage: python benchmarks/unit_tests.py nbs/results/family-unit-tests.csv [--steps 10000] [--n 500] [--seeds 10] [--draws 20]

The loss is theirs: (1 - weight)·risk + weight·(penalty, summed over the environments, on a scale and a shift of the output) + gamma·variance of the output."""
import argparse

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from dglit.core import generator, keep_memory
from dglit.data.unit_tests import unit_test

METHODS = {'ERM': (), 'IB-ERM': ('gamma',), 'IRM': ('weight',), 'IB-IRM': ('weight', 'gamma'), 'oracle': ()}
RATES = dict(authors=(-4, -2), faster=(-3, -1))  # powers of ten
DEFAULTS = dict(lr=1e-3, wd=0., weight=.9, gamma=.1)


def drawn(rates, draws):
    "The defaults, then draws: the first of each seed's models is the authors' default."
    rng = np.random.default_rng(0)
    one = lambda: dict(lr=10**rng.uniform(*RATES[rates]), wd=10**rng.uniform(-6, -2), weight=1 - 10**rng.uniform(-3, -.3), gamma=1 - 10**rng.uniform(-2, 0))
    return [DEFAULTS] + [one() for _ in range(draws - 1)]


def stacked(example, seeds, n, shuffled):
    "Split -> (inputs and ones [S,E,n,11], outcomes [S,E,n,1]); `shuffled`: effects or backgrounds of others in training too."
    def one(seed):
        data = unit_test(example, n=n, seed=seed)
        if shuffled:
            order = generator(seed, 'shuffled')
            for k in ('train', 'valid'):
                for e in range(3): data[k][0][e*n:(e + 1)*n, 5:] = data[k][0][e*n:(e + 1)*n, 5:][torch.randperm(n, generator=order)]
        return data
    def splits(k, each): return torch.stack([o[k][0] for o in each]), torch.stack([o[k][1] for o in each])
    each = [one(o) for o in seeds]
    with_ones = lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1).view(len(each), 3, n, 11)
    return {k: (with_ones(x), y.view(len(each), 3, n, 1)) for k, (x, y) in ((k, splits(k, each)) for k in each[0])}


def loss(z, y, classes, weight, gamma):
    "The authors' loss of each seed and draw [S,D], from outputs [S,E,n,D]."
    y = y.expand_as(z)
    risk = bce(z, y, reduction='none') if classes else (z - y).square()
    slope = z.sigmoid() - y if classes else 2*(z - y)
    penalty = ((slope*z).mean(2).square() + slope.mean(2).square()).sum(1)
    return (1 - weight)*risk.mean((1, 2)) + weight*penalty + gamma*z.var(2).mean(1)


def wrong(z, y, classes): return (((z > 0) != (y > .5)).float() if classes else (z - y).square()).mean((1, 2))


def train(example, method, rates, seeds, draws, steps, n):
    "A line for each seed and draw: errors on the validation and the test data after the last step."
    settings, classes = drawn(rates, draws), example.startswith('2')
    data = stacked(example, seeds, n, method == 'oracle')
    own = {k: torch.tensor([o[k] if k in METHODS[method] else 0. for o in settings]) for k in ('weight', 'gamma')}
    order = generator(0, 'weights')
    each = [((torch.rand(len(seeds), 11, generator=order)*2 - 1)/10**.5).requires_grad_() for _ in settings]  # as nn.Linear(10, 1)
    opt = torch.optim.Adam([dict(params=[w], lr=o['lr'], weight_decay=o['wd']) for w, o in zip(each, settings)])
    outputs = lambda x: x @ torch.stack(each, -1)[:, None]
    for _ in range(steps):
        opt.zero_grad()
        loss(outputs(data['train'][0]), data['train'][1], classes, **own).sum().backward()
        opt.step()
    with torch.no_grad(): found = {k: wrong(outputs(data[k][0]), data[k][1], classes) for k in ('valid', 'test')}
    return [dict(example=example, rates=rates, method=method, seed=s, draw=j, **{k: float(f'{v[i, j]:.5g}') for k, v in found.items()},
                 **{k: float(f'{v:.4g}') for k, v in o.items() if k in ('lr', 'wd', *METHODS[method])}) for i, s in enumerate(seeds) for j, o in enumerate(settings)]


def main():
    p = argparse.ArgumentParser()
    p.add_argument('file')
    for k, v in dict(steps=10_000, n=500, seeds=10, draws=20).items(): p.add_argument(f'--{k}', type=int, default=v)
    args, lines = p.parse_args(), []
    for rates in RATES:
        for example in ('1', '2'):
            for method in METHODS:
                lines += train(example, method, rates, range(args.seeds), args.draws, args.steps, args.n)
                d = pd.DataFrame(lines).query('example == @example and method == @method and rates == @rates')
                picks = {by: d.loc[d.groupby('seed')[by].idxmin(), 'test'] for by in ('valid', 'test')}
                print(rates, example, method, {k: f'{v.mean():.3f} ± {v.std():.3f}' for k, v in picks.items()}, flush=True)
                pd.DataFrame(lines).to_csv(args.file, index=False)


if __name__ == '__main__': keep_memory(); main()
