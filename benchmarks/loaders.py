"""Images per second: `DomainLoaders` against fastai's `DataBlock` and a PyTorch `DataLoader` with two workers, on the same
coloured digits, in turn. Prints medians and ratios of one run; quote the ratios. Usage: python benchmarks/loaders.py [digits]"""
import os, statistics, sys, time

import torch
from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, PILImage
from torch.utils.data import DataLoader, Dataset

from dglit.data.mnist import load_digits, load_mnist
from dglit.data.mnist_mp import MP_COLORS, mnist_mp

BS, ROUNDS, SECONDS = 128, 5, 4.


class PerItem(Dataset):
    "Colours a digit when it is asked for."
    def __init__(self, x, y): self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
    def __len__(self): return len(self.y)
    def __getitem__(self, i):
        image = torch.zeros(3, 32, 32)
        image[:, 2:-2, 2:-2] = self.x[i].float()/255*MP_COLORS[self.y[i]][:, None, None]
        return image*2 - 1, self.y[i]


def rss(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')


def rate(batches):
    "Images per second over about SECONDS; the first batch, and what starting takes, is not counted."
    it = iter(batches)
    next(it)
    n, start = 0, time.perf_counter()
    for x, *_ in it:
        n += len(x)
        if time.perf_counter() - start > SECONDS: break
    return n/(time.perf_counter() - start)


def main():
    digits = (load_digits if 'digits' in sys.argv else load_mnist)()
    before = rss()
    dls = mnist_mp(digits, bs=BS, device='cpu')
    tensors = sum(t.numel()*t.element_size() for dl in dls.loaders for t in dl.dataset.tensors)
    print(f'memory: tensors {tensors/2**20:.0f} MiB, process grew by {(rss() - before)/tensors:.2f} times that')

    images, y = dls.train.dataset.tensors
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: PILImage.create(pixels[i]), get_y=lambda i: int(y[i]), splitter=lambda o: (list(o), list(o[:1])))
    loaders = {'dglit DomainLoaders': dls.train,
               'fastai DataBlock, 2 workers': block.dataloaders(list(range(len(y))), bs=BS, num_workers=2).train,
               'torch DataLoader, 2 workers': DataLoader(PerItem(digits.x_train, digits.y_train), BS, shuffle=True, num_workers=2)}
    rates = {k: [] for k in loaders}
    for _ in range(ROUNDS):
        for k, dl in loaders.items(): rates[k].append(rate(dl))
    ours = rates['dglit DomainLoaders']
    for k, r in rates.items(): print(f'{k:30} {statistics.median(r):10,.0f} images/s   ours/this: {statistics.median(a/b for a, b in zip(ours, r)):.1f}')


if __name__ == '__main__': main()
