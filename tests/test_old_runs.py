"""What was made before the modules moved into folders still opens: names, configs, runs, LoRAs.

fixtures/old_runs was made by revision e0fb5f4 (version 0.1.0), as its two config.json say.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nablagfn.cli import main
from nablagfn.moved import MOVED, new_name
from nablagfn.recipes.options import load_config
from nablagfn.rewards import resolve
from nablagfn.runs.runfolder import RunFolder

OLD = Path(__file__).parent / "fixtures" / "old_runs"
PARTS = {  # modules of the old packages that have moved
    "configs": "aesthetic demo hpsv2 imagereward",
    "doctor": "compiled machine parts records",
    "estimators": "adjoint_matching guess nabla_db_lambda residual_db terminal_gradient",
    "export": "card export proof",
    "objectives": "dag_db ddpo draft draft_lv matching refl",
    "planner": "parts plan seconds work",
}
RUNS = {"tiny-aesthetic_seed0": 2, "worlds-ring_seed0": 3}  # updates


def test_every_old_module_is_the_new_one() -> None:
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        parts = [f"{name}.{part}" for name in PARTS for part in PARTS[name].split()]
        for old in (*MOVED, *parts):
            new = (new_name(f"nablagfn.{old}") or "").removeprefix("nablagfn.")
            known = importlib.import_module(f"nablagfn.{new}")
            spec = known.__spec__
            assert importlib.import_module(f"nablagfn.{old}") is known
            assert known.__spec__ is spec and spec is not None and spec.name == f"nablagfn.{new}"


def test_an_old_import_leaves_the_new_package_as_it_is() -> None:
    """Also where a function is called as its module is."""
    code = (
        "import nablagfn.export.export\n"
        "from nablagfn.commands.export import export\n"
        "import nablagfn.planner.plan\n"
        "from nablagfn.commands.planner import plan\n"
        "assert callable(export) and callable(plan)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_an_old_import_says_where_the_module_is_now() -> None:
    code = "from nablagfn.trainer import Trainer; from nablagfn.doctor.records import Finding"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FutureWarning: nablagfn.trainer is now nablagfn.training.trainer" in done.stderr
    with pytest.raises(ImportError):
        importlib.import_module("nablagfn.never_was")


@pytest.mark.parametrize(
    "text",
    [
        "from nablagfn.config import Config\ndef get_config():\n    return Config()",
        "from nablagfn.configs import demo\nget_config = demo.get_config",
        "def get_config():\n    return {'model': {'lora_rank': 8}}",
        "import ml_collections\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'model': {'lora_rank': 8}})",
    ],
)
@pytest.mark.filterwarnings("ignore:nablagfn")
def test_old_config_files_load(text: str, tmp_path: Path) -> None:
    if "ml_collections" in text:
        pytest.importorskip("ml_collections")
    file = tmp_path / "mine.py"
    file.write_text(text, encoding="utf-8")
    assert load_config(str(file)).model.lora_rank == 8


@pytest.mark.filterwarnings("ignore:nablagfn")
def test_old_reward_strings_resolve() -> None:
    reward = resolve("nablagfn.rewards.analytic:brightness", torch.device("cpu"))
    assert float(reward(torch.full((1, 3, 4, 4), 0.5), ["a"], [{}])) == pytest.approx(0.5)


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an old run."""
    return Path(shutil.copytree(OLD / request.param, tmp_path / request.param))


def test_an_old_run_is_read(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run)])
    assert "β" in (run / "report.html").read_text(encoding="utf-8")
    main(["diff", str(run), str(run)])
    main(["sample", str(run), "--out", str(tmp_path / "sample.png")])
    assert (tmp_path / "sample.png").is_file()
    two = ["--images-per-prompt", "2", "--num-prompts", "1", "--rewards"]
    main(["evaluate", str(run), *(two if "world" not in run.name else [])])
    assert "path_kl" in (run / "evaluation.json").read_text(encoding="utf-8")
    if "world" not in run.name:
        main(["export", str(run), "--format", "all", "--out", str(tmp_path / "export")])
        assert "reloaded" in capsys.readouterr().out


def test_an_old_run_goes_on_where_it_stopped(run: Path) -> None:
    """By two more updates, from the old weights, moments and settings."""
    folder, done = RunFolder(run), RUNS[run.name]
    before = load_file(folder.checkpoints / f"update_{done:06d}" / "policy.safetensors")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    options = {
        f"{group}.{name}": value
        for group, values in config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    options |= {"training.num_epochs": done + 2, "saving.output_dir": run.parent}
    given = [f"--config.{key}={value}" for key, value in options.items() if value != ""]
    main(["train", "--resume=must", "--exp_name=", *given])
    rows = folder.metrics()
    assert [row["update"] for row in rows] == list(range(1, done + 3))
    assert rows[:done] == RunFolder(OLD / run.name).metrics()
    after = load_file(folder.checkpoints / f"update_{done + 2:06d}" / "policy.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
