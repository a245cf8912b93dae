"""Kill a small sweep many times, at random moments, and count what is lost, repeated or left over.

    python benchmarks/kills.py [--kills 100] [--minutes 60] [--seed 0]

A trial is a sweep of eight short runs, two at a time. It is killed (its whole group, its parent, or one worker, in turn),
started again, and so on until it ends by itself; then the next trial begins, with an empty folder.
"""
import argparse, os, random, signal, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path

RUNS = 8
PROGRAM = f'''
import os, sys
from dataclasses import replace
from dglit.experiments.spec import Spec
from dglit.experiments.sweep import sweep
tiny = Spec(model='mlp', digits='digits', size=28, hidden=[8], epochs=3, bs=256, precision='fp32')
def finished(r, *_): os.write(1, f'{{r.spec.seed}} {{r.status}}\\n'.encode())
sweep([replace(tiny, seed=i) for i in range({RUNS})], sys.argv[1], jobs=2, finished=finished, say=lambda s: None)
'''


def alive(group):
    "Processes of a group, without those that are dead and not yet collected."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: state, _, its_group = (p/'stat').read_text().rpartition(')')[2].split()[:3]
        except OSError: continue
        if its_group == str(group) and state not in 'ZX': found.append(int(p.name))
    return found


def whole(folder):
    "The records there are: name -> text; those that cannot be read count as lost."
    from dglit.experiments.record import read_runs
    for o in folder.glob('*.json'): read_runs(o)
    return {o.name: o.read_text() for o in folder.glob('*.json')}


def done(folder): return sum('"status": "done"' in o for o in whole(folder).values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=100); parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng, count, end = random.Random(args.seed), Counter(), time.time() + 60*args.minutes
    kinds = ['group', 'parent', 'worker']
    while count['kills'] < args.kills and time.time() < end:
        count['trials'] += 1
        with tempfile.TemporaryDirectory() as d:
            folder, kept = Path(d)/'runs', {}
            while True:
                p = subprocess.Popen([sys.executable, '-c', PROGRAM, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                     start_new_session=True)
                if count['kills'] < args.kills and time.time() < end:
                    while p.poll() is None and not list(folder.glob('.*.lock')): time.sleep(.01)  # until the first run begins
                    time.sleep(rng.uniform(0, 4))
                    kind = kinds[count['kills'] % 3]
                    workers = [o for o in alive(p.pid) if o != p.pid]
                    if p.poll() is None and (kind != 'worker' or workers):
                        if kind == 'group': os.killpg(p.pid, signal.SIGKILL)
                        else: os.kill(p.pid if kind == 'parent' else rng.choice(workers), signal.SIGKILL)
                        count['kills'] += 1; count[kind] += 1
                told = [o.split() for o in p.communicate()[0].decode().splitlines()]
                limit = time.time() + 10
                while alive(p.pid) and time.time() < limit: time.sleep(.05)
                count['processes left'] += len(alive(p.pid))
                for o in alive(p.pid): os.kill(o, signal.SIGKILL)
                now = whole(folder)
                count['lost'] += sum(now.get(k) != v for k, v in kept.items() if '"status": "done"' in v)
                names = {int(k.split('-seed')[1].split('-')[0]) for k, v in kept.items() if '"status": "done"' in v}
                count['repeated'] += sum(int(seed) in names for seed, _ in told)
                count['failed and tried again'] += sum(status == 'failed' for _, status in told)
                count['lost'] += sum(status == 'done' and f'-seed{seed}-' not in ' '.join(now) for seed, status in told)
                kept = now
                if p.returncode == 0 and done(folder) == RUNS: break
            count['files left'] += sum(1 for _ in folder.glob('.*'))
        print(f"{count['trials']} sweeps, {count['kills']} kills ({', '.join(f'{k} {count[k]}' for k in kinds)}): lost {count['lost']}, "
              f"repeated {count['repeated']}, processes left {count['processes left']}, files left {count['files left']}; "
              f"{count['failed and tried again']} runs failed with their worker and ran again", flush=True)


if __name__ == '__main__': main()
