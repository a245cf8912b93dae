"""How often a training step makes a graphics card's host wait, and how much it launches, counted on the tests' card in pure Python: no card is needed.
Writes nbs/results/card-waits.csv, by which tests/test_device.py measures each method; `before` is what was counted before the methods were looked at so.
Usage: python benchmarks/waits.py"""
import csv, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
from card import CARD, a_card
from test_device import LIST, METHODS, Watch, fit, learner


def main():
    lines = []
    for method in METHODS:
        with a_card() as card:
            watch = Watch(card)
            fit(learner(method, {}, CARD, [watch]))
        lines.append([method, LIST.get(method, {}).get('before', ''), f'{watch.waits:g}', f'{watch.launches:.0f}'])
        print(*lines[-1], flush=True)
    with open(Path(__file__).parent.parent/'nbs/results/card-waits.csv', 'w', newline='') as f:
        csv.writer(f, lineterminator='\n').writerows([['method', 'before', 'waits', 'launches'], *lines])


if __name__ == '__main__': main()
