"""Whole runs through the command line: original commands, kill and resume, two processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nablagfn.runfolder import RunFolder
from tests.tiny_pipeline import save_pipeline

ROOT = Path(__file__).parent.parent
ENTRY = str(ROOT / "train_nablagfn.py")
NUMBERS = [
    "--config.sampling.num_steps=10",
    "--config.model.flow_channel_width=(16,32)",
    "--config.evaluation.num_prompts=2",
    "--config.evaluation.images_per_prompt=2",
    "--config.logging.num_samples=4",
    "--config.logging.tensorboard=False",
]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


def run(command: list[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


def train(*options: str) -> list[str]:
    return [sys.executable, ENTRY, *options]


def torchrun(*options: str, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", ENTRY, *options]


def small(model: Path | str, out: Path) -> list[str]:
    return [
        f"--config.pretrained.model={model}",
        "--config.experiment.reward_fn=colourfulness",
        f"--config.saving.output_dir={out}",
        "--config.sampling.batch_size=4",
        "--config.sampling.num_batches_per_epoch=1",
        "--config.training.gradient_accumulation_steps=1",
        "--config.model.reward_scale=100",
        *NUMBERS,
    ]


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(folder: Path, update: int) -> dict[str, torch.Tensor]:
    where = folder / "checkpoints" / f"update_{update:06d}"
    parts = (load_file(where / f"{name}.safetensors") for name in ("policy", "objective"))
    return {name: value for part in parts for name, value in part.items()}


def wait_for_updates(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError("the run ended before it could be killed")


def test_five_updates_then_sigkill_then_five_more_equal_ten(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit on CPU: LoRA, flow network and metrics."""
    options = ["--config.training.num_epochs=10", "--config.logging.save_freq=5"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(train(*small(pipeline_folder, whole), *options))
    assert done.returncode == 0, done.stderr
    command = train(*small(pipeline_folder, cut), *options)
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


def test_sigterm_saves_and_the_same_command_continues(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    options = [*small(pipeline_folder, tmp_path), "--config.training.num_epochs=100"]
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


def test_two_processes_equal_one_with_both_batches(pipeline_folder: Path, tmp_path: Path) -> None:
    """The same global batch: gradients, and so weights, agree to float32 rounding."""
    options = ["--config.training.num_epochs=1", "--config.model.unet_reg_scale=10"]
    one, two = tmp_path / "one", tmp_path / "two"
    both = ["--config.sampling.batch_size=8", "--config.training.batch_size=8"]
    single = run(train(*small(pipeline_folder, one), *options, *both))
    assert single.returncode == 0, single.stderr
    double = run(torchrun(*small(pipeline_folder, two), *options))
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


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    found = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [
        int(pid) for pid in found if "train_nablagfn" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
@pytest.mark.proof  # on a fast machine the run may end before it is killed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again_and_ends_as_if_undisturbed(
    rank: int, undisturbed: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    """torchrun --max-restarts starts all ranks again; they go on from the newest checkpoint."""
    command = torchrun(*small(pipeline_folder, tmp_path), *SIX)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # docs/many_gpus.md
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "colourfulness_seed0"
    wait_for_updates(folder, 3, process)
    os.kill(workers(process.pid)[rank], signal.SIGKILL)
    assert process.wait(timeout=600) == 0
    assert metrics(folder) == metrics(undisturbed)
    first, second = weights(folder, 6), weights(undisturbed, 6)
    assert all(torch.equal(first[name], second[name]) for name in second)
    (old,) = (p for p in (folder / "checkpoints").iterdir() if p.name == "update_000002")
    assert old.stat().st_mtime < (folder / "versions.json").stat().st_mtime  # it did start again


SIX = ["--config.training.num_epochs=6", "--config.logging.save_freq=2"]


@pytest.fixture(scope="module")
def undisturbed(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six updates of two ranks in one go."""
    out = tmp_path_factory.mktemp("undisturbed")
    done = run(torchrun(*small(pipeline_folder, out), *SIX))
    assert done.returncode == 0, done.stderr
    return out / "colourfulness_seed0"


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
    option: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    done = run(train(*small(pipeline_folder, out), option))
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
