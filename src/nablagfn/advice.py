"""Known sicknesses of a run, read off its logged figures, in words (no torch).

Each rule is one function over the rows of metrics.jsonl (or diagnostics.jsonl) so far, and says
nothing of a run that is too young to tell. What the figures mean: docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    found = {rule.__name__: rule(rows) for rule in RULES}
    found["against_the_target"] = against_the_target(diagnostics)
    return [replace(said, kind=kind) for kind, said in found.items() if said is not None]


def target_key(row: Row) -> str | None:
    """The key of ‖v̂‖², what the policy is fitted to; None for methods without it."""
    return next((key for key in TARGETS if key in row), None)


def column(rows: Rows, key: str) -> list[float]:
    """The finite values of a key, in order."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return [value for value in values if math.isfinite(value)]


def no_gradient(rows: Rows) -> Advice | None:
    if not rows:
        return None
    key = target_key(rows[-1])
    dead = [row for row in rows if row.get("grad_norm") == 0 or (key and row[key] == 0)]
    if len(dead) < len(rows) or (len(rows) < 2 and not dead):
        return None
    return Advice(
        rows[-1]["update"],
        "no gradient reaches the LoRA: the reward is flat where the pictures are; look at it with "
        "`nablagfn check-reward`",
    )


def far_from_the_target(rows: Rows) -> Advice | None:
    if len(rows) < YOUNG:
        return None
    last = rows[-1]
    key = target_key(last)
    if key is None or not last.get("residual_score_sq") or not last[key]:
        return None
    ratio = math.sqrt(last[key] / last["residual_score_sq"])
    if ratio < FAR:
        return None
    return Advice(
        last["update"],
        f"the reward's gradient is {ratio:.0e} times the residual score: far from the target, "
        "only its direction counts; lower model.reward_scale, or train for longer",
    )


def overflow(rows: Rows) -> Advice | None:
    recent = rows[-YOUNG:]
    lost = sum("grad_norm" in row and row["grad_norm"] is None for row in recent)
    if lost <= len(recent) // 2:
        return None
    return Advice(
        rows[-1]["update"],
        "most gradients overflow and their updates are skipped: use "
        "training.mixed_precision=bf16, or lower model.reward_scale",
    )


def same_noise(rows: Rows) -> Advice | None:
    if not rows or not rows[-1].get("duplicates"):
        return None
    return Advice(
        rows[-1]["update"],
        f"{rows[-1]['duplicates']:.0f} trajectories of this epoch start from noise that another "
        "one has, too: processes draw the same samples; check how they are launched",
    )


def held_by_the_trust_region(rows: Rows) -> Advice | None:
    trust, forward = column(rows[-YOUNG:], "loss_trust"), column(rows[-YOUNG:], "loss_forward")
    if len(rows) < YOUNG or not trust or sum(trust) <= sum(forward):
        return None
    return Advice(
        rows[-1]["update"],
        "the trust region weighs more than the forward loss: lower model.unet_reg_scale, or the "
        "learning rate",
    )


def flow_fits_noise(rows: Rows) -> Advice | None:
    if len(rows) < YOUNG:
        return None
    flow, guess = column(rows[-YOUNG:], "flow_sq"), column(rows[-YOUNG:], "guess_sq")
    if not flow or not guess or sum(flow) <= 10 * sum(guess):
        return None
    return Advice(
        rows[-1]["update"],
        "the flow network is far larger than the reward's gradient: lower training.flow_lr, or "
        "raise training.flow_wd",
    )


def ratio_clipped(rows: Rows) -> Advice | None:
    clipped = column(rows[-YOUNG:], "ratio_clipped")
    if len(rows) < YOUNG or not clipped or sum(clipped) <= 0.5 * len(clipped):
        return None
    return Advice(rows[-1]["update"], "most ratios are clipped: lower training.lr")


def losing_diversity(rows: Rows) -> Advice | None:
    seen = [row for row in rows if row.get("probe_diversity_kept") is not None]
    if not seen or seen[-1]["probe_diversity_kept"] >= 0.7:
        return None
    return Advice(
        seen[-1]["update"],
        f"diversity is down to {seen[-1]['probe_diversity_kept']:.0%} of the pretrained model's: "
        "lower model.reward_scale, take an earlier checkpoint, or set guard.min_diversity",
    )


def losing_the_prompt(rows: Rows) -> Advice | None:
    seen = [row for row in rows if row.get("probe_recognised") is not None]
    if len(seen) < 2:
        return None
    lost = seen[0]["probe_recognised"] - seen[-1]["probe_recognised"]
    if lost < 0.1:
        return None
    return Advice(
        seen[-1]["update"],
        f"{100 * lost:.0f} points fewer pictures are recognised than at the first measurement: "
        "the reward is gained at the prompt's cost",
    )


def exploited(rows: Rows) -> Advice | None:
    """The trained reward rises while a held-out one falls."""
    seen = [row for row in rows if row.get("probe_reward") is not None]
    if len(seen) < 3:
        return None
    first, last = seen[0], seen[-1]
    others = [key for key in last if key.startswith("probe_reward_") and key in first]
    others = [key for key in others if key != "probe_reward_target"]  # a world's, constant
    worse = [
        key
        for key in others
        if last[key] < first[key] and last[key] <= min(row[key] for row in seen)
    ]
    if last["probe_reward"] <= first["probe_reward"] or not worse:
        return None
    names = ", ".join(key.removeprefix("probe_reward_") for key in worse)
    return Advice(
        last["update"],
        f"the trained reward rises while {names} is lower than ever: the reward is being "
        "exploited; stop here, or set guard.max_held_out_drop",
    )


def growing_loss(rows: Rows) -> Advice | None:
    losses = column(rows, "loss_forward")
    quarter = len(losses) // 4
    if quarter < YOUNG or sum(losses[-quarter:]) <= 3 * sum(losses[:quarter]):
        return None
    return Advice(
        rows[-1]["update"],
        "the forward loss has grown threefold since the start: lower training.lr, or set "
        "training.adam_beta2=0.95",
    )


def against_the_target(diagnostics: Rows) -> Advice | None:
    """The residual score points away from v̂ at some noise level, update after update."""
    recent = [row["cosine"] for row in diagnostics[-YOUNG:] if "cosine" in row]
    if len(diagnostics) < 2 * YOUNG or len(recent) < YOUNG:
        return None
    for index, (low, high) in enumerate(diagnostics[-1]["steps"]):
        level = [row[index] for row in recent if row[index] is not None]
        if level and sum(level) / len(level) < -0.1:
            return Advice(
                diagnostics[-1]["update"],
                f"at steps {low} to {high} the model moves against the value gradient that it is "
                "fitted to: lower training.lr, or draw more trajectories per update",
            )
    return None


RULES: tuple[Callable[[Rows], Advice | None], ...] = (
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
