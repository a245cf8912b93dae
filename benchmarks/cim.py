"""Milliseconds of a training step on painted backgrounds: plain training, VIB, SCL, CIM and its variants, on the same network, batch and
precision, in turn. Prints the median of each and of its ratio to plain training's; FILE gets a line for each contender and round.
Usage: python benchmarks/cim.py [fp32|bf16 [steps [rounds [FILE.csv]]]]"""
import statistics, sys, time
from dataclasses import replace

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException

from dglit.core import keep_memory
from dglit.experiments.run import learner_of
from dglit.papers.cim import CIM_BACKGROUND_MNIST

SPEC = CIM_BACKGROUND_MNIST.row('erm-1').spec
CONTENDERS = {'plain training': ('erm', {}), 'VIB': ('vib', {}), 'SCL, triplets from the batch': ('scl', {}), 'SCL, all three encoded': ('scl', dict(sample='train')),
              'mask only': ('cim', dict(weight=0.)), 'CIM_g': ('cim', dict(variant='gram')), 'CIM': ('cim', {}), 'CIM, triplets from all data': ('cim', dict(sample='train')),
              'CIM_f': ('cim', dict(variant='feature')), 'CIM + VIB': ('cim+vib', {})}


class Steps(Callback):
    "Times the steps after the first ones, and ends. On a CPU it counts the processor's time, of which other programs take none."
    order = 100

    def __init__(self, steps, first=10): self.steps, self.first = steps, first

    def before_batch(self):
        if not self.training: return
        on_card = self.dls.device.type == 'cuda'
        if on_card: torch.cuda.synchronize()
        now = (time.perf_counter if on_card else time.process_time)()
        if self.iter == self.first: self.start = now
        if self.iter == self.first + self.steps:
            self.seconds = (now - self.start)/self.steps
            raise CancelFitException


def main():
    precision, steps, rounds, file = (sys.argv[1:] + ['fp32', '40', '5', ''][len(sys.argv)-1:])[:4]
    keep_memory()
    learners = {k: learner_of(replace(SPEC, methods=m, precision=precision, **s)) for k, (m, s) in CONTENDERS.items()}
    times = {k: [] for k in learners}
    for _ in range(int(rounds)):
        for k, learn in learners.items():
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(clock := Steps(int(steps))))
            times[k].append(clock.seconds)
    plain = times['plain training']
    for k, v in times.items(): print(f'{k:30} {1000*statistics.median(v):7.1f} ms   {statistics.median(a/b for a, b in zip(v, plain)):.2f} times plain training')
    if file: pd.DataFrame([dict(method=k, round=i, ms=1000*o, ratio=o/p) for k, v in times.items() for i, (o, p) in enumerate(zip(v, plain))]).round(3).to_csv(file, index=False)
    print(f'{precision}, batches of {SPEC.recipe.bs}, {learners["CIM"].dls.device}, {torch.get_num_threads()} threads')


if __name__ == '__main__': main()
