import warnings

import pytest

warnings.filterwarnings('ignore', category=FutureWarning)


@pytest.fixture(scope='session')
def digits():
    from dglit.data.mnist import load_digits
    return load_digits()
