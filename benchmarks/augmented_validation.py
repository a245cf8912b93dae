"""Rows of RCL's Table 2, small: their accuracy on validation digits, on those of each family of augmentations, and on the grey test.

Usage: python benchmarks/augmented_validation.py nbs/results/augmented-validation.csv [seeds [epochs]]"""
import sys
from dataclasses import replace

import pandas as pd

from dglit.core import generator
from dglit.experiments.run import fit, learner_of
from dglit.learner.augmented import FAMILIES, augment
from dglit.learner.tracking import answers_on
from dglit.papers.rcl import RCL_TABLE2
from torch.utils.data import TensorDataset


def of(row, seed, epochs):
    "The accuracies of a row's training, at the row's own rule."
    spec = replace(row.spec, digits='digits', size=28, bs=16, epochs=epochs, seed=seed, precision='fp32')
    learn = learner_of(spec, row.rule)
    r = fit(learn, spec)
    x, y = learn.dls.valid.dataset.tensors
    def right(dl): return round(100*answers_on(learn, 'it', dl)['it'].double().mean().item(), 2)
    families = {k: right(learn.dls.valid.new(TensorDataset(augment(x, k, generator(0, 'augmented', k)), y))) for k in FAMILIES}
    return dict(row=row.name, seed=seed, valid=right(learn.dls.valid), **families, grey_test=right(learn.dls.tests['grey']), seconds=r.seconds)


def main():
    file, seeds, epochs = sys.argv[1], int((sys.argv[2:] or [1])[0]), int((sys.argv[3:] or [4])[0])
    lines = []
    for seed in range(seeds):
        for row in RCL_TABLE2.rows:
            if 'grey' not in row.published or 'early' in row.rule: continue
            lines.append(of(row, seed, epochs))
            print(lines[-1], flush=True)
    pd.DataFrame(lines).drop(columns='seconds').to_csv(file, index=False)


if __name__ == '__main__': main()
