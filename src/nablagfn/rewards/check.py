"""Is a reward fit for training? Measured on noise, and on samples of the model where there are any.

Does its gradient reach the pixels, is it right and finite; does a score depend on its own picture
and prompt only; how large are scores and gradients.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ConfigError
from ..core import rng
from ..core.types import Metadata
from ..metrics import tilting
from ..metrics.tilting import PromptRows
from .registry import NamedReward

OK, WARN, FAIL, INFO = "ok", "warn", "FAIL", "info"
ARGUMENTS = ("images", "prompts", "metadata")
PROMPTS = ("a photo of a cat", "a red car in the snow", "two dogs", "an oil painting of a lake")
SIZE = 64  # pixels of the noise pictures where no samples are given
STEPS = (1e-2, 3e-3, 1e-3, 3e-4)  # root mean square of the changes for finite differences
AGREES, DISAGREES = 0.02, 0.2  # relative error of the finite differences
NEAR = 0.5  # nats: a finetune that shows, and that 8 samples of a prompt can state
LEAST = 8  # samples of a prompt for it
SAME = 1e-3  # of the scores' spread: rounding of other batch shapes


@dataclass(frozen=True)
class CheckRow:
    """One line of the table."""

    name: str
    verdict: str
    figure: str
    advice: str = ""


@dataclass(frozen=True)
class RewardCheck:
    """What was found about a reward. usable: nothing failed."""

    reward: str
    rows: tuple[CheckRow, ...]

    @property
    def usable(self) -> bool:
        return all(row.verdict != FAIL for row in self.rows)

    def row(self, name: str) -> CheckRow:
        """The line called `name`. Raises KeyError."""
        return {row.name: row for row in self.rows}[name]

    def table(self) -> str:
        """The lines of the table, aligned."""
        wide = max(len(row.name) for row in self.rows)
        lines = [f"reward {self.reward}"]
        for row in self.rows:
            advice = f" -> {row.advice}" if row.advice else ""
            lines.append(f"  {row.name:<{wide}}  {row.verdict:<4}  {row.figure}{advice}")
        lines.append("usable" if self.usable else "NOT usable")
        return "\n".join(lines)


@dataclass(frozen=True)
class Checked:
    """The reward with pictures [B, 3, H, W] to try it on, B >= 2, and what is asked of each."""

    reward: NamedReward
    images: Tensor
    prompts: tuple[str, ...]
    metadata: tuple[Metadata, ...]

    def __call__(self, images: Tensor, asked: Sequence[int] | None = None) -> Tensor:
        """Score the images, [m] float32. asked: whose prompt each has; by default its own."""
        rows = range(len(images)) if asked is None else asked
        prompts, metadata = [self.prompts[i] for i in rows], [self.metadata[i] for i in rows]
        return self.reward(images, prompts, metadata).float()

    def values(self, images: Tensor, asked: Sequence[int] | None = None) -> Tensor:
        """Score the images without a gradient."""
        with torch.no_grad():
            return self(images, asked)

    def gradient(self, images: Tensor) -> Tensor | None:
        """∇ of the scores in the pixels, [B, 3, H, W]; None when there is none."""
        x = images.detach().requires_grad_()
        try:
            value = self(x)
        except ConfigError:
            return None
        (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        return None if found is None else found.float()


def noise(count: int, height: int, width: int, device: torch.device) -> Tensor:
    """Smooth coloured noise in [0.1, 0.9], always the same; [count, 3, height, width]."""
    source = rng.generator(0, "check-reward")
    coarse = torch.rand(count, 3, 8, 8, generator=source)
    fine = torch.rand(count, 3, height, width, generator=source)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return (0.1 + 0.8 * (0.7 * smooth + 0.3 * fine)).to(device)


def check_reward(
    reward: NamedReward,
    samples: Tensor | None = None,
    prompts: Sequence[str] = (),
    *,
    metadata: Sequence[Metadata] = (),
    latent_gradient: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> RewardCheck:
    """Try a reward on noise and on `samples` [B, 3, H, W] in [0, 1] of the base model (optional),
    drawn for `prompts`.

    metadata: a mapping per prompt, or nothing. Noise is scored with prompts of its own, or, where
    a prompt has metadata, with those given: the reward may need what they say.
    latent_gradient: ∇_x r(decode(x)) at the samples, whose size is told.
    """
    device = samples.device if samples is not None else torch.device(device)
    height, width = (SIZE, SIZE) if samples is None else samples.shape[-2:]
    images = noise(len(PROMPTS), height, width, device)
    known = tuple(metadata) or ({},) * (len(prompts) if samples is None else len(samples))
    subject = Checked(reward, images, PROMPTS, ({},) * len(PROMPTS))
    if any(known):
        chosen = [i % len(known) for i in range(len(PROMPTS))]
        told = tuple(known[i] for i in chosen)
        subject = Checked(reward, images, tuple(prompts[i] for i in chosen), told)
    fatal = signature(reward) or runs(subject)
    if fatal:
        return RewardCheck(reward.name, (fatal,))
    base = None
    if samples is not None:
        with torch.no_grad():
            base = reward(samples, list(prompts), known).float()
    rows = [*values(subject), *gradients(subject), *sizes(subject, base)]
    if base is not None:
        rows += scale(subject, base, prompts)
    rows += sized(latent_gradient)
    return RewardCheck(reward.name, tuple(rows))


# -------------------------------------------------------------------------------- can it be called


def signature(reward: NamedReward) -> CheckRow | None:
    """A row when its parameters are named like ours and stand in another order."""
    try:
        names = list(inspect.signature(reward.function).parameters)
    except (TypeError, ValueError):  # callables without a signature
        return None
    known = [name for name in names if name in ARGUMENTS]
    if known == sorted(known, key=ARGUMENTS.index):
        return None
    return _swapped(names)


def _swapped(order: Sequence[str]) -> CheckRow:
    return CheckRow(
        "call",
        FAIL,
        f"swapped arguments: it takes ({', '.join(order)})",
        "it must take (images, prompts, metadata)",
    )


def runs(subject: Checked) -> CheckRow | None:
    """A row when a call fails or gives no score per picture."""
    try:
        subject.values(subject.images)
    except Exception as error:  # a user's reward may raise anything
        order = works_in_order(subject)
        if order:
            return _swapped(order)
        text = " ".join(str(error).split()) or type(error).__name__
        return CheckRow("call", FAIL, f"{type(error).__name__}: {text[:200]}")
    return None


def works_in_order(subject: Checked) -> tuple[str, ...] | None:
    """Another order of the three arguments in which it gives a score per picture."""
    count = len(subject.images)
    given = (subject.images, list(subject.prompts), list(subject.metadata))
    arguments: dict[str, Any] = dict(zip(ARGUMENTS, given, strict=True))
    for order in itertools.permutations(ARGUMENTS):
        try:
            value = subject.reward.function(*(arguments[name] for name in order))
        except Exception:
            continue
        if order != ARGUMENTS and isinstance(value, Tensor) and value.shape == (count,):
            return order
    return None


# -------------------------------------------------------------------------------- values


def values(subject: Checked) -> Iterator[CheckRow]:
    """Finite, varying, repeatable, independent of the batch, sensitive to the prompt?"""
    images, rows = subject.images, list(range(len(subject.images)))
    score = subject.values(images)
    yield finite("values", score)
    if not score.isfinite().all():
        return
    spread = max(float(score.std()), 1e-3 * float(score.abs().max()), 1e-12)
    unlike = subject.values(1 - images)
    if torch.equal(score, unlike) and float(score.std()) <= 1e-7 * float(score.abs().max()):
        yield CheckRow("varies", FAIL, "constant: the same score for every picture")
        return
    yield _same("repeatable", subject.values(images), score, spread, "switch off dropout: eval()")
    alone = torch.cat([subject.values(images[i : i + 1], [i]) for i in rows])
    turned = subject.values(images.flip(0), rows[::-1]).flip(0)
    worst = torch.stack([(alone - score).abs(), (turned - score).abs()]).amax(0)
    advice = "score i must depend on images[i] and prompts[i] only (stale prompts? batch norm?)"
    yield _same("batch-invariant", score + worst, score, spread, advice)
    moved = float((subject.values(images, rows[1:] + rows[:1]) - score).abs().max())
    sensitive = moved > SAME * spread
    figure = f"{moved:.3g} for other prompts" if sensitive else "ignores the prompt"
    if len(set(subject.prompts)) == 1:
        figure = "not measured: there is one prompt"
    yield CheckRow("prompt", INFO, figure)


def finite(name: str, found: Tensor) -> CheckRow:
    """Whether all numbers are finite."""
    good = float(found.isfinite().float().mean())
    if good == 1:
        return CheckRow(name, OK, "finite")
    return CheckRow(name, FAIL, f"NaN or infinite: {1 - good:.0%} of the {name}")


def _same(name: str, found: Tensor, known: Tensor, spread: float, advice: str) -> CheckRow:
    apart = float((found - known).abs().max()) / spread
    if apart <= SAME:
        return CheckRow(name, OK, f"to {apart:.1g} of the spread")
    return CheckRow(name, FAIL, f"differs by {apart:.2g} of the spread", advice)


# -------------------------------------------------------------------------------- gradients


def gradients(subject: Checked) -> Iterator[CheckRow]:
    """Does the gradient reach the pixels, is it finite, right, and there outside of [0, 1]?"""
    if not subject.reward.differentiable:
        yield CheckRow("gradient", INFO, "values only", "for methods that need no gradient")
        return
    if not bool(subject.values(subject.images).isfinite().all()):
        return
    found = subject.gradient(subject.images)
    if found is None or not bool(found.isfinite().all()) or float(found.abs().max()) == 0:
        yield no_gradient(subject, found)
        return
    reached = float((found.abs().amax(1) > 0).float().mean())
    yield CheckRow("gradient", OK, f"finite, at {reached:.0%} of the pixels")
    yield finite_differences(subject, found)
    yield outside(subject)
    yield half_precision(subject, found)


def no_gradient(subject: Checked, found: Tensor | None) -> CheckRow:
    """Why there is no gradient to use: NaN, rounding to 8 bits, a constant, or a detached graph."""
    if found is not None and not bool(found.isfinite().all()):
        return finite("gradient", found)
    images = subject.images
    score = subject.values(images)
    if torch.equal(score, subject.values(1 - images)):
        return CheckRow("gradient", FAIL, "zero: the score is constant")
    # a quarter step above an 8-bit level: a tenth of a step crosses no border, however one rounds
    level = ((images * 255).floor() + 0.25) / 255
    nudge = 0.1 / 255 * torch.where(images > images.mean(), 1.0, -1.0)
    if torch.equal(subject.values(level), subject.values(level + nudge)):
        return CheckRow(
            "gradient",
            FAIL,
            "rounded: small changes of pixels change nothing",
            "keep pixels as floats: no uint8, byte(), round() or PIL",
        )
    return CheckRow(
        "gradient",
        FAIL,
        "detached: the score follows the pixels, its graph does not",
        "remove detach(), no_grad(), item() and numpy from it",
    )


def finite_differences(subject: Checked, gradient: Tensor) -> CheckRow:
    """Central differences along the gradient, at the best of a few step sizes."""
    length = gradient.flatten(1).norm(dim=1).clamp(min=1e-30).reshape(-1, 1, 1, 1)
    unit = gradient / length
    known = length.flatten()
    root = gradient[0].numel() ** 0.5
    errors = []
    for step in STEPS:
        h = step * root
        ahead, behind = (subject.values(subject.images + s * h * unit) for s in (1, -1))
        errors.append(float((((ahead - behind) / (2 * h) - known) / known).abs().median()))
    best = min(errors)
    verdict = OK if best <= AGREES else WARN if best <= DISAGREES else FAIL
    advice = "" if verdict == OK else "its gradient is not that of its values, or values are rough"
    return CheckRow("finite differences", verdict, f"relative error {best:.1g}", advice)


def outside(subject: Checked) -> CheckRow:
    """Whether pixels outside of [0, 1] still have a gradient: a decoder overshoots."""
    stretched = (subject.images - 0.5) * 1.6 + 0.5
    beyond = (stretched < 0) | (stretched > 1)
    found = subject.gradient(stretched)
    if found is None or not bool(beyond.any()):
        return CheckRow("outside [0, 1]", INFO, "not measured")
    inside = (found[~beyond] != 0).float().mean()
    there = (found[beyond] != 0).float().mean()
    if float(there) < 0.5 * float(inside):
        return CheckRow(
            "outside [0, 1]",
            WARN,
            f"gradient at {float(there):.0%} of such pixels",
            "it clamps its input: remove the clamp, pixels there would never come back",
        )
    return CheckRow("outside [0, 1]", OK, f"gradient at {float(there):.0%} of such pixels")


def half_precision(subject: Checked, gradient: Tensor) -> CheckRow:
    """What bfloat16 inside would cost; rewards run in float32."""
    images = subject.images
    with torch.no_grad():
        value = subject.reward(images, subject.prompts, subject.metadata)
    if value.dtype not in (torch.float32, torch.float64):
        return CheckRow("precision", WARN, f"scores are {value.dtype}", "compute in float32")
    try:
        with torch.autocast(images.device.type, torch.bfloat16):
            rough = subject.gradient(images)
            apart = (subject.values(images) - value).abs().max() / value.std().clamp(min=1e-12)
    except Exception as error:  # some operators have no bfloat16 version
        return CheckRow(
            "precision", INFO, f"float32; bfloat16 not measured ({type(error).__name__})"
        )
    if rough is None:
        return CheckRow("precision", INFO, "float32; bfloat16 not measured")
    cosine = F.cosine_similarity(rough.flatten(1), gradient.flatten(1)).min()
    return CheckRow(
        "precision",
        INFO,
        f"float32; in bfloat16 scores move by {float(apart):.1g} of their spread, gradient cosine "
        f"{float(cosine):.3f}",
    )


# -------------------------------------------------------------------------------- sizes


def describe(found: Tensor) -> str:
    """Say mean, deviation and range."""
    low, high = float(found.min()), float(found.max())
    return f"{float(found.mean()):.4g} ± {float(found.std()):.3g}, {low:.4g} … {high:.4g}"


def sizes(subject: Checked, base: Tensor | None) -> Iterator[CheckRow]:
    """Range on noise and on samples; does noise score higher than samples?"""
    score = subject.values(subject.images)
    if not bool(score.isfinite().all()):
        return
    yield CheckRow("on noise", INFO, describe(score))
    if base is None:
        yield CheckRow(
            "on samples", INFO, "none given", "name a model: --config.pretrained.model=…"
        )
        return
    if not bool(base.isfinite().all()):
        yield finite("on samples", base)
        return
    yield CheckRow("on samples", INFO, describe(base))
    gap = float(base.mean() - score.mean())
    name = subject.reward.name
    if gap < -2 * float(base.std()):
        yield CheckRow(
            "sign", WARN, "noise scores higher than samples", f"to minimise it: '-{name}'"
        )
    else:
        yield CheckRow("sign", INFO, f"samples score {gap:+.3g} against noise")


def sized(latent_gradient: Tensor | None) -> Iterator[CheckRow]:
    """Root mean square of ∇_x r in the latents, which a unit Gaussian's score is about 1 in."""
    if latent_gradient is not None and bool((latent_gradient != 0).any()):
        rms = float(latent_gradient.square().mean().sqrt())
        yield CheckRow("gradient in latents", INFO, f"rms {rms:.2g}")


def scale(subject: Checked, base: Tensor | None, prompts: Sequence[str]) -> Iterator[CheckRow]:
    """Say where to start with model.reward_scale: the β whose target lies NEAR nats away.

    From the samples of several prompts, tilted within each; of fewer than 8 a prompt 1/std(r), at
    which a standard deviation of the reward is worth a factor e.
    """
    if base is None or not float(base.std()) > 0 or not bool(base.isfinite().all()):
        return
    name, std = subject.reward.name, float(base.std())
    normalise = f"{name}={float(base.mean()):.4g}/{std:.3g}"
    if " " not in name:  # of a sum, each component would have its own
        yield CheckRow("normalise", INFO, f"--config.reward.normalise={normalise}")
    reward, groups = base.double().cpu(), PromptRows.of(prompts)
    advice = "the target of any β or budget: nablagfn target"
    if groups.fewest < LEAST:
        yield CheckRow("reward_scale", INFO, f"{1 / std:.2g} by the spread", advice)
        return
    try:
        beta = tilting.beta_of_kl(reward, NEAR, groups)
    except ValueError as error:
        yield CheckRow("reward_scale", INFO, f"{1 / std:.2g} by the spread; {error}", advice)
        return
    gain = float(tilting.target_reward(reward, beta, groups) - tilting.plain_mean(reward, groups))
    yield CheckRow(
        "reward_scale",
        INFO,
        f"{beta:.2g} for a target at {NEAR:g} nats, {gain / std:+.2f} standard deviations up",
        advice,
    )
