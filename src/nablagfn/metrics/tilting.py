"""The tilted target p*(x) ∝ p(x)·exp(βr(x)) of each prompt, from weighted samples.

M samples of a prompt with weights w ∝ exp(log w): of the pretrained sampler with log w = β·r, or of
the finetuned one with the path weights (`core.path_kl`). By the Gibbs principle no sampler q
with KL(q‖p) ≤ KL*(β) has a larger mean reward than E*(β): all β together are the best frontier of
reward against KL that exists.

Weights are normalised within each prompt, whose samples alone share a target; figures are then
averaged over prompts. log w: [n]; groups: the prompt of each row; counts: [R, n], how often each
sample is taken in each bootstrap resample (`intervals.resampled_counts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import rows_of

STEPS = 40  # halvings of a search for β
LARGEST = 1e12  # of β: beyond it a target is its best sample alone


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Samples arranged by prompt: rows[p, i] is the i-th sample of prompt p.

    Prompts with fewer samples than others are filled up with rows that are marked absent: there
    is [P, M] booleans.
    """

    rows: Tensor
    there: Tensor

    @staticmethod
    def of(groups: Sequence[object]) -> PromptRows:
        own = list(rows_of(groups).values())
        most = max(map(len, own))
        rows = torch.stack([torch.cat([r, r.new_zeros(most - len(r))]) for r in own])
        sizes = torch.tensor([len(r) for r in own])
        return PromptRows(rows, torch.arange(most) < sizes[:, None])

    @property
    def fewest(self) -> int:
        """M, the samples of the prompt that has fewest."""
        return int(self.there.sum(1).min())

    def log_counts(self, counts: Tensor | None) -> Tensor:
        """log of how often each sample counts, [R or 1, P, M]; −∞ where there is none."""
        taken = self.there[None].double()
        if counts is not None:
            taken = taken * counts[:, self.rows].double()
        return taken.log()


def log_mean(log_w: Tensor, groups: PromptRows, counts: Tensor | None = None) -> Tensor:
    """log of the mean weight of each prompt, averaged over prompts, [R or 1]: log Z's estimate."""
    taken = groups.log_counts(counts)
    total = (log_w.double()[..., groups.rows] + taken).logsumexp(-1)
    return (total - taken.logsumexp(-1)).mean(-1)


def normalised(log_w: Tensor, groups: PromptRows, counts: Tensor | None = None) -> Tensor:
    """Weights that sum to 1 within each prompt, [R or 1, P, M]."""
    return (log_w.double()[..., groups.rows] + groups.log_counts(counts)).softmax(-1)


def weighted_mean(
    values: Tensor, log_w: Tensor, groups: PromptRows, counts: Tensor | None = None
) -> Tensor:
    """E*[values] of each prompt, averaged over prompts, [R or 1]. values: [n]."""
    weights = normalised(log_w, groups, counts)
    return (weights * values.double()[groups.rows]).sum(-1).mean(-1)


def plain_mean(values: Tensor, groups: PromptRows, counts: Tensor | None = None) -> Tensor:
    """The mean of each prompt, averaged over prompts, [R or 1]."""
    return weighted_mean(values, torch.zeros_like(values), groups, counts)


def effective_share(log_w: Tensor, groups: PromptRows, counts: Tensor | None = None) -> Tensor:
    """(Σw)²/(M·Σw²) of each prompt, averaged over prompts, in 1/M..1, [R or 1].

    The effective sample size (Kong 1992) as a share of M. It cannot see what was never drawn: of a
    mode that no sample has, the weights know nothing.
    """
    taken = groups.log_counts(counts)
    of_rows = log_w.double()[..., groups.rows]
    once, twice = (of_rows + taken).logsumexp(-1), (2 * of_rows + taken).logsumexp(-1)
    return (2 * once - twice - taken.logsumexp(-1)).exp().mean(-1)


# ------------------------------------------------------------------------------------ the frontier


def target_reward(
    reward: Tensor, beta: float | Tensor, groups: PromptRows, counts: Tensor | None = None
) -> Tensor:
    """E*[r] at β from samples of p, [R or 1]. beta: one number, or one per resample [R]."""
    return weighted_mean(reward, tilt(reward, beta), groups, counts)


def target_kl(
    reward: Tensor, beta: float | Tensor, groups: PromptRows, counts: Tensor | None = None
) -> Tensor:
    """KL*(β) = KL(p*‖p) = β·E*[r] − log E_p[exp(βr)] in nats, [R or 1]; rises with β from 0."""
    return kl_by_prompt(reward, beta, groups, counts).mean(-1)


def kl_by_prompt(
    reward: Tensor, beta: float | Tensor, groups: PromptRows, counts: Tensor | None = None
) -> Tensor:
    """KL*(β) of each prompt, [R or 1, P] ≥ 0: Σ_i w_i log(w_i/n_i), n the weights at β = 0."""
    taken = groups.log_counts(counts)
    at_zero = taken - taken.logsumexp(-1, keepdim=True)
    own = reward.double()[groups.rows]
    below = own - own.masked_fill(~groups.there, -torch.inf).amax(-1, keepdim=True)  # keeps digits
    log_w = torch.as_tensor(beta, dtype=torch.float64)[..., None, None] * below + taken
    log_w = log_w - log_w.logsumexp(-1, keepdim=True)
    apart = torch.where(taken > -torch.inf, log_w - at_zero, 0.0)
    return (log_w.exp() * apart).sum(-1).clamp(min=0)


def tilt(reward: Tensor, beta: float | Tensor) -> Tensor:
    """log w = β·r, [n]; [R, n] for β [R]."""
    return torch.as_tensor(beta, dtype=torch.float64)[..., None] * reward.double()


def most_kl(groups: PromptRows) -> float:
    """The KL* up to which M samples of a prompt say anything: log M − 1 nats.

    The weights of a target at KL nats are carried by a share exp(−KL) of the samples, so that
    beyond it fewer than e of M samples would speak for it.
    """
    return math.log(groups.fewest) - 1


def solve_beta(
    figure: Callable[[Tensor], Tensor], wanted: Tensor | float, resamples: int = 1
) -> Tensor:
    """β ≥ 0 at which a rising figure [R] of β [R] takes a value, [R]; 0 where it starts above it.

    LARGEST where it never does.
    """
    low = torch.zeros(resamples, dtype=torch.float64)
    high = torch.full_like(low, 1e-6)
    while bool((short := figure(high) < wanted).any()) and float(high.max()) < LARGEST:
        high = torch.where(short, 4 * high, high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        below = figure(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def beta_of_kl(reward: Tensor, kl: float, groups: PromptRows) -> float:
    """β at which KL*(β) is that many nats. Raises ValueError beyond `most_kl`, and where no β
    reaches it since samples of a prompt share the largest reward."""
    if kl > most_kl(groups):
        raise ValueError(
            f"{groups.fewest} samples of a prompt say nothing of a KL above "
            f"{most_kl(groups):.2g} nats"
        )
    beta = float(solve_beta(lambda beta: target_kl(reward, beta, groups), kl))
    if beta > LARGEST / 2:
        end = float(target_kl(reward, LARGEST, groups))
        raise ValueError(
            f"samples share the largest reward of their prompt: no β is further than {end:.2g} nats"
        )
    return beta


def beta_of_reward(reward: Tensor, wanted: float, groups: PromptRows) -> float:
    """β at which E*[r] is that. Raises ValueError where its KL* is beyond `most_kl`."""
    beta = float(solve_beta(lambda beta: target_reward(reward, beta, groups), wanted))
    if beta > LARGEST / 2 or float(target_kl(reward, beta, groups)) > most_kl(groups):
        raise ValueError(
            f"{groups.fewest} samples of a prompt do not reach so far: their frontier ends at "
            f"{most_kl(groups):.2g} nats"
        )
    return beta


def least_kl(
    reward: Tensor, wanted: float | Tensor, groups: PromptRows, counts: Tensor | None = None
) -> Tensor:
    """KL* at which the best sampler has the mean reward `wanted`, [R or 1] nats.

    0 where p has it already; NaN beyond `most_kl`. Rewards may be of other samples than p's: this
    is what the gain of any sampler needs at least.
    """
    resamples = 1 if counts is None else len(counts)
    beta = solve_beta(lambda b: target_reward(reward, b, groups, counts), wanted, resamples)
    found = target_kl(reward, beta, groups, counts).clamp(min=0)
    beyond = (found > most_kl(groups)) | (beta > LARGEST / 2)
    return torch.where(beyond, torch.nan, found)


def halved(
    figure: Callable[[Tensor, PromptRows], Tensor], values: Tensor, groups: PromptRows
) -> float:
    """What the figure of M samples is off by, judged from those of M/2.

    A bias that falls as 1/M is f(M/2) − f(M): negative where few samples give too little. NaN with
    fewer than 4 samples of some prompt.
    """
    if groups.fewest < 4:
        return math.nan
    parts = [
        float(figure(values, PromptRows(groups.rows[:, i::2], groups.there[:, i::2])))
        for i in range(2)
    ]
    return sum(parts) / 2 - float(figure(values, groups))


def systematic(weights: Tensor, count: int, u: float) -> Tensor:
    """Rows drawn by their weights [M] (sum 1), each ⌊count·w⌋ or ⌈count·w⌉ times, [count] sorted.

    Systematic resampling (Kitagawa 1996): one u in [0, 1) for equally spaced places.
    """
    places = (torch.arange(count, dtype=torch.float64) + u) / count
    edges = weights.double().cumsum(0)
    return torch.searchsorted(edges / edges[-1], places, right=True).clamp(max=len(weights) - 1)
