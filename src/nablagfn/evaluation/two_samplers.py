"""Paths of two samplers weighted as one set: p_θ's know where the target is, p_#'s where the policy
never goes.

Half of the paths of a prompt are from each, so that together they are of m = ½(p_θ + p_#). Against
m no path of the target p* = p_#·exp(βr)/Z weighs more than 2·exp(βr)/Z, whatever the policy has
learned (the balance heuristic: Veach & Guibas, SIGGRAPH 1995). With h = p_θ/m, f = h·w =
p_#·exp(βr)/m and means over the paths that were drawn,

    Z           = mean f / mean h
    KL(p_θ‖p*)  = mean h·log(Z/w)
    KL(p*‖p_θ)  = mean (f/Z)·log(w/Z)

where E_m[h] = 1. All three are exact, from any paths, for a policy that draws its target (w = Z
everywhere), and the KLs are never negative: u·log(u/v) ≥ u − v for u, v = h, f/Z or f/Z, h, whose
means are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..metrics.tilting import PromptRows, effective_share, weighted_mean


@dataclass(frozen=True, eq=False)
class TwoSamplers:
    """2n paths against the target: p_θ's, and then as many of p_#; rows i and n + i are of one
    prompt and one noise.

    log_w, log_h: [2n]. Figures are means over prompts, [R or 1]; counts: [R, n], how often each
    pair of paths is taken in each bootstrap resample.
    """

    log_w: Tensor
    log_h: Tensor
    pairs: PromptRows
    groups: PromptRows

    @staticmethod
    def of(log_w: Tensor, log_ratio: Tensor, prompts: Sequence[str]) -> TwoSamplers:
        """log_w, log_ratio: [2n] log p_#·exp(βr)/p_θ and log p_θ/p_# of the paths. prompts: n."""
        log_h = math.log(2) + logsigmoid(log_ratio.double())
        both = PromptRows.of([*prompts, *prompts])
        return TwoSamplers(log_w.double(), log_h, PromptRows.of(prompts), both)

    @property
    def log_f(self) -> Tensor:
        return self.log_w + self.log_h

    def log_z(self, counts: Tensor | None = None) -> Tensor:
        return self._log_z(self._log_shares(counts)).mean(-1)

    def kl_to_target(self, counts: Tensor | None = None) -> Tensor:
        """KL(p_θ‖p*)."""
        shares = self._log_shares(counts)
        above = self._log_z(shares)[..., None] - self.log_w[self.groups.rows]
        return ((self.log_h[self.groups.rows] + shares).exp() * above).sum(-1).mean(-1)

    def kl_from_target(self, counts: Tensor | None = None) -> Tensor:
        """KL(p*‖p_θ)."""
        shares = self._log_shares(counts)
        log_z = self._log_z(shares)[..., None]
        weights = (self.log_f[self.groups.rows] + shares - log_z).exp()
        return (weights * (self.log_w[self.groups.rows] - log_z)).sum(-1).mean(-1)

    def target_mean(self, values: Tensor, counts: Tensor | None = None) -> Tensor:
        """E*[values], mean f·values / mean f. values: [2n]."""
        return weighted_mean(values, self.log_f, self.groups, twice(counts))

    @property
    def effective_pairs(self) -> float:
        """How many pairs of a prompt carry the target: M times the effective share of their f."""
        own, base = self.log_f.chunk(2)
        share = effective_share(torch.logaddexp(own, base), self.pairs)
        return float(share) * self.pairs.fewest

    def _log_shares(self, counts: Tensor | None) -> Tensor:
        """log of each path's share in a mean over its prompt's, [R or 1, P, 2M]."""
        return self.groups.log_counts(twice(counts)).log_softmax(-1)

    def _log_z(self, shares: Tensor) -> Tensor:
        """log Z of each prompt, [R or 1, P]."""
        rows = self.groups.rows
        return (self.log_f[rows] + shares).logsumexp(-1) - (self.log_h[rows] + shares).logsumexp(-1)


def twice(counts: Tensor | None) -> Tensor | None:
    """The counts [R, 2n] of the paths, from those of their pairs."""
    return None if counts is None else torch.cat([counts, counts], 1)
