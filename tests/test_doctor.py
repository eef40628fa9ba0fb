"""`nablagfn doctor`: what is wrong becomes a failure with its fix, and nothing is written."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nablagfn.cli import main
from nablagfn.commands.doctor import Exam, Finding, Patient, examine, machine, parts
from nablagfn.commands.doctor.compiled import compiled
from nablagfn.config import Config
from nablagfn.models import tune
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.recipes.options import load_config
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
    (row,) = examine(config, CPU, [Exam("batches", parts.batches)])
    assert row.finding.status == "failure"
    assert "training.batch_size" in row.finding.text and "64" in row.finding.text


def patient(**replaced: object) -> Patient:
    """One with the random pipeline, and what is given in place of its own."""
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
    monkeypatch.setattr(machine, "_requirements", lambda: ["torch>=2.6", "nonsense; extra == 'x'"])
    monkeypatch.setattr(machine, "_version", lambda n: "2.99.0" if n == "torch" else true(n))
    assert machine.versions(Patient(Config(), CPU)).status == "warning"
    monkeypatch.setattr(machine, "_version", lambda n: "1.0" if n == "torch" else true(n))
    found = machine.versions(Patient(Config(), CPU))
    assert found.status == "failure" and "torch>=" in found.text


def test_a_checkout_that_is_not_installed_is_looked_at_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a machine without internet, where it is only on the path (docs/air_gapped.md)."""

    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    found = machine.versions(Patient(Config(), CPU))
    assert found.status == "warning" and "from a checkout" in found.text


# -------------------------------------------------------------------------------- compiled steps


def run_of(gm: Any, wrong: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A captured graph, with something wrong about what it gives."""

    def run(*inputs: Any) -> tuple[Any, ...]:
        return tuple(wrong(t) if isinstance(t, Tensor) else t for t in gm(*inputs))

    return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Patient]]:
    """Gives the demo's patient with `speed.compile` by the backend that is given."""

    def make(backend: Any) -> Patient:
        torch._dynamo.reset()
        monkeypatch.setattr(tune, "BACKEND", backend)
        config = load_config("demo")
        found = Patient(config, CPU)
        config.speed.compile = True
        policy = StableDiffusionPolicy(make_pipeline(), lora_rank=2, guidance_scale=1.0)
        reward = NamedReward("mean", lambda images, prompts, metadata: images.mean((1, 2, 3)))
        vars(found).update(
            policy=tune.tune(policy, config.speed), prompts=PromptSet(("a cat",)), reward=reward
        )
        return found

    yield make
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_right_compiled_step_is_well_and_theta_is_as_it_was(
    compiler: Callable[[Any], Patient],
) -> None:
    someone = compiler("aot_eager")
    before = {name: value.clone() for name, value in someone.policy.state_dict().items()}
    found = compiled(someone)
    assert found.status == "ok" and "bound 0.01" in found.text, found
    assert all(torch.equal(before[n], v) for n, v in someone.policy.state_dict().items())
    someone.config.speed.compile = False
    assert compiled(someone) == Finding("ok", "not used")
    world = Patient(load_config("worlds/ring"), CPU)
    world.config.speed.compile = True
    assert compiled(world).status == "ok" and "world" in compiled(world).text


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda t: 1.05 * t,
    "no gradients": lambda t: t.detach(),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_compiled_step_fails_with_its_fix(
    what: str, compiler: Callable[[Any], Patient]
) -> None:
    someone = compiler(lambda gm, inputs: run_of(gm, WRONG[what]))
    (row,) = examine(someone.config, CPU, [Exam("compiled step", lambda _: compiled(someone))])
    assert row.finding.status == "failure"
    assert row.finding.fix == "leave config.speed.compile out"
    if what == "values":
        named = ("drawing", "frozen model", "guess without θ", "tuned model")
        assert all(name in row.finding.text for name in named)


@pytest.mark.slow
def test_a_theta_that_gets_no_gradient_fails_where_it_is_trained(
    compiler: Callable[[Any], Patient],
) -> None:
    """As on torch 2.11, where the pass of θ took the graph of the guess; x_k has its gradient."""

    def forgetting(gm: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *given: gm(*(t.detach() if isinstance(t, nn.Parameter) else t for t in given))

    found = compiled(compiler(forgetting))
    assert found.status == "failure" and found.text.endswith(": tuned model"), found
