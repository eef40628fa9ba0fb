"""`nablagfn plan`: what a run takes in memory, and the settings with which it fits.

    peak = fixed + max over the moments of an update (rows × what a row holds then)

Fixed are weights, gradients, moments and the epoch's paths. What a row holds is counted on the meta
device for the run's own architecture (`parts`); which parts are alive together is `plan.ALIVE`.
"""

from .parts import Parts, measure, modules_of
from .plan import (
    CONTEXT,
    Plan,
    Setting,
    choose,
    free_memory,
    moments,
    parse_memory,
    plan,
    predict,
    setting_of,
)
from .work import Work, work_of

__all__ = [
    "CONTEXT",
    "Parts",
    "Plan",
    "Setting",
    "Work",
    "choose",
    "free_memory",
    "measure",
    "modules_of",
    "moments",
    "parse_memory",
    "plan",
    "predict",
    "setting_of",
    "work_of",
]
