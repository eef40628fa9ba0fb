"""Whole runs by the command line: killed and resumed, by torchrun with NCCL, sharded by FSDP2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.running import LAUNCHER, ROOT, metrics, run, small, torchrun, train, weights
from tests.running import wait_for_updates as wait

UPDATES = 10
OPTIONS = (f"--config.training.num_epochs={UPDATES}", "--config.logging.save_freq=1")
SMOOTH = (  # or a rounding error becomes the sign of an update
    "--config.training.mixed_precision=no",
    "--config.training.allow_tf32=False",
    "--config.training.adam_epsilon=1.0",
    "--config.training.lr=0.1",
    "--config.training.flow_lr=0.1",
    "--config.training.max_grad_norm=1e6",
)


def test_killed_and_resumed_is_the_same_run(
    device: torch.device, tiny_folder: Path, tmp_path: Path
) -> None:
    """By SIGKILL after its second update. On a GPU sums have no fixed order: up to rounding."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(train(*small(tiny_folder, whole), *OPTIONS, *SMOOTH))
    assert done.returncode == 0, done.stderr
    folder = parts / "colourfulness_seed0"
    process = subprocess.Popen(
        train(*small(tiny_folder, parts), *OPTIONS, *SMOOTH),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait(folder, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # and not at its end
    done = run(train(*small(tiny_folder, parts), *OPTIONS, *SMOOTH))
    assert done.returncode == 0, done.stderr
    expected, found = metrics(whole / "colourfulness_seed0"), metrics(folder)
    assert [row["update"] for row in found] == list(range(1, UPDATES + 1))
    for a, b in zip(expected, found, strict=True):
        assert b["reward"] == pytest.approx(a["reward"], rel=1e-3)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    first, second = (weights(f / "colourfulness_seed0", UPDATES) for f in (whole, parts))
    assert first.keys() == second.keys()


def test_one_process_of_torchrun(device: torch.device, tiny_folder: Path, tmp_path: Path) -> None:
    """NCCL on a GPU, gloo on a CPU: the same run as without a launcher."""
    alone, launched = tmp_path / "alone", tmp_path / "launched"
    done = run(train(*small(tiny_folder, alone), "--config.training.num_epochs=1", *SMOOTH))
    assert done.returncode == 0, done.stderr
    command = torchrun(
        *small(tiny_folder, launched), "--config.training.num_epochs=1", *SMOOTH, processes=1
    )
    done = run(command)
    assert done.returncode == 0, done.stderr
    (a,), (b,) = (metrics(f / "colourfulness_seed0") for f in (alone, launched))
    for name in ("reward", "loss_forward", "grad_norm"):
        assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_a_target_and_a_certificate(
    device: torch.device, tiny_folder: Path, tmp_path: Path
) -> None:
    """`target`, `evaluate --resample` and `sample --resample` of a run: figures, and a picture."""
    done = run(train(*small(tiny_folder, tmp_path), "--config.training.num_epochs=1"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "colourfulness_seed0"
    for options in (
        ("target", "--images-per-prompt=8", "--num-prompts=2"),
        ("evaluate", "--images-per-prompt=8", "--num-prompts=2", "--resample=2"),
        ("sample", "--resample=2", "--prompts", "cat", "--seeds", "0", "1"),
    ):
        command = [sys.executable, "-m", "nablagfn", options[0], str(folder), *options[1:]]
        done = run(command)
        assert done.returncode == 0, done.stderr
    stated = json.loads((folder / "target" / "target.json").read_text(encoding="utf-8"))
    kl = [point["kl"]["value"] for point in stated["frontier"]]
    assert kl == sorted(kl) and kl[-1] > 0.5
    evaluated = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["evaluated"]
    last = evaluated["models"][-1]
    assert last["certificate"]["figures"]["path_kl"]["value"] > 0
    assert 0 < last["resampled"]["figures"]["distinct"]["value"] <= 1
    assert list((folder / "samples").glob("*_resampled2.png"))


def test_shards_of_one_process(device: torch.device, tiny_folder: Path, tmp_path: Path) -> None:
    """FSDP2 with a mesh of one: gathering and giving back change nothing."""
    command = [*LAUNCHER, "--nproc_per_node=1", "tests/gpu/shard_alone.py"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = run([*command, str(tiny_folder), str(tmp_path)], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["sharded parts"] > 0 and found["device"] == device.type
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    assert found["loss"] == pytest.approx(found["whole loss"], rel=1e-4)
    assert found["worst"] < 2e-3 * found["moved"]
