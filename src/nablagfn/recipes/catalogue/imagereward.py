"""SD1.5 towards ImageReward on DrawBench prompts (Liu et al. 2025, section 4)."""

from ...config import Config


def get_config() -> Config:
    """The paper's setting: the defaults."""
    config = Config()
    config.experiment.reward_fn = "imagereward"
    config.experiment.prompt_fn = "drawbench"
    config.evaluation.num_prompts = 18  # all that are held out
    return config
