"""Peak memory of a training step in MiB, without a card: weights, gradients, the optimizer's memory and all that the step keeps or makes, as PyTorch's
profiler sees tensors come and go, for every method on images of 128 pixels with ResNet-18 in float32. Workspace of cuDNN and what an allocator holds beside are not in it.
Writes nbs/results/step-memory.csv. Usage: python benchmarks/memory.py [batch size [METHOD ...]]"""
import csv, gc, sys
from itertools import accumulate
from pathlib import Path

from fastai.callback.core import Callback, CancelFitException
from torch.profiler import ProfilerActivity, profile

from dglit.core import DglitError
from dglit.data.compose import photo_digits
from dglit.experiments.registry import METHODS
from dglit.experiments.run import learner_on
from dglit.experiments.spec import Spec


class Peak(Callback):
    "The most that the first two steps held at once; the optimizer's memory is made in the first."
    order = 200

    def before_batch(self):
        if self.iter == 2: raise CancelFitException
        if self.iter == 0:
            weights = sum(o.numel()*o.element_size() for o in (*self.model.parameters(), *self.model.buffers()))
            self.there = weights + sum(o.numel()*o.element_size() for o in (*self.xb, *self.yb))
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()

    def after_fit(self):
        self.profiler.__exit__(None, None, None)
        events = (o for o in self.profiler.profiler.kineto_results.events() if o.name() == '[memory]')
        self.mib = max(accumulate((o.nbytes() for o in sorted(events, key=lambda o: o.start_ns())), initial=self.there))/2**20


def main():
    bs, methods = int((sys.argv[1:] or [32])[0]), sys.argv[2:] or METHODS
    dls, lines = photo_digits(size=128, bs=bs), []
    for k in methods:
        learn = None; gc.collect() # the last one's memory would be freed within this one's steps
        learn = learner_on(dls, Spec('photo_digits', 'backbone', k, size=128, name='resnet18', bs=bs, precision='fp32'))
        try:
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(peak := Peak()))
        except DglitError as e: # a network that the method was not made for
            print(k, e)
            continue
        lines.append([k, bs, round(peak.mib), f'{peak.mib/(lines[0][2] if lines else peak.mib):.2f}'])
        print(*lines[-1], flush=True)
    if methods is METHODS:
        with open(Path(__file__).parent.parent/'nbs/results/step-memory.csv', 'w', newline='') as f:
            csv.writer(f, lineterminator='\n').writerows([['method', 'batch', 'MiB', 'times plain'], *lines])


if __name__ == '__main__': main()
