"""Several processes by torchrun: equal to one, and started again when one is killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nablagfn.runs.runfolder import RunFolder
from tests.running import metrics, run, small, torchrun, train, weights


def test_two_processes_equal_one_with_both_batches(tiny_folder: Path, tmp_path: Path) -> None:
    """The same global batch: gradients, and so weights, agree to float32 rounding."""
    options = ["--config.training.num_epochs=1", "--config.model.unet_reg_scale=10"]
    one, two = tmp_path / "one", tmp_path / "two"
    both = ["--config.sampling.batch_size=8", "--config.training.batch_size=8"]
    single = run(train(*small(tiny_folder, one), *options, *both))
    assert single.returncode == 0, single.stderr
    double = run(torchrun(*small(tiny_folder, two), *options))
    assert double.returncode == 0, double.stderr
    assert 'processes": "2"' in (two / "colourfulness_seed0" / "versions.json").read_text()
    for a, b in zip(
        metrics(one / "colourfulness_seed0"), metrics(two / "colourfulness_seed0"), strict=True
    ):
        assert a.keys() == b.keys()
        for name in ("reward", "loss_forward", "loss_reverse", "grad_norm", "grad_norm_own"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    (alone,), (shared,) = (RunFolder(f / "colourfulness_seed0").diagnostics() for f in (one, two))
    assert shared["count"] == alone["count"]
    for name in ("loss_forward", "guess_sq", "value_gradient_snr"):
        first, second = ([v or 0.0 for v in row[name]] for row in (alone, shared))
        assert any(first)
        assert second == pytest.approx(first, rel=1e-3, abs=1e-6), name
    first, second = (weights(f / "colourfulness_seed0", 1) for f in (one, two))
    worst = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert worst < 2e-4  # one AdamW step of 1e-3; a sign flip of a tiny gradient is 2e-3


# Kills the process of rank VICTIM when it scores its fourth batch of samples, once.
MORTAL = """
import os, pathlib, signal
import torch

batches = 0


def colour(images, prompts, metadata):
    global batches
    batches += not torch.is_grad_enabled()
    killed = pathlib.Path(__file__).with_name("killed")
    if batches == 4 and os.environ["RANK"] == os.environ.get("VICTIM") and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return images.std(dim=1).mean(dim=(1, 2))
"""
SIX = [
    "--config.experiment.reward_fn=mortal:colour",
    "--config.training.num_epochs=6",
    "--config.logging.save_freq=2",
    "--config.evaluation.num_prompts=0",
    "--config.logging.sample_freq=0",
]


def six_updates(model: Path, folder: Path, *launcher: str, victim: str = "none") -> Path:
    """The run folder of two ranks whose reward is MORTAL."""
    (folder / "mortal.py").write_text(MORTAL)
    command = torchrun(*small(model, folder), *SIX)
    at = command.index("--standalone")
    command[at:at] = launcher
    restarts = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/many_gpus.md
    done = run(command, cwd=folder, env={**os.environ, **restarts, "VICTIM": victim})
    assert done.returncode == 0, done.stderr
    return folder / "mortal.colour_seed0"


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six updates of two ranks in one go."""
    return six_updates(tiny_folder, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.proof)])
def test_a_killed_rank_is_started_again_and_ends_as_if_undisturbed(
    rank: str, undisturbed: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """torchrun --max-restarts starts all ranks again; they go on from the newest checkpoint."""
    folder = six_updates(tiny_folder, tmp_path, "--max-restarts=1", victim=rank)
    assert (tmp_path / "killed").is_file()
    assert metrics(folder) == metrics(undisturbed)
    first, second = weights(folder, 6), weights(undisturbed, 6)
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert any(value.abs().sum() > 0 for name, value in first.items() if "lora_B" in name)
    old = folder / "checkpoints" / "update_000002"  # kept from before, and not written again
    assert old.stat().st_mtime < (tmp_path / "killed").stat().st_mtime


def test_a_killed_rank_without_restarts_ends_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    """The other rank does not wait for it for ever; the same command would go on."""
    with pytest.raises(AssertionError, match=r"SIGKILL|exitcode"):
        six_updates(tiny_folder, tmp_path, victim="1")
    done = [path.name for path in (tmp_path / "mortal.colour_seed0" / "checkpoints").iterdir()]
    assert "update_000002" in done
