"""Where a training step of RCL's Table 2 spends its time on one thread of a processor: operator by operator, beside what its multiplications
would take at the rate of a large matrix product, measured between the steps. Usage: python benchmarks/operators.py [--csv nbs/results/cpu-operators.csv] [--steps 20]"""
import argparse, platform, statistics, time

import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from dglit.core import keep_memory
from dglit.experiments.run import learner_of, precision_on
from dglit.experiments.spec import Spec

WARM = 5
KINDS = {'convolution, forward': ('aten::mkldnn_convolution', 'aten::_convolution', 'aten::_slow_conv2d_forward', 'aten::thnn_conv2d'), 'convolution, backward': ('aten::convolution_backward',),
         'matrix products': ('aten::mm', 'aten::addmm', 'aten::bmm'), 'pooling': ('aten::max_pool2d_with_indices', 'aten::max_pool2d_with_indices_backward'),
         'distances': ('aten::_cdist_forward', 'aten::_cdist_backward', 'aten::_pdist_forward', 'aten::_pdist_backward')}
COUNTED = {'convolution': 'convolution, forward', 'convolution_backward': 'convolution, backward', **dict.fromkeys(('mm', 'addmm', 'bmm'), 'matrix products')}


class Stages(Callback):
    "Some steps to warm up, one whose multiplications are counted, some that are timed, some that are profiled."
    order, run_valid = -90, False
    def __init__(self, steps, dtype): self.steps, self.dtype, self.seen = steps, dtype, 0

    def before_batch(self):
        self.seen += 1
        after = self.seen - WARM
        if after == 1: self.counter = FlopCounterMode(display=False).__enter__()
        if after == 2: self.counter.__exit__(None, None, None); self.timed, self.rates = [], []
        if after > 2 and not hasattr(self, 'profiler'):
            self.timed.append(time.perf_counter() - self.start); self.rates.append(rate(self.dtype))
        if after == 2 + self.steps:
            self.seconds, self.peak = statistics.median(self.timed), statistics.median(self.rates)
            self.profiler = profile().__enter__()
        if after == 2 + 2*self.steps:
            self.profiler.__exit__(None, None, None)
            raise CancelFitException
        self.start = time.perf_counter()


def rate(dtype, n=1024):
    "Multiplications and additions a second of a large matrix product, the median of three."
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    def seconds():
        start = time.perf_counter(); a @ b
        return time.perf_counter() - start
    return 2*n**3/statistics.median(seconds() for _ in range(3))


def lines(method, steps):
    "A line for each kind of operator: milliseconds a step, GFLOP a step, share of the rate of a matrix product."
    spec = Spec(methods=method, epochs=1)
    precision = precision_on(torch.device('cpu'))
    learn, stages = learner_of(spec, digits='mnist'), Stages(steps, torch.bfloat16 if precision == 'bf16' else torch.float32)
    if precision == 'bf16': from dglit.learner import BFloat16; learn.add_cb(BFloat16())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=stages)
    peak, flop = stages.peak, dict.fromkeys(KINDS, 0)
    for op, n in stages.counter.get_flop_counts()['Global'].items(): flop[COUNTED[str(op).rpartition('.')[2]]] += n
    own = {o.key: o.self_cpu_time_total/1e6/steps for o in stages.profiler.key_averages()}
    seconds = {k: sum(own.get(o, 0) for o in ops) for k, ops in KINDS.items()}
    seconds['all the rest'] = sum(own.values()) - sum(seconds.values())
    total = sum(seconds.values())
    return [dict(method=method, precision=precision, operators=k, ms=round(1e3*s*stages.seconds/total, 2), share=round(100*s/total, 1), gflop=round(flop.get(k, 0)/1e9, 2),
                 of_peak=round(100*flop[k]/(s*stages.seconds/total)/peak, 1) if flop.get(k) else None, step_ms=round(1e3*stages.seconds, 1), peak_gflops=round(peak/1e9, 1))
            for k, s in seconds.items() if s]


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--csv'); p.add_argument('--steps', type=int, default=20)
    args = p.parse_args()
    torch.set_num_threads(1)
    table = pd.DataFrame([o for m in ('erm', 'rcl', 'jigsaw', 'reconstruction') for o in lines(m, args.steps)])
    print(platform.processor() or platform.machine(), torch.__version__); print(table.to_string())
    if args.csv: table.to_csv(args.csv, index=False)


if __name__ == '__main__': keep_memory(); main()
