"Building, measuring, selecting, saving, precision."
from .diverged import StopAtNaN
from .learner import domain_learner
from .measuring import evaluate
from .precision import BFloat16, subnormals_as_zero, true_float32
from .saving import load_trained, save_trained
from .selection import RULES, parse_rule, select_epoch
from .tracking import Answers, TrackDomains, accuracy, answers_on, is_right
