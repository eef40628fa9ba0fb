"""`make demo`'s claims, with the shipped settings (half an hour: `make proofs-demo`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.proof
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_raises_reward_and_keeps_diversity_and_prior(seed: int, tmp_path: Path) -> None:
    """Reward +1 base standard deviation, >= 85 % of the diversity, <= 5 points of recognition."""
    command = [sys.executable, "-m", "nablagfn", "train", "--config=demo", f"--seed={seed}"]
    done = subprocess.run(
        [*command, f"--config.saving.output_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(
        (tmp_path / f"tiny-aesthetic_seed{seed}" / "evaluation.json").read_text(encoding="utf-8")
    )
    before, after = figures["before"], figures["after"]
    assert after["reward_mean"] - before["reward_mean"] >= before["reward_std"]
    assert after["diversity"] >= 0.85 * before["diversity"]
    assert after["recognised"] >= before["recognised"] - 0.05
