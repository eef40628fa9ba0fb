"""`nablagfn doctor`: what is wrong becomes a failure with its fix, and nothing is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nablagfn.cli import main
from nablagfn.config import Config
from nablagfn.doctor import Check, Finding, Patient, examine, machine, parts
from nablagfn.options import load_config
from nablagfn.prompts import PromptSet
from nablagfn.rewards import NamedReward
from tests.tiny_pipeline import make_pipeline

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_the_shipped_model_is_well_and_nothing_is_written(tmp_path: Path) -> None:
    config = load_config("demo")
    config.saving.output_dir = str(tmp_path / "runs")
    rows = list(examine(config, CPU))
    assert {row.finding.status for row in rows} <= {"ok", "warning"}, rows
    assert not (tmp_path / "runs").exists()


def test_what_needs_a_missing_model_is_skipped_and_the_exit_code_is_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--config.pretrained.model={tmp_path}", "--config.sampling.num_steps=5"]
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--config=demo", *arguments])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (model,) = (line for line in lines if line.startswith("│ model"))
    (decoder,) = (line for line in lines if line.startswith("│ decoder"))
    assert "failure" in model and "skipped" in decoder
    assert any("model_index.json" in line for line in lines)


def test_contradicting_batches_are_a_row_that_names_them() -> None:
    config = Config()
    config.training.batch_size = 3
    (row,) = examine(config, CPU, [Check("batches", parts.batches)])
    assert row.finding.status == "failure"
    assert "training.batch_size" in row.finding.text and "64" in row.finding.text


def patient(**replaced: object) -> Patient:
    """One with the random pipeline, and what is given in place of its own."""
    from nablagfn.models.stable_diffusion import StableDiffusionPolicy

    found = Patient(Config(), CPU)
    vars(found).update(
        policy=StableDiffusionPolicy(make_pipeline()), prompts=PromptSet(("a cat",)), **replaced
    )
    return found


def test_a_reward_through_which_nothing_can_be_learned_fails() -> None:
    flat = NamedReward("flat", lambda images, prompts, metadata: (0 * images).sum((1, 2, 3)))
    steep = NamedReward("steep", lambda images, prompts, metadata: images.sum((1, 2, 3)))
    assert parts.gradient(patient(reward=steep)).status == "ok"
    assert parts.gradient(patient(reward=flat)).status == "failure"


def test_damaged_weights_fail_where_they_are() -> None:
    broken = patient()
    with torch.no_grad():
        broken.policy.vae.decoder.conv_out.weight.fill_(float("nan"))
    found = parts.decoder(broken)
    assert found.status == "failure" and "damaged" in found.fix
    assert parts.denoiser(broken).status == parts.flow(broken).status == "ok"


def test_wandb_without_a_key_fails_only_when_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(file))
    someone = Patient(Config(), CPU)
    assert machine.wandb(someone) == Finding("ok", "not used")
    someone.config.logging.use_wandb = True
    assert machine.wandb(someone).status == "failure"
    assert "wandb login" in machine.wandb(someone).fix
    file.write_text("machine api.wandb.ai login user password abc\n", encoding="utf-8")
    assert machine.wandb(someone) == Finding("ok", "a key is set up")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert machine.wandb(someone) == Finding("ok", "a key is set up")


@pytest.mark.parametrize(("free", "status"), [(1e8, "failure"), (1e9, "warning"), (1e10, "ok")])
def test_a_full_disk(
    free: float, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    config = Config()
    config.saving.output_dir = str(tmp_path / "not" / "there")
    assert machine.disk(Patient(config, CPU)).status == status


def test_the_tested_versions_are_those_of_constraints_txt() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", text, flags=re.MULTILINE))
    assert {name: pinned[name] for name in machine.TESTED} == machine.TESTED


def test_an_older_package_is_a_failure_and_another_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = machine._version
    monkeypatch.setattr(machine, "_version", lambda n: "2.99.0" if n == "torch" else true(n))
    assert machine.versions(Patient(Config(), CPU)).status == "warning"
    monkeypatch.setattr(machine, "_version", lambda n: "1.0" if n == "torch" else true(n))
    found = machine.versions(Patient(Config(), CPU))
    assert found.status == "failure" and "torch>=" in found.text
