"""`nablagfn plan`: what a run takes in memory and time, and the settings with which it fits.

    peak = fixed + max over the moments of an update (rows × what a row holds then)

Fixed are weights, gradients, moments and the epoch's paths. What a row holds is counted on the meta
device for the run's own architecture (`parts`); which parts are alive together stands in the
method's record.

    seconds = sum over the parts (passes of an update × seconds of a pass)

Passes are counted in a world (`work`); what one takes is timed here or given (`seconds`).
"""

from .parts import Costs, measure
from .plan import (
    CONTEXT,
    RunPlan,
    Setting,
    choose,
    free_memory,
    moments,
    parse_memory,
    plan,
    predict,
    setting_of,
)
from .seconds import Seconds, at_rate, matmul_rate, parse_rate, synchronise, timed, too_long
from .work import Passes, Work, measuring_passes, total, update_passes, work_of

__all__ = [
    "CONTEXT",
    "Costs",
    "Passes",
    "RunPlan",
    "Seconds",
    "Setting",
    "Work",
    "at_rate",
    "choose",
    "free_memory",
    "matmul_rate",
    "measure",
    "measuring_passes",
    "moments",
    "parse_memory",
    "parse_rate",
    "plan",
    "predict",
    "setting_of",
    "synchronise",
    "timed",
    "too_long",
    "total",
    "update_passes",
    "work_of",
]
