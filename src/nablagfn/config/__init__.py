"""Every option of a run: name, type, default, range and help text, in one place.

A file per group. The names are those of the original `config/*.py` files; the defaults are the
paper's (`docs/options.md` is generated from here).
"""

from .base import ConfigError, Group
from .config import Config
from .drawn import drawn_with
from .evaluation import Evaluation
from .experiment import Experiment
from .guard import GuardSettings
from .logs import Logging, Saving
from .method import MethodSettings
from .model import Attenuation, Model
from .options import describe, find_file, flatten, merge, set_option
from .pool import PoolSettings
from .pretrained import Pretrained
from .reward import RewardSettings
from .sampling import Sampling
from .speed import Speed
from .training import Training

__all__ = [
    "Attenuation",
    "Config",
    "ConfigError",
    "Evaluation",
    "Experiment",
    "Group",
    "GuardSettings",
    "Logging",
    "MethodSettings",
    "Model",
    "PoolSettings",
    "Pretrained",
    "RewardSettings",
    "Sampling",
    "Saving",
    "Speed",
    "Training",
    "describe",
    "drawn_with",
    "find_file",
    "flatten",
    "merge",
    "set_option",
]
