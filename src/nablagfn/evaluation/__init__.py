"""Fixed-seed samples of a policy and what is measured of them: while it trains, before and after,
and by `nablagfn evaluate`."""

from .drawing import decoded, draw, draw_paths
from .figures import Measured, Measurement, figures, per_prompt, summarise, summary_of
from .samples import Evaluator, Sample
from .view import PictureView, thumbnails

__all__ = [
    "Evaluator",
    "Measured",
    "Measurement",
    "PictureView",
    "Sample",
    "decoded",
    "draw",
    "draw_paths",
    "figures",
    "per_prompt",
    "summarise",
    "summary_of",
    "thumbnails",
]
