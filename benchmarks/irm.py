"""Seconds of an IRM restart on Colored MNIST: dglit against the authors' recipe written plainly (environment by environment, the
test environment evaluated at each step, a penalty by double backward, float32), in turn. Prints medians and the ratio of one run.
Usage: python benchmarks/irm.py [steps [rounds]]"""
import statistics, sys, time

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as nll

from dglit.core import set_seed
from dglit.data.mnist import load_mnist
from dglit.experiments.run import DATASETS, fit, learner_of
from dglit.experiments.tables import IRM_COLORED_MNIST
from dglit.models.mlp import MLP
from dataclasses import replace

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


def main():
    steps, rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 501, int(sys.argv[2]) if len(sys.argv) > 2 else 3
    digits, seconds, ratios = load_mnist(), {'plain': [], 'dglit': []}, []
    for seed in range(rounds):
        spec = replace(SPEC, epochs=steps, seed=seed)
        learn = learner_of(spec, digits)
        start = time.perf_counter()
        r = fit(learn, spec)
        seconds['dglit'].append(time.perf_counter() - start)
        dls = DATASETS[spec.dataset](digits, bs=None, seed=seed)
        set_seed(seed)
        model, envs = MLP(hidden=[390, 390]).to(dls.device), environments(dls)
        start = time.perf_counter()
        train, test = plain(model, envs, steps, spec.lr, **spec.settings)
        seconds['plain'].append(time.perf_counter() - start)
        ratios.append(seconds['plain'][-1]/seconds['dglit'][-1])
        last = r.curve[-1]
        print(f'seed {seed}: plain train {train:.1f} test {test:.1f}, {seconds["plain"][-1]:.1f} s;  dglit train {last["train"]:.1f} test {last["test"]:.1f}, {seconds["dglit"][-1]:.1f} s;  ratio {ratios[-1]:.2f}')
    print(f'plain/dglit, median: {statistics.median(ratios):.2f}; {torch.get_num_threads()} threads')


if __name__ == '__main__': main()
