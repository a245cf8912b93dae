"""A training step on a graphics card: milliseconds, kernels that are launched, and times that the host waits for the card.
Each method as its Learner trains it, RCL and plain training beside the same in a plain loop, and several seeds side by side.
Usage: python benchmarks/card.py [--steps 200] [--digits digits] [--only seeds]"""
import argparse, time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import torch
from fastai.callback.core import Callback, CancelFitException
from torch.profiler import ProfilerActivity, profile

from dglit.experiments.run import learner_of
from dglit.experiments.spec import Spec
from dglit.experiments.together import lead_of
from dglit.losses.rcl import reverse_contrastive_loss
from dglit.papers.cim import cim_spec
from dglit.papers.irm import OFFICIAL, irm_spec

WARM, PROFILED = 20, 10


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


class Meter:
    "Counts steps: some to warm up, some that are timed, some that are profiled."
    def __init__(self, steps): self.steps, self.seen, self.profiler = steps, 0, None

    def step(self):
        "True when all has been measured."
        self.seen += 1
        if self.seen == WARM: wait(); self.start = time.perf_counter()
        if self.seen == WARM + self.steps:
            wait(); self.ms = 1e3*(time.perf_counter() - self.start)/self.steps
            self.profiler = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA]*torch.cuda.is_available()]).__enter__()
        if self.seen == WARM + self.steps + PROFILED:
            wait(); self.profiler.__exit__(None, None, None)
            calls = Counter()
            for o in self.profiler.key_averages(): calls[o.key] += o.count
            def count(*names): return sum(n for k, n in calls.items() if k.startswith(names))/PROFILED
            self.kernels, self.waits = count('cudaLaunchKernel', 'cuLaunchKernel'), count('cudaStreamSynchronize', 'cudaEventSynchronize')
            self.operators = count('aten::')
            return True

    def __str__(self): return f'{self.ms:8.3f} {self.kernels:8.1f} {self.waits:6.1f} {self.operators:9.0f}'


class Metered(Callback):
    order, run_valid = 200, False
    def __init__(self, meter): self.meter = meter
    def after_batch(self): self.count()
    def after_cancel_batch(self): self.count() # seeds side by side take the step and cancel the batch
    def count(self):
        if self.last != (self.epoch, self.iter):
            self.last = self.epoch, self.iter
            if self.meter.step(): raise CancelFitException
    def before_fit(self): self.last = None


def of_learner(learn, steps):
    meter = Meter(steps)
    with learn.no_bar(), learn.no_logging(): learn.fit(10_000, cbs=Metered(meter))
    return meter


def of_plain_loop(spec, steps, rcl):
    learn, meter = learner_of(spec), Meter(steps)
    model, device = learn.model.to(learn.dls.device), learn.dls.device
    opt = torch.optim.SGD(model.parameters(), 1e-3, momentum=.9, nesterov=True, weight_decay=1e-5, fused=True)
    while True:
        for x, y in learn.dls.train:
            with torch.autocast(device.type, torch.bfloat16):
                f = model.body(x)
                z = model.head(f)
            loss = torch.nn.functional.cross_entropy(z.float(), y)
            if rcl: loss = loss + reverse_contrastive_loss(f.flatten(1).float(), y)
            loss.backward(); opt.step(); opt.zero_grad()
            if meter.step(): return meter


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('--steps', type=int, default=200)
    options.add_argument('--digits', default='mnist')
    options.add_argument('--only', choices=('methods', 'seeds'))
    given = options.parse_args()
    digits = dict(digits=given.digits, **({} if given.digits == 'mnist' else {'bs': 16}))
    mp = {k: Spec('mnist_mp', 'convnet', k, **digits) for k in ('erm', 'rcl', 'jigsaw', 'reconstruction')}
    ground = {k: cim_spec(k, **digits) for k in ('erm', 'vib', 'cim')}
    irm = {k: irm_spec(k, **OFFICIAL, digits=given.digits, epochs=10_000) for k in ('irm', 'vrex')}
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', torch.__version__)
    print(f'{"":32} {"ms":>8} {"kernels":>8} {"waits":>6} {"operators":>9}')
    def line(name, meter): print(f'{name:32} {meter}', flush=True)
    if given.only != 'seeds':
        for name, specs in (('MNIST-MP', mp), ('painted backgrounds', ground), ('Colored MNIST', irm)):
            for k, s in specs.items():
                line(f'{name}, {k}', of_learner(learner_of(replace(s, every=10_000)), given.steps))
                if name == 'MNIST-MP' and k in ('erm', 'rcl'): line('  in a plain loop', of_plain_loop(s, given.steps, k == 'rcl'))
    if given.only == 'methods': return
    for s in (mp['rcl'], ground['cim'], irm['irm']):
        for n in (1, 4, 16):
            seeds = list(range(n))
            learners = [learner_of(replace(s, seed=i, every=10_000)) for i in seeds]
            with ExitStack() as quiet:
                for o in learners:
                    for silent in (o.no_bar(), o.no_logging()): quiet.enter_context(silent)
                meter = of_learner(lead_of(s, learners, seeds), given.steps)
            line(f'{s.data.name}, {s.method.partition("(")[0]}, {n} seeds', meter)


if __name__ == '__main__': main()
