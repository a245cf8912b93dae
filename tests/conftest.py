import os, warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run side by side
os.environ.setdefault('LOKY_MAX_CPU_COUNT', '1')

import pytest
from fastai.torch_core import default_device

warnings.filterwarnings('ignore', category=FutureWarning)
default_device(False)  # tests compare numbers on the CPU; those for CUDA say so


@pytest.fixture(scope='session')
def digits():
    from dglit.data.mnist import load_digits
    return load_digits()
