"""Whole runs through the command line: original commands, kill and resume."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.running import (
    NUMBERS,
    ROOT,
    metrics,
    run,
    small,
    torchrun,
    train,
    wait_for_updates,
    weights,
)


def test_five_updates_then_sigkill_then_five_more_equal_ten(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit on CPU: LoRA, flow network and metrics."""
    options = ["--config.training.num_epochs=10", "--config.logging.save_freq=5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(train(*small(tiny_folder, whole), *options))
    assert done.returncode == 0, done.stderr
    command = train(*small(tiny_folder, cut), *options)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = cut / "colourfulness_seed0"
    wait_for_updates(folder, 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.name for p in (folder / "checkpoints").glob("update_*")] == ["update_000005"]
    again = run(command)
    assert again.returncode == 0, again.stderr
    reference = whole / "colourfulness_seed0"
    assert metrics(folder) == metrics(reference)
    first, second = weights(folder, 10), weights(reference, 10)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.abs().sum() > 0 for name, value in first.items() if "lora_B" in name)


def test_sigterm_saves_and_the_same_command_continues(tiny_folder: Path, tmp_path: Path) -> None:
    options = [*small(tiny_folder, tmp_path), "--config.training.num_epochs=100"]
    folder = tmp_path / "colourfulness_seed0"
    process = subprocess.Popen(
        train(*options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_updates(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    (checkpoint,) = (folder / "checkpoints").glob("update_*")
    stopped = len(metrics(folder))
    assert checkpoint.name == f"update_{stopped:06d}"


ORIGINAL = {
    "default": (
        0,
        "--config=config/aesthetic.py --seed=0 --config.model.reward_scale=1e4 "
        "--config.sampling.low_var_subsampling=True --config.model.unet_reg_scale=2e3 "
        "--exp_name=default",
    ),
    "fast": (
        0,
        "--config=config/aesthetic.py --seed=0 --config.model.reward_scale=1e4 "
        "--config.model.unet_reg_scale=2e3 --config.sampling.low_var_subsampling=True "
        "--config.model.timestep_fraction=0.1 --config.training.gradient_accumulation_steps=1 "
        "--config.sampling.batch_size=4 --config.sampling.num_batches_per_epoch=1 "
        "--config.training.num_epochs=400 --exp_name=fast",
    ),
    "fewer_gpus": (
        2,
        "--config=config/aesthetic.py --seed=0 --config.model.reward_scale=1e4 "
        "--config.model.unet_reg_scale=2e3 --config.sampling.low_var_subsampling=True "
        "--config.model.timestep_fraction=0.1 --config.training.gradient_accumulation_steps=4 "
        "--config.sampling.batch_size=4 --config.sampling.num_batches_per_epoch=4 "
        "--config.training.num_epochs=400 --exp_name=fewer_gpus",
    ),
    "fewer_gpus_no_flow_correction": (
        2,
        "--config=config/aesthetic.py --seed=0 --config.model.reward_scale=1e4 "
        "--config.model.unet_reg_scale=2e3 --config.sampling.low_var_subsampling=True "
        "--config.model.timestep_fraction=0.1 --config.training.gradient_accumulation_steps=4 "
        "--config.sampling.batch_size=4 --config.sampling.num_batches_per_epoch=4 "
        "--config.training.num_epochs=400 --config.model.no_flow=True "
        "--exp_name=fewer_gpus_no_flow_correction",
    ),
}


def tiny_numbers(out: Path) -> list[str]:
    return [
        "--config.pretrained.model=tiny-animals",
        "--config.experiment.reward_fn=tiny-aesthetic",
        "--config.training.num_epochs=1",
        "--config.sampling.batch_size=4",
        "--config.sampling.num_batches_per_epoch=1",
        "--config.training.gradient_accumulation_steps=1",
        f"--config.saving.output_dir={out}",
        *NUMBERS,
    ]


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_command(name: str, tmp_path: Path) -> None:
    """As in the original README, with tiny-animals and small numbers appended."""
    processes, line = ORIGINAL[name]
    options = [*line.split(), *tiny_numbers(tmp_path)]
    done = run(torchrun(*options, processes=processes) if processes else train(*options))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / f"tiny-aesthetic_{name}_seed0"
    (row,) = metrics(folder)
    assert ("loss_reverse" in row) == ("no_flow" not in name)
    assert row["loss_forward"] > 0
    assert (folder / "report.html").is_file()
    assert (folder / "checkpoints" / "update_000001" / "pytorch_lora_weights.safetensors").is_file()


def test_dpm_solver_then_sample(tmp_path: Path) -> None:
    options = [
        "--config=config/aesthetic.py",
        "--config.sampling.scheduler=DPM-solver",
        "--config.model.timestep_fraction=0.4",
        *tiny_numbers(tmp_path),
    ]
    done = run(train(*options))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny-aesthetic_seed0"
    out = tmp_path / "pictures.png"
    command = [sys.executable, "-m", "nablagfn", "sample", str(folder), "--prompts", "a cat", "dog"]
    drawn = run([*command, "--seeds", "3", "4", "5", "--out", str(out)])
    assert drawn.returncode == 0, drawn.stderr
    from PIL import Image

    assert Image.open(out).size == (3 * 66 - 2, 4 * 66 - 2)


BAD = {
    "--config.model.reward_scal=1": "did you mean config.model.reward_scale",
    "--config.model.lora_rank=many": "config.model.lora_rank",
    "--config.experiment.reward_fn=aestetic": "did you mean aesthetic",
    "--config.experiment.prompt_fn=simple_animal": "did you mean simple_animals",
    "--config.pretrained.model=./nowhere": "no such folder",
    "--config.training.batch_size=3": "must divide",
    "--config.logging.wandb_key=abc": "WANDB_API_KEY",
    "--config.model.flow_channel_width=(8,8,8,8,8,8)": "too many",
    "--resume=must": "there is no run",
}


@pytest.mark.parametrize("option", BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    option: str, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    done = run(train(*small(tiny_folder, out), option))
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert BAD[option] in done.stderr
    assert not out.exists()


def test_missing_weights_are_named_before_anything_is_written(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(
        train("--config=config/aesthetic.py", f"--config.saving.output_dir={tmp_path / 'runs'}"),
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "runwayml/stable-diffusion-v1-5" in done.stderr
    assert "tiny-animals" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    """As printed, with one epoch instead of five."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.M | re.S)
    assert "num_epochs = 5" in code and len(code.strip().splitlines()) <= 10
    code = code.replace("num_epochs = 5", "num_epochs = 1")
    done = run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "colourfulness_seed0"
    assert json.loads((folder / "config.json").read_text())["pretrained"]["model"] == "tiny-animals"
    assert (folder / "report.html").is_file()


def test_the_fourth_command_is_in_the_readme_as_tested() -> None:
    """All four, word for word."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(torchrun.*?)^```", readme, flags=re.M | re.S)
    shown = [block.replace("\\\n", " ").split("train_nablagfn.py")[1].split() for block in blocks]
    assert shown == [line.split() for _, line in ORIGINAL.values()]
