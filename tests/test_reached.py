"""What a run reached beside its target: by hand, at the end of a run, and in words."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nablagfn.cli.train import summarise
from nablagfn.evaluation import Measurement
from nablagfn.evaluation.draws import DrawnSamples
from nablagfn.evaluation.figures import Measured
from nablagfn.evaluation.reached import LabelShares, Reached, reached
from nablagfn.evaluation.target import spread_of
from nablagfn.metrics import diversity, tilting
from nablagfn.metrics.tilting import PromptRows
from nablagfn.training.trainer import RunResult
from tests.test_trainer import make_trainer, small_config

EACH = 4  # samples of a prompt
PROMPTS = ("a cat",) * EACH + ("a dog",) * EACH


def drawn(reward: list[float], style: list[str], path_kl: float = 0.0) -> DrawnSamples:
    """Features are the rewards themselves; the first sample of a prompt is not recognised."""
    values = torch.tensor(reward, dtype=torch.float64)
    scores = {
        "reward": values,
        "recognised": torch.tensor([0.0, 1.0, 1.0, 1.0] * 2, dtype=torch.float64),
        "path_kl": torch.full_like(values, path_kl),
    }
    animals = tuple(prompt.removeprefix("a ") for prompt in PROMPTS)
    labels = {"animal": animals, "style": tuple(style)}
    return DrawnSamples(Measured(PROMPTS, values[:, None], scores), torch.zeros(0), labels)


LOG2 = math.log(2)
BEFORE = drawn([0, 0, 0, LOG2] * 2, ["flat", "flat", "flat", "glossy"] * 2)
AFTER = drawn([0, 0, LOG2, LOG2] * 2, ["flat", "flat", "painted", "glossy"] * 2, path_kl=1.0)


def test_by_hand() -> None:
    """At beta = 1 the weights of a prompt are 1, 1, 1 and 2 fifths."""
    found = reached(BEFORE, AFTER, 1.0)
    assert found is not None
    assert (found.beta, found.samples) == (1.0, 8)
    assert found.effective_samples == pytest.approx(2 * 25 / 7)
    assert found.target_reward == pytest.approx(0.4 * LOG2)
    assert found.target_kl == pytest.approx(0.4 * LOG2 - math.log(5 / 4))
    assert found.target_recognised == pytest.approx(0.8)
    pairs = 3 * (1 * 2)  # w_i w_j of those that differ, each LOG2 apart; of the others 3
    assert found.target_diversity == pytest.approx(LOG2 * pairs / (pairs + 3))
    assert found.gain_reached == pytest.approx((1 / 2 - 1 / 4) / (2 / 5 - 1 / 4))
    assert found.shares == {
        "style: flat": LabelShares(0.75, 0.5, pytest.approx(0.6)),
        "style: glossy": LabelShares(0.25, 0.25, pytest.approx(0.4)),
        "style: painted": LabelShares(0.0, 0.25, 0.0),
    }
    assert found.least_kl is not None and found.efficiency == pytest.approx(found.least_kl)
    assert Reached.read(found.as_dict()) == found


def test_a_target_beyond_the_samples_is_not_stated() -> None:
    found = reached(BEFORE, AFTER, 5.0)
    assert found is not None and found.effective_samples < 3
    assert {found.target_reward, found.target_kl, found.target_diversity} == {None}
    assert {found.target_recognised, found.gain_reached} == {None}
    assert found.shares["style: glossy"] == LabelShares(0.25, 0.25, None)


def test_rewards_that_are_not_finite_have_no_target() -> None:
    broken = drawn([0, 0, 0, math.inf] * 2, ["flat"] * 8)
    assert reached(broken, AFTER, 1.0) is None and reached(BEFORE, broken, 1.0) is None


def test_the_diversity_of_equal_weights_is_the_plain_one() -> None:
    e = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = spread_of(e, PromptRows.of(PROMPTS), PROMPTS, torch.full((8,), 0.7), None)
    assert float(same) == pytest.approx(float(diversity.pairwise_distance(e, PROMPTS)))


def test_the_weighted_diversity_is_that_of_resampled_pairs() -> None:
    """Pairs of draws by the weights, those of a sample with itself left out."""
    generator = torch.Generator().manual_seed(1)
    e = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    log_w = torch.randn(6, generator=generator, dtype=torch.float64)
    one = ["one"] * 6
    found = float(spread_of(e, PromptRows.of(one), one, log_w, None))
    weights = tilting.normalised(log_w, PromptRows.of(one))[0, 0]
    i, j = (torch.multinomial(weights, 40_000, True, generator=generator) for _ in range(2))
    distance = (e[i] - e[j]).norm(dim=1)[i != j]
    error = float(distance.std()) / math.sqrt(len(distance))
    assert abs(float(distance.mean()) - found) < 4 * error


# ---------------------------------------------------------------------------------- in words

MEASURED = Measurement(8, -1.0, 0.5, 0.9, 0.95)
REACHED = Reached(
    beta=1.0,
    samples=8,
    effective_samples=6.4,
    target_reward=0.5,
    target_kl=0.84,
    target_diversity=0.83,
    target_recognised=0.94,
    gain_reached=0.12,
    least_kl=0.03,
    efficiency=0.1,
    shares={
        "background: red": LabelShares(0.1, 0.1, 0.2),
        "style: flat": LabelShares(0.5, 0.4, 0.2),
        "style: glossy": LabelShares(0.22, 0.31, 0.57),
    },
)
AFTERWARDS = replace(MEASURED, reward_mean=-0.82, diversity=0.88, path_kl=0.3)


def said(capsys: pytest.CaptureFixture[str], beside: Reached | None) -> str:
    summarise(RunResult(Path("run"), 1, True, MEASURED, AFTERWARDS, beside))
    return capsys.readouterr().out


def test_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, REACHED).splitlines()
    assert lines[0].endswith("glossy 22% -> 31%  (target 57%)")
    assert "-1.000 ->   -0.820  (target 0.500)" in lines[0]
    assert "0.300 nats  (best possible for that reward 0.03; target 0.84)" in lines[1]
    assert "(target 0.830)" in lines[2] and "recognised 95% -> 95%  (target 94%)" in lines[2]
    warm = replace(REACHED, shares={"background: red": LabelShares(0.13, 0.2, 0.32)})
    assert said(capsys, warm).splitlines()[0].endswith("red background 13% -> 20%  (target 32%)")
    assert lines[3] == "reached 12% of the target's gain, with 10.0% efficiency"


def test_without_labels_gain_or_efficiency_these_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "glossy" not in said(capsys, replace(REACHED, shares={}))
    assert "reached" not in said(capsys, replace(REACHED, gain_reached=None))
    for efficiency in (None, 1.5):
        assert "efficiency" not in said(capsys, replace(REACHED, efficiency=efficiency))
    assert "best possible" not in said(capsys, replace(REACHED, least_kl=None))


def test_a_target_that_is_not_known_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, replace(REACHED, target_reward=None))
    assert (
        "target not known from 8 samples (effective 6): draw more with "
        "--config.evaluation.images_per_prompt"
    ) in text.splitlines()
    assert "kept)" in text and "(target" not in text


def test_without_a_target_there_is_no_word_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "target" not in said(capsys, None)


# ---------------------------------------------------------------------------------- of a run


@pytest.mark.usefixtures("no_report")
def test_a_run_keeps_it_and_draws_the_pretrained_model_again_after_a_restart(
    tmp_path: Path,
) -> None:
    small = {"evaluation.images_per_prompt": 4, "model.reward_scale": 0.01}
    config = small_config(tmp_path / "one", **{"training.num_epochs": 1, **small})
    config.evaluation.num_prompts = 2
    trainer = make_trainer(config)
    result = trainer.fit()
    found = result.against_target
    assert found is not None and found.beta == 0.01 and found.target_reward is not None
    assert trainer.folder.read_json("evaluation.json")["against_target"] == found.as_dict()
    assert make_trainer(config).fit().against_target == found  # read, not measured
    evaluation = trainer.folder.read_json("evaluation.json")
    for name in ("after", "against_target"):
        del evaluation[name]
    trainer.folder.write_json("evaluation.json", evaluation)
    again = make_trainer(config).fit().against_target
    assert again == found


@pytest.mark.usefixtures("no_report")
def test_a_method_without_a_prior_has_none(tmp_path: Path) -> None:
    config = small_config(tmp_path, **{"training.num_epochs": 1, "experiment.method": "refl"})
    config.evaluation.num_prompts = 1
    trainer = make_trainer(config)
    result = trainer.fit()
    assert result.after is not None and result.against_target is None
    assert "against_target" not in trainer.folder.read_json("evaluation.json")
