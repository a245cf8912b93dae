"""Milliseconds of a training step on images of 128 pixels, for EfficientNet-Lite0 and ResNet-18: plain training and methods on the same batches, in turn.
Prints the median of each and of its ratio to plain training's in the same round; FILE gets a line for each network, method and round.
Usage: python benchmarks/photos.py [batch size [steps [rounds [FILE.csv]]]]"""
import statistics, sys

import pandas as pd
import torch
from cim import Steps

from dglit.core import keep_memory
from dglit.data.compose import photo_digits
from dglit.experiments.run import learner_on
from dglit.experiments.spec import Spec

NETWORKS = 'efficientnet_lite0', 'resnet18'
CONTENDERS = {'plain training': ('erm', {}), 'VIB': ('vib', {}), 'SCL': ('scl', {}), 'mask alone': ('cim', dict(weight=0.)), 'CIM': ('cim', dict(weight=.01)),
              'CIM + VIB': ('cim+vib', dict(weight=.01)), 'RCL': ('rcl', {}), 'spectral decoupling': ('spectral_decoupling', {}), 'SAM': ('sam', {}),
              'GroupDRO': ('group_dro', {}), 'IRM': ('irm', {}), 'V-REx': ('vrex', {}), 'Fishr': ('fishr', {}), 'CORAL': ('coral', {}), 'DANN': ('dann', {}),
              'MMD': ('mmd', {}), 'BIRM': ('birm', {}), 'RSC': ('rsc', {}), 'jigsaw': ('jigsaw', {}), 'edges': ('edges', {}), 'mixup': ('mixup', {})}
FIRST = 2  # steps that are not timed


def main():
    bs, steps, rounds, file = (sys.argv[1:] + ['16', '5', '3', ''][len(sys.argv)-1:])[:4]
    keep_memory()
    lines = []
    dls = photo_digits(size=128, bs=int(bs))
    for name in NETWORKS:
        learners = {k: learner_on(dls, Spec('photo_digits', 'backbone', m, size=128, name=name, bs=int(bs), precision='fp32', **s)) for k, (m, s) in CONTENDERS.items()}
        for i in range(int(rounds)):
            for k, learn in learners.items():
                with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(clock := Steps(int(steps), FIRST)))
                lines.append(dict(network=name, method=k, round=i, ms=1000*clock.seconds))
            plain = next(o['ms'] for o in lines if (o['network'], o['round'], o['method']) == (name, i, 'plain training'))
            for o in lines:
                if (o['network'], o['round']) == (name, i): o['ratio'] = o['ms']/plain
        for k in CONTENDERS:
            mine = [o for o in lines if (o['network'], o['method']) == (name, k)]
            print(f"{name:20} {k:16} {statistics.median(o['ms'] for o in mine):8.1f} ms   {statistics.median(o['ratio'] for o in mine):.2f} times plain training", flush=True)
    if file: pd.DataFrame(lines).round(3).to_csv(file, index=False)
    print(f'batches of {bs}, 128 pixels, {learners["CIM"].dls.device}, {torch.get_num_threads()} threads')


if __name__ == '__main__': main()
