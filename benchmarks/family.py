"A step of each method against plain training's, and IRM's: ratios of medians, on one batch of 1,000 coloured digits."
import statistics
import time
from functools import partial

import torch
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import OptimWrapper

from dglit.core import set_seed
from dglit.data.colored_mnist import colored_mnist
from dglit.data.mnist import load_digits
from dglit.learner import domain_learner
from dglit.methods.alignment import CORAL, DANN
from dglit.methods.bottleneck import BIRM, IBERM
from dglit.methods.edges import EdgeLoss
from dglit.methods.head_gradients import IGA, Fishr, HessianAlignment
from dglit.methods.irm import IRM, VREx
from dglit.methods.pair import PAIR
from dglit.models.mlp import MLP

METHODS = {'plain': lambda: (), 'IRM': lambda: IRM(1e4, 0), 'V-REx': lambda: VREx(1e4, 0), 'Fishr': lambda: Fishr(1e4, 0),
           'HGP': lambda: HessianAlignment(1., 0), 'Hessian diagonal': lambda: HessianAlignment(1., 0, curvature='diagonal'),
           'IGA': lambda: IGA(1., 0), 'IB-ERM': lambda: IBERM(.1), 'BIRM': lambda: BIRM(1., 0), 'PAIR': lambda: PAIR(anneal_steps=0),
           'CORAL': lambda: CORAL(1.), 'DANN': lambda: DANN(), 'edges': lambda: EdgeLoss(),
           'Hutchinson, 150 probes': lambda: HessianAlignment(1., 0, curvature='diagonal', probes=150)}


def main(rounds=5, steps=8, n=998):
    torch.set_num_threads(1)
    dls,taken = colored_mnist(load_digits(), n=n, device='cpu'), {k: [] for k in METHODS}
    for _ in range(rounds): # in turn, so that a busy machine slows all of them alike
        for name,method in METHODS.items():
            set_seed(0)
            steps_here = 2 if 'probes' in name else steps
            learn = domain_learner(dls, MLP(hidden=[390, 390]), method(), 'last', BCEWithLogitsLossFlat(), every=10**6,
                                   opt_func=partial(OptimWrapper, opt=torch.optim.Adam), lr=1e-3, wd=0.)
            with learn.no_bar(), learn.no_logging():
                learn.fit(1)
                start = time.process_time()
                learn.fit(steps_here)
            taken[name].append((time.process_time() - start)/steps_here)
    median = {k: statistics.median(v) for k,v in taken.items()}
    print(f'{"method":24} {"ms a step":>9} {"of plain":>9} {"of IRM":>7}')
    for k,v in median.items(): print(f'{k:24} {1000*v:9.1f} {v/median["plain"]:9.2f} {v/median["IRM"]:7.2f}')


if __name__ == '__main__': main()
