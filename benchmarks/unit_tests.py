"""The linear unit tests: ten draws of settings for each method, ten seeds, all side by side; a line a training into a CSV file.

Usage: python benchmarks/unit_tests.py nbs/results/family-unit-tests.csv [--steps 4000] [--n 500]"""
import argparse

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from dglit.core import generator
from dglit.data.unit_tests import unit_test

METHODS = {'ERM': (), 'IB-ERM': ('gamma',), 'IRM': ('weight',), 'IB-IRM': ('weight', 'gamma'), 'oracle': ()}
SPACE = dict(lr=(-3, -1), wd=(-6, -2), weight=(-1, 5), gamma=(-3, 1))  # powers of ten


def stacked(example, seeds, n, shuffled):
    "Split -> (inputs [S,1,E,n,10], outcomes [S,1,E,n]); `shuffled`: effects or backgrounds of others in training too."
    def one(seed):
        data = unit_test(example, n=n, seed=seed)
        if shuffled:
            order = generator(seed, 'shuffled')
            for k in ('train', 'valid'):
                for e in range(3): data[k][0][e*n:(e + 1)*n, 5:] = data[k][0][e*n:(e + 1)*n, 5:][torch.randperm(n, generator=order)]
        return data
    each = [one(o) for o in seeds]
    return {k: (torch.stack([o[k][0].view(1, 3, n, 10) for o in each]), torch.stack([o[k][1].view(1, 3, n) for o in each])) for k in each[0]}


def outputs(w, x): return torch.einsum('sdi,sjeni->sden', w, x)


def loss(z, y, classes, weight, gamma):
    "Mean risk, IRM's penalty and the variance of the output, of each seed and draw [S,D]."
    y = y.expand_as(z)
    risk = bce(z, y, reduction='none') if classes else (z - y).square()
    slope = ((z.sigmoid() - y if classes else 2*(z - y))*z).mean(-1)
    total = risk.mean((-1, -2)) + weight*slope.square().mean(-1) + gamma*z.var(-1).mean(-1)
    return total/weight.clamp(min=1)


def wrong(z, y, classes):
    return (((z > 0) != (y > .5)).float() if classes else (z - y).square()).mean((-1, -2))


def train(example, method, seeds, draws, steps, n):
    "A line for each seed and draw: errors on the validation and the test data after the last step."
    rng, classes = np.random.default_rng(0), example.startswith('2')
    drawn = [{k: 10**rng.uniform(*SPACE[k]) for k in SPACE} for _ in range(draws)]
    data = stacked(example, seeds, n, method == 'oracle')
    settings = {k: torch.tensor([o[k] if k in METHODS[method] else 0. for o in drawn]) for k in ('weight', 'gamma')}
    order = generator(0, 'weights')
    each = [(.1*torch.randn(len(seeds), 10, generator=order)).requires_grad_() for _ in drawn]
    opt = torch.optim.Adam([dict(params=[w], lr=o['lr'], weight_decay=o['wd']) for w, o in zip(each, drawn)])
    for _ in range(steps):
        opt.zero_grad()
        loss(outputs(torch.stack(each, 1), data['train'][0]), data['train'][1], classes, **settings).sum().backward()
        opt.step()
    w = torch.stack(each, 1).detach()
    found = {k: wrong(outputs(w, data[k][0]), data[k][1], classes) for k in ('valid', 'test')}
    return [dict(example=example, method=method, seed=s, draw=j, **{k: float(f'{v[i, j]:.5g}') for k, v in found.items()},
                 **{k: float(f'{v:.4g}') for k, v in o.items() if k in ('lr', 'wd', *METHODS[method])}) for i, s in enumerate(seeds) for j, o in enumerate(drawn)]


def main():
    p = argparse.ArgumentParser()
    p.add_argument('file')
    for k, v in dict(steps=4000, n=500, seeds=10, draws=10).items(): p.add_argument(f'--{k}', type=int, default=v)
    args, lines = p.parse_args(), []
    for example in ('1', '2'):
        for method in METHODS:
            lines += train(example, method, range(args.seeds), args.draws, args.steps, args.n)
            d = pd.DataFrame(lines).query('example == @example and method == @method')
            picks = {by: d.loc[d.groupby('seed')[by].idxmin(), 'test'] for by in ('valid', 'test')}
            print(example, method, {k: f'{v.mean():.3f} ± {v.std():.3f}' for k, v in picks.items()}, flush=True)
    pd.DataFrame(lines).to_csv(args.file, index=False)


if __name__ == '__main__': main()
