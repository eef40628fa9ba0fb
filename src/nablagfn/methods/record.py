"""What is true of a method stands in its record. Needs no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import Config

if TYPE_CHECKING:
    from ..core.types import Objective
    from .parts import Parts


@dataclass(frozen=True)
class Alive:
    """How many U-Net graphs of one row are alive at once, which decides the memory of an update.

    with_reward: while a reward is differentiated through them; None where none is. alone: when
    none is. kept: the first are not freed on the way back, because the loss needs them.
    """

    with_reward: int | None
    alone: int
    kept: bool = False


@dataclass(frozen=True)
class Aim:
    """What a run's samples should be drawn from: p_pretrained·exp(βr). beta: None where they
    should not, for the reason `why`."""

    beta: float | None
    why: str = ""


def never(config: Config) -> bool:
    return False


def even(config: Config) -> str:
    return ""


@dataclass(frozen=True)
class Method:
    """A method and all that other parts need to know of it.

    build: from `Parts` to the objective, or "module:function", imported when it is first used.
    has_prior: it holds on to the pretrained model, so that β changes its result. alive: its graphs.
    learns_flow: whether g_φ is built. guesses: it scores predicted clean samples, for which
    `model.guess_decoder` may stand in. slopes: whether it takes the gradient of that score, which
    `method.guess` says how. uneven: why processes would make different numbers of
    passes, so that the model cannot be sharded over them; empty where they make the same. sources:
    what `training.source` may be. sweeps: whether v̂ of all of an update's transitions is known at
    once, for `method.clip_quantile`. mirrors: whether v̂ may be taken at the mirror image of a
    step's end, for `method.mirror`. carries: whether it aims along `pool.gradient`. ode: whether it
    draws paths without noise (η = 0), which have no density: no path KL and no target.
    """

    name: str
    build: str | Callable[[Parts], Objective]
    has_prior: bool
    alive: Callable[[Config], Alive]
    learns_flow: Callable[[Config], bool] = never
    guesses: bool = False
    slopes: Callable[[Config], bool] = never
    uneven: Callable[[Config], str] = even
    sources: tuple[str, ...] = ("paths",)
    sweeps: Callable[[Config], bool] = never
    mirrors: Callable[[Config], bool] = never
    carries: bool = False
    ode: bool = False

    def objective(self, parts: Parts) -> Objective:
        """What trains by this method."""
        if not isinstance(self.build, str):
            return self.build(parts)
        module, _, name = self.build.partition(":")
        builder: Any = getattr(importlib.import_module(module), name)
        return builder(parts)
