"""SD1.5 towards HPSv2.1 on HPDv2 photo and painting prompts (Liu et al. 2025, section 4)."""

from ...config import Config


def get_config() -> Config:
    """The paper's setting."""
    config = Config()
    config.experiment.reward_fn = "hpsv2"
    config.experiment.prompt_fn = "hpd_photo_painting"
    config.evaluation.num_prompts = 20  # all that are held out
    config.training.batch_size = 2
    config.training.gradient_accumulation_steps = 16
    config.model.reward_scale = 1e4
    config.model.unet_reg_scale = 1e2
    return config
