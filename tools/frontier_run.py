"""The runs of tools/frontier.py: what defines one, and what it reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from proofs_run import RECORD, safe_name

from nablagfn.evaluation.reached import LabelShares, Reached
from nablagfn.runs.runfolder import RunFolder

AGAINST = "against_target"  # in evaluation.json, of methods that have a prior
SHARES = (0.25, 0.5)  # of the target's gain, whose times are told
SHOWN = "background: yellow"  # what the target changes most
MEASURED = {"evaluation.num_prompts": 24, "evaluation.images_per_prompt": 8}
LAST = 20  # updates, whose mean cosine is told


@dataclass(frozen=True)
class Run:
    """One training of the queue. minutes: after which it ends; 0: its epochs end it."""

    table: str
    label: str
    recipe: str
    options: tuple[tuple[str, object], ...] = ()
    seed: int = 0
    minutes: float = 0.0

    @property
    def experiment(self) -> str:
        return safe_name(self.table, self.label)

    def folder(self, out: Path) -> RunFolder:
        return RunFolder(out / f"warmth_{self.experiment}_seed{self.seed}")

    def done(self, out: Path) -> bool:
        record = self.folder(out).read_json(RECORD)
        return record is not None and not record["diverged"] and self.measured(out) is not None

    def diverged(self, out: Path) -> bool:
        """Whether its numbers ceased to be finite; it is not tried again."""
        return bool((self.folder(out).read_json(RECORD) or {}).get("diverged"))

    def measured(self, out: Path) -> dict[str, Any] | None:
        """evaluation.json, once the finetuned model is in it."""
        found: dict[str, Any] = self.folder(out).read_json("evaluation.json") or {}
        return found if "after" in found else None

    def arguments(self, out: Path) -> list[str]:
        options = {
            "logging.sample_freq": 0,
            "logging.num_samples": 48,
            "logging.tensorboard": False,
            **MEASURED,
            **dict(self.options),
            "training.max_minutes": self.minutes,
            "saving.output_dir": out,
        }
        settings = (f"--config.{key}={value}" for key, value in options.items())
        name = f"--exp_name={self.experiment}"
        return ["train", f"--config={self.recipe}", f"--seed={self.seed}", name, *settings]


@dataclass(frozen=True)
class Study:
    """The runs and the folder that they lie in. ours, published: labels of methods whose times are
    compared."""

    runs: Sequence[Run]
    out: Path
    beta: float
    minutes: float
    ours: str
    published: str

    def rows(self, table: str) -> list[tuple[Run, Outcome | None]]:
        """The runs of one table, and what became of those that ended."""
        aim = self.aim
        return [
            (run, outcome(run, self.out, aim) if run.done(self.out) else None)
            for run in self.runs
            if run.table == table
        ]

    @property
    def aim(self) -> Reached | None:
        """The target that a run with a prior was measured beside: it is that of the others, too,
        whose pretrained pictures are the same."""
        measured = (run.measured(self.out) or {} for run in self.runs if run.done(self.out))
        told = (Reached.read(found[AGAINST]) for found in measured if AGAINST in found)
        return next((found for found in told if found.target_reward is not None), None)


@dataclass(frozen=True)
class Outcome:
    """What a run reached. before: the pretrained model's reward on the same seeds. times: seconds
    of training until each of SHARES of the target's gain, by its probes; None where it did not get
    there. curve: (seconds, share of the target's gain, path KL) of its probes. cosine: of what was
    learned last with what it was to be."""

    run: Run
    before: float
    reward: float
    path_kl: float
    diversity: float
    recognised: float
    beside: Reached
    minutes: float
    updates: int
    cosine: float
    times: tuple[float | None, ...]
    curve: tuple[tuple[float, float, float], ...]

    @property
    def shown(self) -> LabelShares:
        return self.beside.shares[SHOWN]

    @property
    def gain(self) -> float:
        """Of the target's, which is known for every run of this study."""
        assert self.beside.gain_reached is not None
        return self.beside.gain_reached


def outcome(run: Run, out: Path, aim: Reached | None) -> Outcome | None:
    """What the run reached beside its own target, or beside `aim`; None where it has neither."""
    measured = run.measured(out)
    assert measured is not None
    before, after = measured["before"], measured["after"]
    beside = Reached.read(measured[AGAINST]) if AGAINST in measured else aim
    if beside is None:
        return None
    assert beside.target_reward is not None
    wanted = beside.target_reward - before["reward_mean"]
    if AGAINST not in measured:
        share = (after["reward_mean"] - before["reward_mean"]) / wanted
        beside = replace(beside, gain_reached=share, least_kl=None, efficiency=None, shares={})
    rows = run.folder(out).metrics()
    curve = [
        (row["seconds"], row["probe_gain"] / wanted, row["probe_path_kl"])
        for row in rows
        if "probe_gain" in row
    ]
    return Outcome(
        run,
        before["reward_mean"],
        after["reward_mean"],
        after["path_kl"],
        after["diversity"],
        after["recognised"],
        beside,
        rows[-1]["seconds"] / 60,
        rows[-1]["update"],
        float(np.mean([row.get("cosine", np.nan) for row in rows[-LAST:]])),
        tuple(reached_at(curve, share) for share in SHARES),
        tuple(curve),
    )


def reached_at(curve: Sequence[tuple[float, float, float]], wanted: float) -> float | None:
    """Seconds until so large a share of the gain, on straight lines from one probe to the next;
    None where no probe has it."""
    before = (0.0, 0.0)
    for seconds, found, _ in curve:
        if found >= wanted:
            share = (wanted - before[1]) / (found - before[1])
            return before[0] + share * (seconds - before[0])
        before = (seconds, found)
    return None
