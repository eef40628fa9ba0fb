"""tiny-animals towards the glossy style, in minutes on two CPU cores (`make demo`)."""

from ..config import Config


def get_config() -> Config:
    """Settings chosen on this model; `docs/log.md` has the frontier they were chosen from."""
    config = Config()
    config.pretrained.model = "tiny-animals"
    config.experiment.reward_fn = "tiny-aesthetic"
    config.experiment.prompt_fn = "simple_animals"
    return config
