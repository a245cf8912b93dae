"""RFC's table: five starts, six ways on from each, the worst of three tests; a JSON file a training, which is not done twice.
In "erm" the penalty begins after some steps, in one Adam; in "anew", which RFC has not, in an Adam of its own.

Usage: python benchmarks/rich_features.py FOLDER [--jobs 1] [--seeds 5] [--n N] [--bs N --divide 1] [--columns ...] [--digits mnist], and then
python benchmarks/rich_features.py FOLDER --csv nbs/results: what the folder and those in it hold (one for each --weight, say) as the page's two tables."""
import argparse, json, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # for learn.no_bar()
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import OptimWrapper

from dglit.core import keep_memory, set_seed, write_whole
from dglit.data.more_colored_mnist import colored_mnist_three
from dglit.experiments.run import precision_on
from dglit.learner.precision import BFloat16
from dglit.learner.rich_features import TrainOnly, answers_of, discover, fit_plain, stored_features, synthesise
from dglit.methods.core import TakeDomain
from dglit.methods.head_gradients import IGA, Fishr
from dglit.methods.irm import IRM, VREx
from dglit.methods.spectral_decoupling import SpectralDecoupling
from dglit.models.mlp import MLP

LR, HIDDEN, ANNEALED, PRETRAINED = 5e-4, [390, 390], 200, 190
WORLDS = dict(plain=dict(l2=1.1e-3, steps=(51, 501, 501), then=1001, irm=3001), inverse=dict(l2=1e-4, steps=(151, 401, 501), then=2001, irm=10_001))
COLUMNS = dict(rand='plain', erm='plain', anew='plain', rfc='plain', frozen='plain', inverse='inverse')  # the last two: features stay as they are
FOUND = 'inverse', 'rfc', 'frozen'  # which begin with the rounds' features


def methods_of(weight, l2, begin=0):
    "Risks and penalties are means over the two environments here, sums there, and V-REx's variance is unbiased there: of weights IRM's is halved."
    now = dict(anneal_steps=begin)
    return dict(irm=lambda: IRM(weight/2, **now, l2=l2/2), vrex=lambda: VREx(weight, **now, l2=l2/2), iga=lambda: IGA(weight, **now, l2=l2/2),
                fishr=lambda: Fishr(weight, **now, l2=l2/2), uncentered=lambda: Fishr(weight, **now, l2=l2/2, centered=False),
                sd=lambda: SpectralDecoupling(weight/100), erm=lambda: ())


class Worst(Callback):
    "Every `every` steps the accuracy in training and on each test."
    def __init__(self, every): self.every, self.curve = every, []
    def after_train(self):
        if self.epoch % self.every and self.epoch + 1 < self.n_epoch: return
        self.model.eval()
        with torch.no_grad(): self.curve.append([self.epoch, *(self.right(o) for o in (self.dls.train, *self.dls.tests.values()))])
        self.model.train()

    def right(self, dl):
        answers = answers_of(self.model, dl).cpu() == dl.dataset.tensors[1].reshape(-1).bool().cpu()
        return round(100*answers.double().mean().item(), 3)


def loaders(world, seed, args):
    return colored_mnist_three(args.digits, inverse=world == 'inverse', n=args.n, bs=args.bs, seed=seed)


def network(dls):
    return MLP(2, 1, dls.one_batch()[0].shape[-1], hidden=HIDDEN)


def start(world, seed, args):
    "The rounds' answers and the features of all of them, kept in a file."
    path, o = Path(args.folder)/f'start-{world}-{seed}.pt', WORLDS[world]
    if path.exists(): return
    dls = loaders(world, seed, args)
    steps, net = [max(s//args.divide, 2) for s in o['steps']], partial(network, dls)
    fit = dict(lr=LR, l2=o['l2'], seed=seed)
    found = discover(dls, net, 2, tuple(steps[:2]), **fit)
    y = dls.train.dataset.tensors[1].bool()
    rounds = [round(100*(r == y).double().mean().item(), 2) for r in found]
    alone = second_round(dls, net, found, steps[1], fit)
    model = synthesise(dls, net, found, steps[2], **fit)
    torch.save(dict(model={k: v.cpu() for k, v in model.state_dict().items()}, rounds=rounds, alone=alone), path)


def second_round(dls, net, found, steps, fit):
    "The second round once more, with its tests: it has seen no environment."
    from dglit.learner.rich_features import WorstGroup, groups_of, regrouped
    y = dls.train.dataset.tensors[1].bool()
    data = regrouped(dls, y.long(), groups_of(found[:1] == y))
    set_seed(fit['seed'] + 1000)
    model = fit_plain(data, net(), WorstGroup(), steps, fit['lr'], fit['l2']).eval()
    look = Worst(1)
    look.learn = argparse.Namespace(model=model)
    with torch.no_grad(): return {k: look.right(o) for k, o in dls.tests.items()}


def on(column, name, seed, args):
    "A method from one of the starts on: its curve."
    path = Path(args.folder)/f'{column}-{name}-{seed}.json'
    if path.exists(): return path.name
    world, begun = COLUMNS[column], time.perf_counter()
    o, dls = WORLDS[world], loaders(world, seed, args)
    set_seed(seed)
    model, l2 = network(dls).to(dls.device), o['l2']
    kept = torch.load(Path(args.folder)/f'start-{world}-{seed}.pt') if column in FOUND else {}
    if kept: model.load_state_dict(kept['model'])
    if column == 'anew': fit_plain(dls, model, (), max(PRETRAINED//args.divide, 2), LR, l2)
    if column in ('frozen', 'inverse'): dls, model = stored_features(model, dls), model.head
    methods = methods_of(args.weight, l2, ANNEALED if column == 'erm' else 0)[name]()
    longer = name == 'irm' and column not in ('rand', 'erm')
    steps, look = max((o['irm'] if longer else o['then'])//args.divide, 2), Worst(max(50//args.divide, 1))
    half = precision_on(dls.device) == 'bf16' and column not in ('frozen', 'inverse')  # where the whole network is trained
    wd = dict(erm=2*l2, sd=l2).get(name, 0.)  # plain training's risk is a mean there, too; the others' are sums
    learn = Learner(dls, model, BCEWithLogitsLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.Adam), lr=LR, wd=wd,
                    cbs=[TakeDomain(), TrainOnly(), look, *([methods] if methods else []), *([BFloat16()] if half else [])])
    with learn.no_bar(), learn.no_logging(): learn.fit(steps)
    result = dict(column=column, method=name, seed=seed, weight=args.weight, bs=args.bs, steps=steps*args.divide, precision='bf16' if half else 'tf32' if torch.cuda.is_available() else 'fp32', curve=[[r[0]*args.divide, *r[1:]] for r in look.curve],
                  tests=list(dls.tests), seconds=round(time.perf_counter() - begun, 1), rounds=kept.get('rounds'), alone=kept.get('alone'),
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')
    write_whole(path, json.dumps(result) + '\n')
    return path.name


def names_of(column):
    "RFC's Fishr does not subtract the mean; where features are stored, and steps cheap, Fishr's own runs too. What has no weight before has no 'erm'."
    return [k for k in methods_of(1., 0.) if (k != 'fishr' or column in ('frozen', 'inverse')) and (k not in ('sd', 'erm') or column != 'erm')]


def begin():
    "One thread; on a card products of matrices have TF32's ten bits."
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if torch.cuda.is_available(): torch.set_float32_matmul_precision('high')


def write_tables(folder, results):
    "Curves, thinned out, and what the rounds of discovery answer."
    import pandas as pd
    order, curves, rounds = list(COLUMNS), [], []
    found = sorted((json.loads(f.read_text()) for f in Path(folder).rglob('*.json')), key=lambda o: (order.index(o['column']), o['method'], o['weight'], o['seed']))
    for o in found:
        every = 50 if o['steps'] < 1500 else 100 if o['steps'] < 4000 else 500
        kept = [r for r in o['curve'] if r[0] % every == 0 or r is o['curve'][-1]]
        curves += [dict(column=o['column'], method=o['method'], weight=o['weight'], bs=o['bs'] or 'all', seed=o['seed'], step=r[0], train=r[1], **dict(zip(o['tests'], r[2:]))) for r in kept]
    for f in sorted(Path(folder).rglob('start-*.pt')):
        _, world, seed = f.stem.split('-')
        o = torch.load(f)
        rounds.append(dict(world=world, seed=int(seed), round1=o['rounds'][0], round2=o['rounds'][1], **o['alone']))
    pd.DataFrame(curves).to_csv(Path(results)/'family-rich-features.csv', index=False)
    pd.DataFrame(rounds).to_csv(Path(results)/'family-rounds.csv', index=False)


def main():
    p = argparse.ArgumentParser()
    p.add_argument('folder'); p.add_argument('--digits', default='mnist'); p.add_argument('--csv'); p.add_argument('--columns', nargs='+', default=[*COLUMNS], choices=COLUMNS); p.add_argument('--weight', type=float, default=1e4)
    for k, v in dict(jobs=1, seeds=5, n=None, bs=None, divide=1).items(): p.add_argument(f'--{k}', type=int, default=v)
    args = p.parse_args()
    if args.csv: return write_tables(args.folder, args.csv)
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    seeds, lost = range(args.seeds), 0
    with ProcessPoolExecutor(args.jobs, get_context('spawn'), begin) as pool:
        starts = {w: [pool.submit(start, w, s, args) for s in seeds] for w in {COLUMNS[c] for c in args.columns if c in FOUND}}
        free = [pool.submit(on, c, m, s, args) for s in seeds for c in COLUMNS if c in args.columns and c not in FOUND for m in names_of(c)]
        for o in (o for each in starts.values() for o in each): o.result()
        free += [pool.submit(on, c, m, s, args) for s in seeds for c in FOUND if c in args.columns for m in names_of(c)]
        for o in as_completed(free):
            try: print(o.result(), flush=True)
            except Exception as e: lost += 1; print(f'{type(e).__name__}: {e}', flush=True)
    raise SystemExit(lost > 0)


if __name__ == '__main__': keep_memory(); main()
