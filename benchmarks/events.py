"""How much of a tiny network's step goes to events that callbacks lack: epochs in turn with `EventCallback` passed over and asked, one thread.
Usage: python benchmarks/events.py"""
import statistics, time

import torch
from fastai.callback.core import Callback
from fastai.torch_core import default_device

from dglit.all import *
from dglit.experiments.run import learner_of
from dglit.experiments.spec import Spec
from dglit.methods.hooks import EventCallback

passed_over = EventCallback.__call__


def seconds(learn, call):
    "Of an epoch, with what callbacks of this book do when an event calls them."
    EventCallback.__call__ = call
    with learn.no_bar(), learn.no_logging():
        start = time.perf_counter(); learn.fit(1)
        return time.perf_counter() - start


def main():
    default_device(False); torch.set_num_threads(1)
    for method in ('erm', 'rcl'):
        learn = learner_of(Spec('mnist_mp', 'mlp', method, digits='digits', hidden=[8], epochs=1, bs=8, precision='fp32'))
        seconds(learn, passed_over)  # warm
        ratios = [seconds(learn, passed_over)/seconds(learn, Callback.__call__) for _ in range(7)]
        print(f'{method}: {statistics.median(ratios):.2f} of the time (median of seven; {min(ratios):.2f} to {max(ratios):.2f})')


if __name__ == '__main__': main()
