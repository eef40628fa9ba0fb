"""The claims of the recipes warmth (`make demo`), warmth_flow and demo (`make proofs-demo`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SEEDS = [0, 1, 2]


def figures(recipe: str, seed: int, out: Path) -> dict[str, Any]:
    """evaluation.json of a whole run."""
    command = [sys.executable, "-m", "nablagfn", "train", f"--config={recipe}", f"--seed={seed}"]
    done = subprocess.run(
        [*command, f"--config.saving.output_dir={out}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*/evaluation.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def shares_near_the_target(
    recipe: str, seed: int, out: Path, *, gain: float, efficiency: float
) -> dict[str, dict[str, float]]:
    """A whole run reaches so much of its target and keeps what that keeps: the shares of looks."""
    found = figures(recipe, seed, out)
    after, beside = found["after"], found["against_target"]
    assert beside["gain_reached"] >= gain
    assert beside["efficiency"] >= efficiency
    assert after["diversity"] == pytest.approx(beside["target_diversity"], rel=0.05)
    assert after["recognised"] >= beside["target_recognised"] - 0.03
    shares: dict[str, dict[str, float]] = beside["shares"]
    return shares


@pytest.mark.proof
@pytest.mark.parametrize("seed", SEEDS)
def test_warmth_moves_towards_its_target_and_keeps_what_that_keeps(
    seed: int, tmp_path: Path
) -> None:
    """Seven tenths of the target's gain at two thirds of the efficiency, the target's diversity to
    5 % and what is recognised of it to three points."""
    shares = shares_near_the_target("warmth", seed, tmp_path, gain=0.7, efficiency=0.66)
    for colour in ("red", "yellow"):  # more of it, and not more than the target has
        share = shares[f"background: {colour}"]
        assert share["before"] < share["after"] < share["target"]


@pytest.mark.proof
@pytest.mark.parametrize("seed", SEEDS)
def test_warmth_on_the_flow_model_moves_further(seed: int, tmp_path: Path) -> None:
    """More of the gain and of the efficiency, the same of what the target keeps; but red stands
    for a part of the yellow."""
    shares = shares_near_the_target("warmth_flow", seed, tmp_path, gain=0.8, efficiency=0.75)
    yellow = shares["background: yellow"]
    assert yellow["before"] < yellow["after"] < yellow["target"]


@pytest.mark.proof
@pytest.mark.parametrize("seed", SEEDS)
def test_the_demo_raises_reward_and_keeps_diversity_and_prior(seed: int, tmp_path: Path) -> None:
    """Reward +1 base standard deviation, >= 85 % of the diversity, <= 5 points of recognition."""
    found = figures("demo", seed, tmp_path)
    before, after = found["before"], found["after"]
    assert after["reward_mean"] - before["reward_mean"] >= before["reward_std"]
    assert after["diversity"] >= 0.85 * before["diversity"]
    assert after["recognised"] >= before["recognised"] - 0.05
