"What the engine costs: a sweep of twenty runs against the same runs in a plain loop, and the memory of one run on MNIST."
import resource, statistics, subprocess, sys, tempfile, time

PEAK = '''
import resource
from dglit.experiments import Spec, run
r = run(Spec(methods='{}', epochs=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)
'''


def main():
    import torch
    from dglit.experiments.run import run
    from dglit.experiments.sweep import sweep
    from dglit.experiments.tables import specs_of
    from dglit.papers.rcl import RCL_TABLE2
    specs = specs_of(RCL_TABLE2, 20, ['erm'], digits='digits', epochs=3)
    run(specs[0])                                   # warm up
    def plain(folder):
        for s in specs: run(s)
    def engine(folder): sweep(specs, folder)
    ratios = []
    for i in range(3):
        seconds = {}
        for f in (plain, engine) if i % 2 else (engine, plain):
            with tempfile.TemporaryDirectory() as d:
                start = time.perf_counter(); f(d); seconds[f.__name__] = time.perf_counter() - start
        ratios.append(seconds['engine']/seconds['plain'])
        print(f"20 runs: {seconds['plain']:.1f} s in a loop, {seconds['engine']:.1f} s in a sweep", flush=True)
    print(f'a sweep takes {statistics.median(ratios):.3f} times as long (median of {len(ratios)})')
    for method in ('erm', 'rcl', 'jigsaw', 'reconstruction'):
        out = subprocess.run([sys.executable, '-c', PEAK.format(method)], capture_output=True, text=True, check=True).stdout
        print(f'{method}: {float(out):.2f} GiB at most')


if __name__ == '__main__': main()
