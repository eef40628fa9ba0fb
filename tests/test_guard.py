"""The guard's decisions, from the figures of a run that goes wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.commands.assemble import build_trainer
from nablagfn.config import Config, ConfigError, GuardSettings, set_option
from nablagfn.methods.registry import METHODS
from nablagfn.recipes.options import load_config
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.guard import Guard, Probe, broken_budgets
from tests.worlds import randomise


def probe(reward: float = 0.0, kept: float = 1.0, kl: float = 0.0, other: float = 0.0) -> Probe:
    return Probe(reward, 0.9 * kept, kl, 0.9, {"other": other}, {"other": 2.0})


def guard(**settings: object) -> Guard:
    return Guard(GuardSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "figures", "words"),
    [
        ({"min_diversity": 0.8}, probe(kept=0.75), "diversity 75%"),
        ({"max_path_kl": 5.0}, probe(kl=6.0), "path KL 6 nats"),
        ({"max_held_out_drop": 0.5}, probe(other=-1.2), "other 0.60 base standard deviations"),
    ],
)
def test_each_budget_is_named(settings: dict, figures: Probe, words: str) -> None:
    (text,) = broken_budgets(GuardSettings(**settings), figures, {"other": 0.0})
    assert words in text
    assert f"guard.{next(iter(settings))}" in text
    assert broken_budgets(GuardSettings(**settings), probe(), {"other": 0.0}) == []
    assert broken_budgets(GuardSettings(), figures, {"other": 0.0}) == []


def test_it_stops_and_keeps_the_best_model_within_the_budgets() -> None:
    watch = guard(min_diversity=0.8)
    assert watch.judge(5, probe(kept=0.95, other=1.0)) == ""
    assert watch.judge(10, probe(kept=0.85, other=3.0)) == ""
    assert watch.judge(15, probe(kept=0.81, other=2.0)) == ""
    said = watch.judge(20, probe(kept=0.7, other=9.0))
    assert "stopped" in said and "update_000010" in said
    assert watch.state.stopped
    assert watch.best_checkpoint == "update_000010"


def test_without_a_held_out_reward_the_trained_one_decides() -> None:
    watch = guard(max_path_kl=9.0)
    for update, reward in ((1, 1.0), (2, 4.0), (3, 2.0)):
        watch.judge(update, Probe(reward, 1.0, 1.0, 1.0))
    assert watch.best_checkpoint == "update_000002"


def test_a_held_out_reward_is_compared_with_its_best() -> None:
    watch = guard(max_held_out_drop=0.5)
    assert watch.judge(1, probe(other=1.0)) == ""
    assert watch.judge(2, probe(other=3.0)) == ""
    assert watch.judge(3, probe(other=2.1)) == ""
    assert "stopped" in watch.judge(4, probe(other=1.9))


def test_patience_counts_measurements_in_a_row() -> None:
    watch = guard(min_diversity=0.8, patience=2)
    said = [watch.judge(i, probe(kept=kept)) for i, kept in enumerate((0.7, 0.9, 0.7, 0.7))]
    assert said[:3] == ["", "", ""] and "stopped" in said[3]


def test_lowering_beta_three_times_in_vain_stops() -> None:
    watch = guard(min_diversity=0.8, action="lower-beta", beta_factor=0.1)
    for factor in (0.1, 0.01, 0.001):
        watch.judge(1, probe(kept=0.5))
        assert watch.state.factor == pytest.approx(factor) and not watch.state.stopped
    watch.judge(2, probe(kept=0.5))
    assert watch.state.stopped


def test_lowering_beta_starts_anew_once_it_helped() -> None:
    watch = guard(min_diversity=0.8, action="lower-beta")
    for kept in (0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5):
        watch.judge(1, probe(kept=kept))
    assert not watch.state.stopped


def test_without_a_budget_it_does_nothing() -> None:
    watch = guard()
    assert watch.judge(1, probe(kept=0.0, kl=1e9, other=-1e9)) == ""
    assert watch.best_checkpoint is None


def test_its_state_survives_json_and_a_stopped_run_needs_other_budgets() -> None:
    watch = guard(min_diversity=0.8)
    watch.judge(1, probe(kept=0.9, other=1.0))
    watch.judge(2, probe(kept=0.5))
    saved = json.loads(json.dumps(watch.state_dict()))
    same, wider = guard(min_diversity=0.8), guard(min_diversity=0.4)
    for other in (same, wider):
        other.load_state_dict(saved)
        assert other.best_checkpoint == "update_000001"
    assert same.state.stopped and not wider.state.stopped
    assert same.state == watch.state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guard.max_held_out_drop": 1.0}, "evaluation.held_out_rewards"),
        ({"guard.min_diversity": 0.8, "logging.sample_freq": 0}, "logging.eval_freq"),
    ],
)
def test_settings_that_could_never_act_are_refused(options: dict, words: str) -> None:
    config = Config()
    for key, value in options.items():
        set_option(config, key, value)
    with pytest.raises(ConfigError, match=words):
        config.check()


# ---------------------------------------------------------------------- β in every term


LOWERED = 0.25


def losses_of(method: str, out: Path, scale: float, factor: float) -> dict[str, Tensor]:
    """Every loss term of one update's transitions, with β = scale·factor."""
    config = load_config("worlds/ring-flow" if METHODS[method].ode else "worlds/prompts")
    for key, value in {
        "experiment.method": method,
        "method.window": 0,
        "model.reward_scale": scale,
        "model.timestep_fraction": 1.0,
        "model.reward_adaptive_mode": "squared",
        "sampling.num_steps": 6,
        "sampling.batch_size": 4,
        "training.batch_size": 4,
        "saving.output_dir": str(out),
    }.items():
        set_option(config, key, value)
    trainer = build_trainer(config, RunFolder(out / f"{scale}-{factor}"))
    randomise([*trainer.policy.parameters(), *trainer.objective.modules.parameters()], 0.1)
    trainer.guard.state.factor = factor
    drawn = trainer.collector.collect(0)
    drawn = dataclasses.replace(drawn, reward=trainer._scores(drawn).total)
    (chosen,) = trainer.collector.batches(drawn, 0, 0, trainer.objective)
    batch = chosen.transitions(trainer.objective.prepare(chosen))
    return {name: term.detach() for name, term in trainer.objective.losses(batch).terms.items()}


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.has_prior])
def test_lowering_beta_acts_on_all_terms(method: str, tmp_path: Path) -> None:
    """As an objective that was built with the lower β, term by term; and the terms do change."""
    lowered = losses_of(method, tmp_path, 2.0, LOWERED)
    built = losses_of(method, tmp_path, 2.0 * LOWERED, 1.0)
    before = losses_of(method, tmp_path, 2.0, 1.0)
    assert lowered.keys() == built.keys()
    for name, term in lowered.items():
        torch.testing.assert_close(term, built[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(before[name], lowered[name], rtol=1e-3) for name in lowered)
