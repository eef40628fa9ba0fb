"""All options of a run."""

from __future__ import annotations

from pydantic import Field

from .base import ConfigError, Group
from .evaluation import Evaluation
from .experiment import Experiment
from .guard import GuardSettings
from .logs import Logging, Saving
from .method import MethodSettings
from .model import Model
from .pool import PoolSettings
from .pretrained import Pretrained
from .reward import RewardSettings
from .sampling import Sampling
from .speed import Speed
from .training import Training


class Config(Group):
    """All settings of one run. `seed` is set by --seed."""

    seed: int = Field(0, ge=0, description="seed of the run")
    training: Training = Field(default_factory=Training)
    speed: Speed = Field(default_factory=Speed)
    model: Model = Field(default_factory=Model)
    experiment: Experiment = Field(default_factory=Experiment)
    method: MethodSettings = Field(default_factory=MethodSettings)
    pool: PoolSettings = Field(default_factory=PoolSettings)
    reward: RewardSettings = Field(default_factory=RewardSettings)
    sampling: Sampling = Field(default_factory=Sampling)
    pretrained: Pretrained = Field(default_factory=Pretrained)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    guard: GuardSettings = Field(default_factory=GuardSettings)
    logging: Logging = Field(default_factory=Logging)
    saving: Saving = Field(default_factory=Saving)

    def check(self) -> None:
        """Raises ConfigError when settings contradict each other."""
        self.updates_per_epoch()
        if self.guard.max_held_out_drop and not self.evaluation.held_out_rewards:
            raise ConfigError(
                f"config.guard.max_held_out_drop={self.guard.max_held_out_drop:g} needs a reward "
                "to watch: set config.evaluation.held_out_rewards"
            )
        if self.guard.active and not (self.logging.eval_freq or self.logging.sample_freq):
            raise ConfigError(
                "the guard needs measurements: set config.logging.eval_freq (epochs between them)"
            )
        if self.speed.fused_optimizer and self.training.optimizer != "adamw":
            raise ConfigError(
                "config.speed.fused_optimizer=True has a meaning for "
                "config.training.optimizer=adamw only"
            )
        for name in ("compile", "cuda_graphs", "channels_last"):
            if self.training.shard_base and getattr(self.speed, name):
                raise ConfigError(
                    "config.training.shard_base=True was not tried with "
                    f"config.speed.{name}: leave one out"
                )

    def updates_per_epoch(self) -> int:
        """Optimizer updates per inner epoch. Raises ConfigError when the batches do not divide."""
        drawn = self.sampling.batch_size * self.sampling.num_batches_per_epoch
        used = self.training.batch_size * self.training.gradient_accumulation_steps
        if drawn % used:
            raise ConfigError(
                f"training.batch_size x training.gradient_accumulation_steps = {used} must divide "
                f"sampling.batch_size x sampling.num_batches_per_epoch = {drawn}"
            )
        return drawn // used
