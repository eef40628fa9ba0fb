"""Which parts make a method: the only code that knows every objective and estimator by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..config import Config, ConfigError
from ..core.kernels import KernelTable, kernel_table
from ..core.lookahead import LogReward
from ..core.rollout import StepChoice, WindowChoice
from ..core.samplers import eta_of, find_sampler
from ..core.schedules import schedule_of
from ..core.types import Objective, Policy, Reward
from ..core.value_gradient import Estimator, StepWeight
from ..prompts import PromptSet
from ..rewards import require_gradient
from ..runtime.distributed import weight_dtype
from .estimators.adjoint_matching import AdjointMatching
from .estimators.guess import Guess
from .estimators.nabla_db_lambda import NablaDBLambda
from .estimators.residual_db import ResidualDB
from .estimators.terminal_gradient import TerminalGradient
from .objectives.alignprop import AlignProp
from .objectives.dag_db import DagDB
from .objectives.ddpo import DDPO, PromptStatistics
from .objectives.draft import DraftK
from .objectives.draft_lv import DraftLV
from .objectives.matching import MatchingObjective
from .objectives.refl import ReFL

GUESSING = ("nabla-db", "nabla-db-lambda", "dag-db")  # decode predicted clean samples as a guess


def build_kernel(config: Config, policy: Policy) -> KernelTable:
    """The sampler's table. Raises ConfigError when the settings give a step without noise."""
    s = config.sampling
    grid = find_sampler(s.scheduler).grid
    try:
        if isinstance(grid, str):
            times = policy.times(grid, s.num_steps)
        else:
            times = grid(policy.noising, s.num_steps)
        schedule = schedule_of(policy.noising, times)
        return kernel_table(schedule, eta_of(s), policy.prediction)
    except ValueError as error:
        raise ConfigError(f"config.sampling.num_steps={s.num_steps}: {error}") from None


@dataclass(frozen=True)
class Parts:
    """What every method is built from."""

    config: Config
    policy: Policy
    reward: Reward
    prompts: PromptSet
    table: KernelTable

    @property
    def log_reward(self) -> LogReward:
        name = self.config.model.guess_decoder
        return LogReward(
            self.policy,
            self.reward,
            self.config.model.reward_scale,
            piece=self.config.training.vae_slice,
            decoder=self._guess_decoder(name) if name else None,
        )

    def _guess_decoder(self, name: str) -> Callable[[Tensor], Tensor]:
        """Raises ConfigError when it cannot be had."""
        from ..models.guess_decoder import load_guess_decoder  # imports diffusers

        return load_guess_decoder(name, self.policy, weight_dtype(self.config, self.policy.device))

    @property
    def chunk(self) -> int:
        """Rows per forward pass."""
        return self.config.training.micro_batch or self.config.training.batch_size

    @property
    def steps(self) -> StepChoice:
        return StepChoice(
            self.config.model.timestep_fraction, self.config.sampling.low_var_subsampling
        )

    def flow(self, hint: bool = False) -> nn.Module:
        """A new g_φ."""
        m, seed = self.config.model, self.config.seed
        return self.policy.make_flow(m.flow_channel_width, m.flow_layers_per_block, seed, hint=hint)

    def weight(self, auto: StepWeight) -> StepWeight:
        chosen = self.config.method.step_weight
        return auto if chosen == "auto" else chosen

    def frozen_guess(self, auto: bool) -> bool:
        chosen = self.config.method.guess_model
        return auto if chosen == "auto" else chosen == "pretrained"

    def matching(
        self,
        estimator: Estimator,
        weight: StepWeight,
        steps: StepChoice | WindowChoice | None = None,
    ) -> Objective:
        """The matching loss around an estimator."""
        return MatchingObjective(
            self.policy,
            self.table,
            estimator,
            strength=self.config.model.pretrained_strength,
            trust=self.config.model.unet_reg_scale,
            weight=weight,
            steps=steps or self.steps,
        )


def build_objective(
    config: Config, policy: Policy, reward: Reward, prompts: PromptSet, table: KernelTable
) -> Objective:
    """The objective of `experiment.method`.

    Raises ConfigError when the reward lacks a gradient, or for a decoder that the method ignores.
    """
    method, decoder = config.experiment.method, config.model.guess_decoder
    if decoder and method not in GUESSING:
        raise ConfigError(
            f"config.model.guess_decoder={decoder!r} has no use in {method}, which guesses no "
            f"reward: leave it out, or take {', '.join(GUESSING)}"
        )
    objective = METHODS[method](Parts(config, policy, reward, prompts, table))
    if objective.uses_reward_gradient:
        require_gradient(reward, method)
    return objective


def _nabla_db(p: Parts) -> Objective:
    """Residual ∇-DB; with `model.no_flow` the guess alone."""
    m = p.config.model
    estimator: Estimator
    if m.no_flow:
        estimator = Guess(
            p.policy, p.log_reward, m.reward_adaptive_mode, frozen_guess=p.frozen_guess(False)
        )
    elif p.frozen_guess(False):
        raise ConfigError(
            "config.method.guess_model=pretrained is for nabla-db-lambda, or nabla-db with "
            "config.model.no_flow=True: the published reverse loss guesses with the finetuned model"
        )
    else:
        estimator = ResidualDB(
            p.policy,
            p.log_reward,
            m.reward_adaptive_mode,
            p.flow(),
            reverse_scale=m.reverse_loss_scale,
            strength=m.pretrained_strength,
        )
    return p.matching(estimator, p.weight("one"))


def _nabla_db_lambda(p: Parts) -> Objective:
    lam, window = p.config.method.return_lambda, p.config.method.window
    learns = (lam < 1 or window > 0) and not p.config.model.no_flow
    hint = p.config.method.flow_hint
    weight = p.weight("std")
    estimator = NablaDBLambda(
        p.policy,
        p.log_reward,
        p.table,
        p.config.model.reward_adaptive_mode,
        p.flow(hint) if learns else None,
        hint=hint,
        lam=lam,
        weight=weight,
        frozen_guess=p.frozen_guess(True),
        window=window > 0,
        chunk=p.chunk,
    )
    return p.matching(estimator, weight, WindowChoice(window) if window else None)


def _adjoint_matching(p: Parts) -> Objective:
    estimator = AdjointMatching(p.policy, p.log_reward, p.table, chunk=p.chunk)
    return p.matching(estimator, p.weight("std"))


def _terminal_gradient(p: Parts) -> Objective:
    return p.matching(TerminalGradient(p.log_reward, chunk=p.chunk), p.weight("std"))


def _refl(p: Parts) -> Objective:
    return ReFL(p.policy, p.log_reward, p.table, share=p.config.method.refl_share)


def _draft_k(p: Parts) -> Objective:
    return DraftK(p.policy, p.log_reward, p.table, steps=p.config.method.draft_steps)


def _draft_lv(p: Parts) -> Objective:
    return DraftLV(p.policy, p.log_reward, p.table, copies=p.config.method.draft_lv_samples)


def _alignprop(p: Parts) -> Objective:
    return AlignProp(p.policy, p.log_reward, p.table)


def _ddpo(p: Parts) -> Objective:
    m = p.config.method
    if m.prompt_min_count > m.prompt_buffer:
        raise ConfigError(
            f"config.method.prompt_min_count={m.prompt_min_count} exceeds "
            f"config.method.prompt_buffer={m.prompt_buffer}: no prompt would ever have enough"
        )
    return DDPO(
        p.policy,
        p.table,
        PromptStatistics(p.prompts.prompts, m.prompt_buffer, m.prompt_min_count),
        clip=m.clip_range,
        advantage_clip=m.advantage_clip,
        steps=p.steps,
    )


def _dag_db(p: Parts) -> Objective:
    return DagDB(
        p.policy,
        p.log_reward,
        p.table,
        p.config.model.reward_adaptive_mode,
        p.flow(),
        frozen_guess=p.frozen_guess(False),
        steps=p.steps,
    )


METHODS: dict[str, Callable[[Parts], Objective]] = {
    "nabla-db": _nabla_db,
    "nabla-db-lambda": _nabla_db_lambda,
    "adjoint-matching": _adjoint_matching,
    "terminal-gradient": _terminal_gradient,
    "refl": _refl,
    "draft-k": _draft_k,
    "draft-lv": _draft_lv,
    "alignprop": _alignprop,
    "ddpo": _ddpo,
    "dag-db": _dag_db,
}
