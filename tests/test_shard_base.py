"""training.shard_base: a sharded run equals a whole one, no process ever waits for a pass that the
others do not make, and what cannot be so is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nablagfn.cli import main
from nablagfn.commands.assemble import (
    build_policy,
    build_prompts,
    build_reward,
    build_view,
    side_by_side,
)
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core.types import Condition
from nablagfn.methods.registry import check_settings
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.checkpoint import load_policy
from nablagfn.training.collect import Collector
from nablagfn.training.trainer import Trainer
from nablagfn.worlds.policy import WorldPolicy
from tests.running import LAUNCHER, LEARNED, ROOT, metrics, weights
from tests.tables import table_of
from tests.test_trainer import make_trainer, small_config
from tests.tiny_pipeline import make_pipeline

SAVED = (*LEARNED, "pytorch_lora_weights")
TIMEOUT = 420  # seconds: a hang is a failure
ROUNDING = 1e-6  # of float64 runs: gradients are summed in another order, then Adam divides


@dataclass(frozen=True)
class Ran:
    """What tests/shard_worker.py left behind."""

    out: Path
    found: dict[str, Any]
    code: int
    said: str


@pytest.fixture(scope="module")
def ran(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two processes; torch compares each collective over them and fails when they differ."""
    out = tmp_path_factory.mktemp("shards")
    command = [*LAUNCHER, "--nproc_per_node=2", "tests/shard_worker.py", str(tiny_folder), str(out)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (out / "found.json").is_file(), done.stderr
    found = json.loads((out / "found.json").read_text(encoding="utf-8"))
    return Ran(out, found, done.returncode, done.stderr)


def assert_close(found: Any, expected: Any, rel: float = ROUNDING) -> None:
    """Nested numbers and words, numbers up to rounding."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_close(found[key], expected[key], rel)
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, rel)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=rel, abs=rel)
    else:
        assert found == expected


# -------------------------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "updates"), [("flow", 2), ("no_flow", 1)])
def test_a_sharded_run_equals_a_whole_one(kind: str, updates: int, ran: Ran) -> None:
    """Weights, metrics, evaluation and diagnostics, up to the rounding of float64; the passes are
    those of the whole run and the discarded ones."""
    whole, sharded = (ran.out / f"{form}_{kind}" for form in ("whole", "sharded"))
    expected, found = metrics(whole), metrics(sharded)
    for a, b in zip(found, expected, strict=True):
        assert a.pop("model_evals") >= b.pop("model_evals")
    assert_close(found, expected)
    before, after = (weights(f, updates, SAVED) for f in (whole, sharded))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=ROUNDING, atol=1e-7)
    assert any(value.abs().max() > 1e-4 for name, value in after.items() if "lora_B" in name)
    if kind == "flow":
        evaluations = [RunFolder(f).read_json("evaluation.json") for f in (sharded, whole)]
        for evaluation in evaluations:
            del evaluation["evaluated"]
        assert_close(*evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "no_flow"])
def test_one_process_had_clean_rows_only_and_the_other_not(kind: str, ran: Ran) -> None:
    """What the runs above are to show: it happened in them."""
    first, second = ran.found[f"clean_{kind}"]
    assert len(first) == len(second)
    assert any(a != b for a, b in zip(first, second, strict=True))
    assert any(a and b for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "no_flow"])
def test_each_process_holds_half_of_the_base_model(kind: str, ran: Ran) -> None:
    held, whole = ran.found[f"bytes_{kind}"], ran.found["bytes_whole"]
    assert sum(held) == pytest.approx(whole, rel=0.02)
    assert held == pytest.approx([whole / 2] * 2, rel=0.1)


@pytest.mark.slow
def test_a_sharded_run_with_checkpointing_equals_a_whole_one_without(ran: Ran) -> None:
    before, after = (weights(ran.out / n, 1, SAVED) for n in ("whole_flow", "checkpointed"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=ROUNDING, atol=1e-7)


@pytest.mark.slow
def test_a_sharded_run_that_is_asked_to_stop_goes_on_bit_for_bit(ran: Ran) -> None:
    """SIGTERM reached one process only, within the first update."""
    assert ran.found["cut"] == [False, 1] and ran.found["resumed"] == 2
    for cut, undisturbed in zip(
        metrics(ran.out / "cut"), metrics(ran.out / "sharded_flow"), strict=True
    ):
        assert cut.items() <= undisturbed.items() and "grad_norm" in cut
    first, second = (weights(ran.out / n, 2, SAVED) for n in ("cut", "sharded_flow"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_evaluate_shards_too(ran: Ran) -> None:
    """In float32, and of weights that differ by rounding."""
    whole, sharded = (
        RunFolder(ran.out / f"{form}_flow").read_json("evaluation.json")["evaluated"]
        for form in ("whole", "sharded")
    )
    assert [model["name"] for model in sharded["models"]] == ["base", "update_000002"]
    assert_close(sharded, whole, rel=1e-3)
    assert ran.found["evaluated_sharded"] < 0.6 * ran.found["evaluated_whole"]


@pytest.mark.slow
def test_what_was_trained_in_shards_is_loaded_whole_by_one_process(
    ran: Ran, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = RunFolder(ran.out / "sharded_flow")
    assert folder.config().training.shard_base
    picture = side_by_side(folder, prompts=["a cat"], seeds=[0], out=tmp_path / "pictures.png")
    assert picture.is_file()
    policy = StableDiffusionPolicy.from_pretrained(str(tiny_folder))
    load_policy(policy, folder.checkpoint("update_000002"))


@pytest.mark.slow
def test_out_of_memory_on_one_process_ends_all_with_one_line(ran: Ran) -> None:
    """The second process cannot back off while the first waits for it within a pass."""
    assert ran.code != 0
    (line,) = [line for line in ran.said.splitlines() if line.startswith("nablagfn: error:")]
    assert "out of memory: lower config.training.micro_batch" in line


# -------------------------------------------------------------------------------- even passes

EVEN: dict[str, dict[str, object]] = {
    "nabla-db": {},
    "nabla-db, no flow": {"model.no_flow": True},
    "nabla-db, no reverse loss": {"model.reverse_loss_scale": 0.0},
    "nabla-db, frozen guess": {"model.no_flow": True, "method.guess_model": "pretrained"},
    "nabla-db, slices": {"training.vae_slice": 1},
    "nabla-db-lambda": {},
    "nabla-db-lambda, window": {"method.window": 2, "method.return_lambda": 0.9},
    "nabla-db-lambda, last": {"method.window": 1, "method.guess_model": "finetuned"},
    "terminal-gradient": {},
    "refl": {"method.refl_share": 1.0},
    "draft-k": {"method.draft_steps": 2},
    "draft-lv": {},
    "ddpo": {},
}
REFUSED: dict[str, dict[str, object]] = {
    "nabla-db-lambda, sweeps": {"method.return_lambda": 0.9},
    "adjoint-matching": {},
    "alignprop": {},
    "dag-db": {},
}


def trace(policy: WorldPolicy) -> list[tuple[object, ...]]:
    """Fills with each pass: forward or backward, and what the forward pass keeps a graph for."""
    seen: list[tuple[object, ...]] = []
    eps = policy.output

    def traced(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        graph = torch.is_grad_enabled()
        theta = policy.adapter_on and any(p.requires_grad for p in policy.parameters())
        seen.append(("forward", graph and x.requires_grad, graph and theta))
        found = eps(x, timestep, condition)
        if found.requires_grad:
            found.register_hook(lambda _: seen.append(("backward",)))
        return found

    policy.output = traced  # type: ignore[method-assign]
    return seen


def uneven(name: str, options: dict[str, object], out: Path) -> int:
    """In how many of six epochs the updates of two processes make different passes."""
    world = {key: "worlds/ring" for key in ("pretrained.model", "experiment.reward_fn")}
    chosen = {**world, "experiment.prompt_fn": "worlds/ring", "sampling.num_batches_per_epoch": 1}
    config = small_config(out, **chosen, **options, **{"experiment.method": name.partition(",")[0]})
    policy = build_policy(config, torch.device("cpu"))
    prompts, reward = build_prompts(config), build_reward(config, policy.device)
    trainer = Trainer(policy, reward, prompts, config, view=build_view(config), show_progress=False)
    policy.together = True
    seen = trace(policy)

    def passes(epoch: int, rank: int) -> list[tuple[object, ...]]:
        collector = Collector(policy, trainer.table, prompts, config, rank=rank, world=2)
        drawn = collector.collect(epoch)
        drawn = replace(drawn, reward=trainer._scores(drawn).total)
        seen.clear()
        for chosen in collector.batches(drawn, epoch, 0, trainer.objective):
            trainer.updater.accumulate(chosen, rows=1)
        assert seen
        return list(seen)

    return sum(passes(epoch, 0) != passes(epoch, 1) for epoch in range(6))


@pytest.mark.parametrize("name", EVEN)
def test_processes_make_the_same_passes_whatever_they_drew(name: str, tmp_path: Path) -> None:
    assert uneven(name, EVEN[name], tmp_path) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_are_refused_are_uneven(name: str, tmp_path: Path) -> None:
    assert uneven(name, REFUSED[name], tmp_path) > 0
    config = small_config(
        tmp_path, **{"experiment.method": name.partition(",")[0], **REFUSED[name]}
    )
    with pytest.raises(ConfigError, match="different numbers of passes"):
        set_option(config, "training.shard_base", True)
        check_settings(config)


@pytest.mark.parametrize("name", EVEN)
def test_even_methods_are_not_refused(name: str, tmp_path: Path) -> None:
    options = {"experiment.method": name.partition(",")[0], "training.shard_base": True}
    check_settings(small_config(tmp_path, **{**options, **EVEN[name]}))


def test_the_discarded_pass_changes_nothing() -> None:
    """The guess of clean rows only, with and without it."""
    from nablagfn.core.log_reward import LogReward
    from nablagfn.core.lookahead import guess

    policy = StableDiffusionPolicy(make_pipeline().to(torch.float64), guidance_scale=2.0)
    table = table_of(policy, 4)
    x = torch.randn(3, *policy.sample_shape, dtype=torch.float64)
    where = policy.condition(["a cat", "a dog", "an ant"])
    log_reward = LogReward(policy, lambda images, *_: images.square().flatten(1).mean(1), 10.0)
    k = table.at_step(3, x)
    alone = guess(log_reward, policy, x, k, where, "squared")
    policy.together = True
    together = guess(log_reward, policy, x, k, where, "squared")
    assert torch.equal(alone.gradient, together.gradient)
    assert torch.equal(alone.x_clean, together.x_clean)
    assert math.isfinite(float(alone.gradient.sum())) and alone.gradient.abs().sum() > 0


# -------------------------------------------------------------------------------- refusals

COMMANDS = {
    "one process": ([], "there is nothing to shard; start it with torchrun"),
    "method": (["--config.experiment.method=alignprop"], "config.experiment.method=alignprop"),
    "sweeps": (
        ["--config.experiment.method=nabla-db-lambda", "--config.method.return_lambda=0.5"],
        "set config.method.window",
    ),
    "compile": (["--config.speed.compile=True"], "config.speed.compile"),
    "CUDA graphs": (["--config.speed.cuda_graphs=True"], "config.speed.cuda_graphs"),
    "channels last": (["--config.speed.channels_last=True"], "config.speed.channels_last"),
    "world": (["--config=worlds/ring"], "does not go with worlds/ring"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_sharded_is_one_line_and_writes_nothing(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, expected = COMMANDS[name]
    out = tmp_path / "runs"
    if name != "world":
        options = [f"--config.pretrained.model={tiny_folder}", *options]
        options += ["--config.experiment.reward_fn=colourfulness"]
    shared = [f"--config.saving.output_dir={out}", "--config.training.shard_base=True"]
    with pytest.raises(SystemExit) as found:
        main(["train", *options, *shared])
    assert found.value.code == 2
    said = capsys.readouterr().err
    assert said.strip().count("\n") == 0 and expected in said, said
    assert not out.exists()


def test_a_whole_policy_is_refused_where_shards_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the policy is whole") as found:
        make_trainer(small_config(tmp_path / "run", **{"training.shard_base": True}))
    assert "\n" not in str(found.value) and not (tmp_path / "run").exists()


def test_a_policy_of_one_process_is_not_sharded(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs several processes"):
        StableDiffusionPolicy.from_pretrained(str(tiny_folder), shard=True)


def test_a_run_may_go_on_with_or_without_shards(tmp_path: Path) -> None:
    """They change rounding and memory only."""
    from nablagfn.runs.runfolder import check_same_settings

    check_same_settings(
        small_config(tmp_path), small_config(tmp_path, **{"training.shard_base": True}), tmp_path
    )
    assert not Config().training.shard_base
