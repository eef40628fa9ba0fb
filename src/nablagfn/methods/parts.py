"""What the methods are built from, and the matching loss that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..config import Config
from ..core.kernels import KernelTable
from ..core.log_reward import LogReward, untempered
from ..core.lookahead import How
from ..core.rollout import StepChoice, WindowChoice
from ..core.types import Objective, Policy, Reward
from ..core.value_gradient import Estimator, StepWeight
from ..prompts import PromptSet
from ..runtime.distributed import weight_dtype
from .objectives.matching import MatchingObjective


@dataclass(frozen=True)
class Parts:
    """What every method is built from. temper: what β is multiplied by, asked for at each use."""

    config: Config
    policy: Policy
    reward: Reward
    prompts: PromptSet
    table: KernelTable
    temper: Callable[[], float] = untempered

    @property
    def log_reward(self) -> LogReward:
        name = self.config.model.guess_decoder
        return LogReward(
            self.policy,
            self.reward,
            self.config.model.reward_scale,
            temper=self.temper,
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

    @property
    def how(self) -> How:
        return How(self.config.method.guess, self.config.method.shift_cap)

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
            quantile=self.config.method.clip_quantile,
        )
