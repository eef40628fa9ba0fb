"""The guard: watches the measured figures of a run, and stops or calms it before the model is
ruined. It remembers the best checkpoint: of those within every budget, the one with the highest
watched reward (the first held-out reward where there is one, else the trained reward).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import GuardSettings
from ..runs.runfolder import checkpoint_name

LOWERINGS = 3  # of β in a row; if the run is still beyond a budget then, it is stopped


@dataclass(frozen=True)
class Probe:
    """What a measurement of fixed-seed samples tells the guard.

    reward, diversity, path_kl: of the finetuned model; path_kl is None where paths have no noise.
    held_out: mean held-out rewards by name.
    base_*: of the pretrained model on the same seeds (rewards: standard deviations).
    """

    reward: float
    diversity: float
    path_kl: float | None
    base_diversity: float
    held_out: Mapping[str, float] = field(default_factory=dict)
    base_held_out_std: Mapping[str, float] = field(default_factory=dict)

    @property
    def diversity_kept(self) -> float:
        """Share of the pretrained model's diversity."""
        return self.diversity / max(self.base_diversity, 1e-12)

    @property
    def watched(self) -> float:
        """The reward by which checkpoints are compared."""
        return next(iter(self.held_out.values()), self.reward)


@dataclass
class GuardState:
    """What a run has to remember; all of it is JSON.

    over: measurements in a row beyond a budget. lowered: times β was lowered since the last one
    within. factor: what β is multiplied by. highest: best held-out rewards so far.
    """

    over: int = 0
    lowered: int = 0
    factor: float = 1.0
    stopped: bool = False
    best: dict[str, Any] | None = None
    highest: dict[str, float] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def broken_budgets(
    settings: GuardSettings, probe: Probe, highest: Mapping[str, float]
) -> list[str]:
    """Which budgets the figures exceed, in words; highest: best held-out rewards so far."""
    found = []
    if probe.diversity_kept < settings.min_diversity:
        found.append(
            f"diversity {probe.diversity_kept:.0%} of the pretrained model's, below "
            f"guard.min_diversity={settings.min_diversity:g}"
        )
    if settings.max_path_kl and probe.path_kl is not None and probe.path_kl > settings.max_path_kl:
        found.append(
            f"path KL {probe.path_kl:.3g} nats, above guard.max_path_kl={settings.max_path_kl:g}"
        )
    for name, value in probe.held_out.items():
        drop = (highest.get(name, value) - value) / max(probe.base_held_out_std[name], 1e-12)
        if settings.max_held_out_drop and drop > settings.max_held_out_drop:
            found.append(
                f"{name} {drop:.2f} base standard deviations below its best, more than "
                f"guard.max_held_out_drop={settings.max_held_out_drop:g}"
            )
    return found


class Guard:
    """Judges each measurement by `guard.…`; the same on every process, as figures are shared."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.state = GuardState(settings=settings.model_dump())

    @property
    def best_checkpoint(self) -> str | None:
        """The folder name of the best checkpoint so far."""
        return None if self.state.best is None else str(self.state.best["checkpoint"])

    @property
    def factor(self) -> float:
        """What β is multiplied by."""
        return self.state.factor

    def judge(self, update: int, probe: Probe) -> str:
        """Take a measurement after `update` updates into account; what was done, in words.

        Empty when nothing is to be said, and always while no budget is set.
        """
        if not self.settings.active:
            return ""
        state = self.state
        broken = broken_budgets(self.settings, probe, state.highest)
        for name, value in probe.held_out.items():
            state.highest[name] = max(value, state.highest.get(name, value))
        if not broken:
            state.over = state.lowered = 0
            self._compare(update, probe)
            return ""
        state.over += 1
        if state.over < self.settings.patience:
            return ""
        text = f"guard: {'; '.join(broken)}: {self._act()}"
        state.events.append({"update": update, "text": text})
        return text

    def _compare(self, update: int, probe: Probe) -> None:
        """Remember this model if it is the best so far; the earlier one of equals."""
        best = self.state.best
        if best is None or probe.watched > best["watched"]:
            self.state.best = {
                "checkpoint": checkpoint_name(update),
                "update": update,
                "watched": probe.watched,
                "figures": {
                    "reward": probe.reward,
                    "diversity_kept": probe.diversity_kept,
                    "path_kl": probe.path_kl,
                    **probe.held_out,
                },
            }

    def _act(self) -> str:
        """Stop, or lower β; in words."""
        state = self.state
        state.over = 0
        if self.settings.action == "lower-beta" and state.lowered < LOWERINGS:
            state.lowered += 1
            state.factor *= self.settings.beta_factor
            return f"β is lowered to {state.factor:g} of model.reward_scale"
        state.stopped = True
        kept = self.best_checkpoint
        return "stopped; " + (f"the best checkpoint is {kept}" if kept else "none was within them")

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint, and for RUN/guard.json."""
        return asdict(self.state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take a saved state; with other budgets than its own, a stopped run may go on."""
        self.state = GuardState(**saved)
        now = self.settings.model_dump()
        if self.state.settings != now:
            self.state.settings, self.state.stopped, self.state.over = now, False, 0
