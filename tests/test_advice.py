"""Each sickness is named when it shows, and a healthy run is left alone."""

from __future__ import annotations

import pytest

from nablagfn.runs.advice import advise

HEALTHY = {
    "grad_norm": 2.0,
    "guess_sq": 4.0,
    "residual_score_sq": 1.0,
    "flow_sq": 1.0,
    "loss_forward": 3.0,
    "loss_trust": 0.1,
    "duplicates": 0.0,
}
PROBES = {
    "probe_reward": 1.0,
    "probe_reward_other": 1.0,
    "probe_diversity_kept": 0.95,
    "probe_recognised": 0.9,
}


def rows(count: int = 60, **late: object) -> list[dict]:
    """A healthy run that is measured every 20 updates; `late`: what changes in its second half."""
    found = []
    for update in range(1, count + 1):
        row = {"update": update, **HEALTHY, **(PROBES if update % 20 == 0 else {})}
        if update > count // 2:
            row |= {k: v for k, v in late.items() if k in row or not k.startswith("probe")}
        found.append(row)
    return found


def test_a_healthy_run_gets_no_advice() -> None:
    assert advise(rows()) == []
    assert advise([]) == []
    assert advise(rows(1)) == []


CASES = [
    ({"residual_score_sq": 1e-7}, "lower model.reward_scale"),
    ({"duplicates": 3.0}, "3 trajectories"),
    ({"loss_trust": 5.0}, "unet_reg_scale"),
    ({"flow_sq": 1e3}, "flow_lr"),
    ({"ratio_clipped": 0.9}, "clipped"),
    ({"grad_norm": None}, "overflow"),
    ({"loss_forward": 30.0}, "threefold"),
    ({"probe_diversity_kept": 0.4}, "40% of the pretrained"),
    ({"probe_recognised": 0.6}, "30 points fewer"),
    ({"probe_reward": 2.0, "probe_reward_other": 0.5}, "while other is lower"),
]


@pytest.mark.parametrize(("late", "words"), CASES, ids=[words for _, words in CASES])
def test_a_sickness_is_named_and_nothing_else(late: dict, words: str) -> None:
    (found,) = advise(rows(**late))
    assert words in found.text
    assert found.update == 60


def test_a_loss_below_zero_without_trust_region_is_healthy() -> None:
    """That of a pool's methods leaves out a constant."""
    found = [{key: value for key, value in row.items() if key != "loss_trust"} for row in rows()]
    assert advise([{**row, "loss_forward": -1.0} for row in found]) == []


def test_a_dead_reward_is_named_at_once() -> None:
    dead = [{**row, "grad_norm": 0.0, "guess_sq": 0.0} for row in rows(2)]
    (found,) = advise(dead)
    assert "no gradient" in found.text


def test_moving_against_the_target_is_named_with_its_steps() -> None:
    def levels(second: float) -> list[dict]:
        row = {"steps": [[0, 9], [10, 19], [20, 29]], "cosine": [0.3, second, None]}
        return [{"update": update, **row} for update in range(1, 31)]

    assert advise([], levels(0.2)) == []
    (found,) = advise([], levels(-0.4))
    assert "steps 10 to 19" in found.text
