"Building, measuring, selecting, saving, precision."
from .learner import domain_learner, evaluate
from .precision import BFloat16
from .saving import load_trained, save_trained
from .selection import select_epoch
from .tracking import TrackDomains, accuracy, is_right
