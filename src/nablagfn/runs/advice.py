"""Known sicknesses of a run, read off its logged figures, in words (no torch).

Each rule is one function over the rows of metrics.jsonl (or diagnostics.jsonl) so far, and says
nothing of a run that is too young to tell. What the figures mean: docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Rows = Sequence[Row]

YOUNG = 10  # updates before which nothing is said of trends
FAR = 1e3  # value gradient over residual score: this far from the fixed point
TARGETS = ("guess_sq", "value_gradient_sq", "adjoint_sq", "terminal_gradient_sq")


@dataclass(frozen=True)
class Advice:
    """A sentence for people, and the update whose figures gave rise to it. kind: which rule's."""

    update: int
    text: str
    kind: str = ""


def advise(rows: Rows, diagnostics: Rows = ()) -> list[Advice]:
    """What the figures so far give reason to say; empty for a healthy run."""
    found = [(rows, rule) for rule in RULES] + [(diagnostics, against_the_target)]
    said = [(seen, rule, rule(seen)) for seen, rule in found if seen]
    return [Advice(seen[-1]["update"], text, rule.__name__) for seen, rule, text in said if text]


def target_key(row: Row) -> str | None:
    """The key of ‖v̂‖², what the policy is fitted to; None for methods without it."""
    return next((key for key in TARGETS if key in row), None)


def recent(rows: Rows, key: str) -> list[float]:
    """The finite values of a key in the last rows; none of a run too young to tell."""
    if len(rows) < YOUNG:
        return []
    values = [row[key] for row in rows[-YOUNG:] if row.get(key) is not None]
    return [value for value in values if math.isfinite(value)]


def measured(rows: Rows, key: str) -> list[Row]:
    """The rows in which fixed-seed samples were measured and have this figure."""
    return [row for row in rows if row.get(key) is not None]


def no_gradient(rows: Rows) -> str | None:
    key = target_key(rows[-1])
    if not all(row.get("grad_norm") == 0 or (key and row[key] == 0) for row in rows):
        return None
    return (
        "no gradient reaches the LoRA: the reward is flat where the pictures are; look at it with "
        "`nablagfn check-reward`"
    )


def far_from_the_target(rows: Rows) -> str | None:
    last, key = rows[-1], target_key(rows[-1])
    if len(rows) < YOUNG or not key or not last[key] or not last.get("residual_score_sq"):
        return None
    ratio = math.sqrt(last[key] / last["residual_score_sq"])
    if ratio < FAR:
        return None
    return (
        f"the reward's gradient is {ratio:.0e} times the residual score: far from the target, "
        "only its direction counts; lower model.reward_scale, or train for longer"
    )


def overflow(rows: Rows) -> str | None:
    lost = sum("grad_norm" in row and row["grad_norm"] is None for row in rows[-YOUNG:])
    if lost <= len(rows[-YOUNG:]) // 2:
        return None
    return (
        "most gradients overflow inside the float16 model, at any model.reward_scale, and their "
        "updates are skipped: use training.mixed_precision=bf16"
    )


def same_noise(rows: Rows) -> str | None:
    if not rows[-1].get("duplicates"):
        return None
    return (
        f"{rows[-1]['duplicates']:.0f} trajectories of this epoch start from noise that another "
        "one has, too: processes draw the same samples; check how they are launched"
    )


def held_by_the_trust_region(rows: Rows) -> str | None:
    trust = sum(recent(rows, "loss_trust"))
    if not trust or trust <= sum(recent(rows, "loss_forward")):  # which may be below 0
        return None
    return (
        "the trust region weighs more than the forward loss: lower model.unet_reg_scale, or the "
        "learning rate"
    )


def flow_fits_noise(rows: Rows) -> str | None:
    flow, guess = recent(rows, "flow_sq"), recent(rows, "guess_sq")
    if not guess or sum(flow) <= 10 * sum(guess):
        return None
    return (
        "the flow network is far larger than the reward's gradient: lower training.flow_lr, or "
        "raise training.flow_wd"
    )


def ratio_clipped(rows: Rows) -> str | None:
    clipped = recent(rows, "ratio_clipped")
    return "most ratios are clipped: lower training.lr" if sum(clipped) > len(clipped) / 2 else None


def losing_diversity(rows: Rows) -> str | None:
    seen = measured(rows, "probe_diversity_kept")
    if not seen or seen[-1]["probe_diversity_kept"] >= 0.7:
        return None
    return (
        f"diversity is down to {seen[-1]['probe_diversity_kept']:.0%} of the pretrained model's: "
        "lower model.reward_scale, take an earlier checkpoint, or set guard.min_diversity"
    )


def losing_the_prompt(rows: Rows) -> str | None:
    seen = measured(rows, "probe_recognised")
    lost = seen[0]["probe_recognised"] - seen[-1]["probe_recognised"] if seen else 0.0
    if lost < 0.1:
        return None
    return (
        f"{100 * lost:.0f} points fewer pictures are recognised than at the first measurement: "
        "the reward is gained at the prompt's cost"
    )


def exploited(rows: Rows) -> str | None:
    """The trained reward rises while a held-out one is lower than ever."""
    seen = measured(rows, "probe_reward")
    if len(seen) < 3 or seen[-1]["probe_reward"] <= seen[0]["probe_reward"]:
        return None
    first, last = seen[0], seen[-1]
    others = [key for key in last if key.startswith("probe_reward_") and key in first]
    worse = [
        key.removeprefix("probe_reward_")
        for key in others
        if last[key] < first[key] and last[key] <= min(row[key] for row in seen)
    ]
    if not worse:
        return None
    return (
        f"the trained reward rises while {', '.join(worse)} is lower than ever: the reward is "
        "being exploited; stop here, or set guard.max_held_out_drop"
    )


def growing_loss(rows: Rows) -> str | None:
    losses = [row["loss_forward"] for row in rows if row.get("loss_forward") is not None]
    quarter = len(losses) // 4
    first = sum(losses[:quarter])
    if quarter < YOUNG or first < 0 or sum(losses[-quarter:]) <= 3 * first:
        return None  # below 0 it says how far the run is, and not how far from its floor
    return (
        "the forward loss has grown threefold since the start: lower training.lr, or set "
        "training.adam_beta2=0.95"
    )


def against_the_target(diagnostics: Rows) -> str | None:
    """The residual score points away from v̂ at some noise level, update after update."""
    cosines = [row["cosine"] for row in diagnostics[-YOUNG:] if "cosine" in row]
    if len(diagnostics) < 2 * YOUNG or len(cosines) < YOUNG:
        return None
    for index, (low, high) in enumerate(diagnostics[-1]["steps"]):
        level = [row[index] for row in cosines if row[index] is not None]
        if level and sum(level) / len(level) < -0.1:
            return (
                f"at steps {low} to {high} the model moves against the value gradient that it is "
                "fitted to: nabla-db's flow network cancels the guess there for long, "
                "nabla-db-lambda's does not; with other methods lower training.lr"
            )
    return None


RULES: tuple[Callable[[Rows], str | None], ...] = (
    no_gradient,
    far_from_the_target,
    overflow,
    same_noise,
    held_by_the_trust_region,
    flow_fits_noise,
    ratio_clipped,
    losing_diversity,
    losing_the_prompt,
    exploited,
    growing_loss,
)
