"""Several seeds in one program against a sweep of as many trainings, two at a time: seconds, and operators of a training step, which are what is launched on a card.
Usage: python benchmarks/seeds.py [irm] [rcl] [operators] [--n 10000] [--epochs 51]"""
import argparse, resource, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
from test_together import operators, spec_of

from dglit.data.mnist import Digits, load_digits
from dglit.experiments.spec import Spec
from dglit.experiments.sweep import sweep
from dglit.experiments.together import sweep_together
from dglit.papers.irm import OFFICIAL, irm_spec

JOBS = 2


def now(): # on the clock; and of the processors, which other programs do not lengthen
    used = [resource.getrusage(o) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(o.ru_utime + o.ru_stime for o in used)


def seconds(f, specs, **kwargs):
    with tempfile.TemporaryDirectory() as folder:
        start = now()
        runs = f(specs, folder, **kwargs)
        assert all(o.status == 'done' for o in runs)
        return [b - a for a, b in zip(start, now())]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('what', nargs='*', default=['irm', 'rcl', 'operators'])
    options.add_argument('--n', type=int, default=10_000, help='digits that IRM trains on')
    options.add_argument('--epochs', type=int, default=51, help='steps of IRM')
    given = options.parse_args()
    print(f'{torch.get_num_threads()} threads, PyTorch {torch.__version__}, float32', flush=True)
    irm = irm_spec('irm', **OFFICIAL, n=given.n, epochs=given.epochs, precision='fp32')
    rcl = Spec('mnist_mp', 'convnet', 'rcl', digits='digits', epochs=1, precision='fp32')
    for name, spec, n in (('irm', irm, 10), ('rcl', rcl, 4)):
        if name not in given.what: continue
        specs = [replace(spec, seed=i) for i in range(n)]
        together, apart = seconds(sweep_together, specs), seconds(sweep, specs, jobs=JOBS)
        for of, a, b in zip(('the clock', 'processors'), together, apart):
            print(f'{name}, {n} seeds, seconds of {of}: {a:.1f} in one program, {b:.1f} in a sweep of {JOBS} jobs, ratio {a/b:.2f}', flush=True)
    if 'operators' not in given.what: return
    digits = load_digits()
    few = Digits(digits.x_train[:96], digits.y_train[:96], digits.x_test[:48], digits.y_test[:48])
    for method in ('erm', 'rcl', 'irm', 'cim'):
        each = {n: operators(spec_of(method), range(n), few) for n in (1, 4, 16)}
        print(f'{method}: operators of a step', ', '.join(f'{v:.0f} with {n} seeds' for n, v in each.items()), flush=True)


if __name__ == '__main__': main()
