"Everything a notebook needs: `from dglit.all import *`."
from fastai.callback.progress import ProgressCallback  # so that learn.no_bar() is there

from dglit.core import DataError, DglitError, set_seed
from dglit.data.background_mnist import *
from dglit.data.celeba import celeba
from dglit.data.colored_mnist import *
from dglit.data.compose import photo_digits
from dglit.data.image_groups import group_table, image_groups
from dglit.data.imagenet9 import background_gap, imagenet9
from dglit.data.leave_one_out import pacs, vlcs
from dglit.data.loaders import *
from dglit.data.mnist import *
from dglit.data.mnist_mp import *
from dglit.data.more_colored_mnist import *
from dglit.data.rotated_mnist import *
from dglit.data.photo_loader import PhotoLoader, PhotoLoaders
from dglit.data.structural_equations import *
from dglit.data.two_clues import *
from dglit.data.unit_tests import *
from dglit.data.waterbirds import waterbirds
from dglit.experiments.causal import *
from dglit.experiments.latent import *
from dglit.experiments.new_images import *
from dglit.experiments.record import *
from dglit.experiments.registry import *
from dglit.experiments.run import *
from dglit.experiments.search import *
from dglit.experiments.spec import *
from dglit.experiments.sweep import *
from dglit.experiments.tables import *
from dglit.learner.augmented import *
from dglit.learner.averaging import *
from dglit.learner.groups import *
from dglit.learner.learner import *
from dglit.learner.measuring import *
from dglit.learner.precision import *
from dglit.learner.rich_features import *
from dglit.learner.saving import *
from dglit.learner.selection import *
from dglit.learner.test_time import *
from dglit.learner.tracking import *
from dglit.losses.balance import *
from dglit.losses.birm import *
from dglit.losses.bottleneck import *
from dglit.losses.decov import *
from dglit.losses.domains import *
from dglit.losses.feature_statistics import *
from dglit.losses.head_gradients import *
from dglit.losses.irm import *
from dglit.losses.ms_ssim import *
from dglit.losses.orthogonality import *
from dglit.losses.rcl import *
from dglit.losses.triplets import *
from dglit.methods.alignment import *
from dglit.methods.bottleneck import *
from dglit.methods.cim import *
from dglit.methods.core import *
from dglit.methods.decov import *
from dglit.methods.domains import *
from dglit.methods.dropout import *
from dglit.methods.edges import *
from dglit.methods.head_gradients import *
from dglit.methods.hooks import *
from dglit.methods.irm import *
from dglit.methods.jigsaw import *
from dglit.methods.mixstyle import *
from dglit.methods.mixup import *
from dglit.methods.nets import *
from dglit.methods.orthogonality import *
from dglit.methods.pair import *
from dglit.methods.parts import *
from dglit.methods.rcl import *
from dglit.methods.reconstruction import *
from dglit.methods.rsc import *
from dglit.methods.sam import *
from dglit.methods.scl import *
from dglit.methods.spectral_decoupling import *
from dglit.methods.terms import *
from dglit.methods.vib import *
from dglit.models.backbone import *
from dglit.models.convnet import *
from dglit.models.mlp import *
from dglit.models.transformation import *
from dglit.papers import SEARCHES, TABLES
from dglit.papers.cim import CIM_BACKGROUND_MNIST, CIM_SEARCH, CIM_TEN_CLASSES, CIM_TEN_SEARCH
from dglit.papers.irm import IRM_COLORED_MNIST, IRM_RISKS, IRM_SEARCH
from dglit.papers.rcl import RCL_OPEN_POINTS, RCL_TABLE2
from dglit.style import *
