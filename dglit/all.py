"Everything a notebook needs: `from dglit.all import *`."
from fastai.callback.progress import ProgressCallback  # so that learn.no_bar() is there

from dglit.core import *
from dglit.data.loaders import *
from dglit.data.mnist import *
from dglit.data.mnist_mp import *
from dglit.experiments.latent import *
from dglit.experiments.run import *
from dglit.experiments.sweep import *
from dglit.experiments.tables import *
from dglit.learner import *
from dglit.losses.rcl import *
from dglit.methods.core import *
from dglit.methods.rcl import *
from dglit.models.convnet import *
