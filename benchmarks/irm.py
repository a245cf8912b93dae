"""Seconds of an IRM restart on Colored MNIST: dglit against the authors' recipe written plainly (environment by environment, the
test environment evaluated at each step, a penalty by double backward, float32), in turn, each in a process of its own, as what one
tells the C library about memory would hold for the other. Prints the ratio of each round and their median.
Usage: python benchmarks/irm.py [steps [rounds]]"""
import statistics, sys, time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as nll

from dglit.core import set_seed
from dglit.experiments.run import fit, learner_of
from dglit.models.mlp import MLP
from dglit.papers.irm import IRM_COLORED_MNIST

SPEC = IRM_COLORED_MNIST.row('irm').spec


def environments(dls):
    "Images and labels of each environment, the test's last."
    of = lambda dl: next(iter(dl))
    x, y, d = of(dls.train)
    return [(x[d == e], y[d == e].float()[:, None]) for e in d.unique()] + [(of(dls.tests['test'])[0], of(dls.tests['test'])[1].float()[:, None])]


def penalty(logits, y):
    scale = torch.tensor(1., device=logits.device).requires_grad_()
    slope, = torch.autograd.grad(nll(logits*scale, y), [scale], create_graph=True)
    return slope**2


def plain(model, envs, steps, lr, l2, weight, anneal_steps):
    "The recipe; the accuracies on training and test environments at the last step."
    opt = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        logits = [model(x) for x, _ in envs]
        risks, penalties = ([f(z, y) for z, (_, y) in zip(logits, envs)] for f in (nll, penalty))
        accuracies = [((z > 0) == y).float().mean() for z, (_, y) in zip(logits, envs)]
        w = weight if step >= anneal_steps else 1.
        loss = torch.stack(risks[:-1]).mean() + l2*sum(p.norm().pow(2) for p in model.parameters()) + w*torch.stack(penalties[:-1]).mean()
        opt.zero_grad()
        (loss/max(w, 1.)).backward()
        opt.step()
    return [100*o.item() for o in (torch.stack(accuracies[:-1]).mean(), accuracies[-1])]


def one(contender, seed, steps):
    "Accuracies on training and test environments at the last step, and seconds, of one restart."
    spec = replace(SPEC, epochs=steps, seed=seed)
    if contender == 'dglit':
        learn = learner_of(spec, 'last')
        start = time.perf_counter()
        last = fit(learn, spec).at('last')
        return last['train'], last['test'], time.perf_counter() - start
    dls = spec.data.build(bs=None, seed=seed)
    set_seed(seed)
    model, envs = MLP(hidden=spec.model['hidden']).to(dls.device), environments(dls)
    start = time.perf_counter()
    return *plain(model, envs, steps, spec.recipe.lr, **dict(spec.methods[0].settings)), time.perf_counter() - start


def main():
    steps, rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 501, int(sys.argv[2]) if len(sys.argv) > 2 else 3
    ratios = []
    for seed in range(rounds):
        seconds = []
        for contender in ('plain', 'dglit'):
            with ProcessPoolExecutor(1, get_context('spawn')) as alone: train, test, s = alone.submit(one, contender, seed, steps).result()
            seconds.append(s)
            print(f'seed {seed}, {contender}: train {train:.1f}, test {test:.1f}, {s:.1f} s', flush=True)
        ratios.append(seconds[0]/seconds[1])
    print(f'plain/dglit: {statistics.median(ratios):.2f}   (each round: {", ".join(f"{o:.2f}" for o in ratios)}); {torch.get_num_threads()} threads')


if __name__ == '__main__': main()
