"""Images per second: `image_groups` against fastai's `ImageDataLoaders` with two workers, on the same files, both with a random resized
crop and a flip, in turn. Prints medians and ratios of one run; quote the ratios. The first epoch of `image_groups` decodes, and is said apart.
Usage: python benchmarks/images.py [FOLDER] [images]: a folder in Waterbirds' layout; without one, 500 photographs are made of two."""
import os, statistics, sys, tempfile, time
from pathlib import Path

import pandas as pd
from fastai.vision.all import ImageDataLoaders, RandomResizedCrop, aug_transforms
from PIL import Image
from sklearn.datasets import load_sample_images

from dglit.data.image_groups import image_groups

SIZE, BS, ROUNDS = 96, 32, 3


def rss(): return int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')


def made(folder, n):
    "`n` photographs of 250 by 250 pixels, cut from scikit-learn's two."
    rows = []
    for i in range(n):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        photo.crop((i % 350, i % 170, i % 350 + 250, i % 170 + 250)).save(folder/f'{i}.jpg', quality=90)
        rows.append((f'{i}.jpg', i % 2))
    pd.DataFrame(rows, columns=['img_filename', 'y']).to_csv(folder/'metadata.csv', index=False)


def epoch(dl):
    start, n = time.perf_counter(), 0
    for x, *_ in dl: n += len(x)
    return n/(time.perf_counter() - start)


def main(folder, n, tmp):
    if folder is None: made(folder := tmp, n)
    table = pd.read_csv(folder/'metadata.csv')[['img_filename', 'y']].sample(frac=1, random_state=0)[:n]
    table.to_csv(tmp/'some.csv', index=False)
    before, start = rss(), time.perf_counter()
    same = dict(file='img_filename', label='y', size=SIZE, bs=BS, device='cpu', augment=True, cache=tmp/'cache')
    dls = image_groups(folder, tmp/'some.csv', **same)
    print(f'{n} images of {SIZE} pixels: decoded once in {time.perf_counter() - start:.1f} s, {n/(time.perf_counter() - start):,.0f} images/s')
    fastai = ImageDataLoaders.from_df(table, folder, fn_col=0, label_col=1, bs=BS, num_workers=2, device='cpu',
                                      item_tfms=RandomResizedCrop(SIZE, min_scale=.7), batch_tfms=aug_transforms(max_rotate=0, max_zoom=1, max_lighting=0, max_warp=0))
    rates = {'dglit image_groups': (dls.train, []), 'the same, read from its files': (image_groups(folder, tmp/'some.csv', limit=0, **same).train, []), "fastai ImageDataLoaders, 2 workers": (fastai.train, [])}
    for _ in range(ROUNDS):
        for dl, r in rates.values(): r.append(epoch(dl))
    ours = rates['dglit image_groups'][1]
    for k, (_, r) in rates.items(): print(f'{k:36} {statistics.median(r):8,.0f} images/s   ours/this: {statistics.median(a/b for a, b in zip(ours, r)):.1f}')
    size = sum(dl.dataset.tensors[0].nbytes for dl in dls.loaders)
    print(f'memory: {size/2**20:.0f} MiB of bytes, process grew by {(rss() - before)/2**20:.0f} MiB with both')


if __name__ == '__main__':
    paths = [o for o in sys.argv[1:] if not o.isdigit()]
    with tempfile.TemporaryDirectory() as tmp: main(Path(paths[0]) if paths else None, int(next(filter(str.isdigit, sys.argv[1:]), 500)), Path(tmp))
