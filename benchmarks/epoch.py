"""Seconds of RCL training on MNIST-MP at batch 128: dglit against the same training written plainly (colouring per item in a
DataLoader, float32, the paper's loop over anchors with `cdist`), in turn. Prints medians and the ratio of one run.
Usage: python benchmarks/epoch.py [steps]"""
import statistics, sys, time

import torch
from loaders import PerItem
from torch.utils.data import DataLoader

from dglit.data.mnist import Digits, load_mnist
from dglit.experiments.run import fit, learner_of
from dglit.experiments.spec import Spec
from dglit.models.convnet import ConvNet

BS, ROUNDS = 128, 3


def plain_epoch(digits):
    model = torch.nn.Sequential(*ConvNet().body, *ConvNet().head).to(memory_format=torch.contiguous_format)
    body, head = model[:6], model[6:]
    opt = torch.optim.SGD(model.parameters(), 1e-3, momentum=.9, nesterov=True, weight_decay=1e-5)
    for x, y in DataLoader(PerItem(digits.x_train, digits.y_train), BS, shuffle=True, num_workers=2):
        f = body(x)
        loss = torch.nn.functional.cross_entropy(head(f), y)
        r = f.flatten(1)
        r = (r - r.amin(0))/(r.amax(0) - r.amin(0)).clamp_min(1e-7)
        losses = []
        for i in range(len(y)):
            d = torch.cdist(r[i:i+1], r, p=1)[0]
            same = (y == y[i]) & (torch.arange(len(y)) != i)
            if same.any():
                p = d.detach().masked_fill(~same, float('inf')).argmin()
                losses.append(-(r[i] - r[p].detach()).abs().sum())
        (loss + torch.stack(losses).sum()/len(y)).backward()
        opt.step(); opt.zero_grad()


def dglit_epoch(digits):
    "Painting the digits, once for all epochs, is timed apart; evaluation on 128 digits is in."
    global painting
    spec, start = Spec(methods='rcl', epochs=1), time.perf_counter()
    learn = learner_of(spec, digits=digits)
    painting = time.perf_counter() - start
    fit(learn, spec)


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 469
    d, n = load_mnist(), steps*BS
    digits = Digits(d.x_train[:n], d.y_train[:n], d.x_test[:BS], d.y_test[:BS])
    seconds = {f: [] for f in (dglit_epoch, plain_epoch)}
    for _ in range(ROUNDS):
        for f in seconds:
            start = time.perf_counter()
            f(digits)
            seconds[f].append(time.perf_counter() - start - (painting if f is dglit_epoch else 0))
    ours, plain = seconds.values()
    for f, s in seconds.items(): print(f'{f.__name__:12} {statistics.median(s):8.2f} s for {steps} steps of {BS}')
    print(f'painting and building the network, once: {painting:.2f} s')
    print(f'plain/dglit: {statistics.median(b/a for a, b in zip(ours, plain)):.2f}   (each round: {", ".join(f"{b/a:.2f}" for a, b in zip(ours, plain))})')


if __name__ == '__main__': main()
