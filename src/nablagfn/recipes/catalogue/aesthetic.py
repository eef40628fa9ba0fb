"""SD1.5 towards the LAION aesthetic score on 45 animals (Liu et al. 2025, section 4)."""

from ...config import Config


def get_config() -> Config:
    """The paper's setting; the command of its README raises reward_scale to 1e4."""
    config = Config()
    config.experiment.reward_fn = "aesthetic"
    config.experiment.prompt_fn = "simple_animals"
    return config
