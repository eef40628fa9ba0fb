"""The settings that every world shares: `--config=worlds/NAME`, or `--config=` a world file."""

from __future__ import annotations

from ..config import Config
from ..worlds import load

SAMPLES = 4000  # per prompt, when measuring
NUM_STEPS = 80
TRANSITIONS = 6  # of each path


def get_config(name: str) -> Config:
    """∇-DB(λ), 1,000 updates of 64 trajectories x 6 transitions.

    Raises ConfigError when there is no such world.
    """
    world = load(name)
    config = Config()
    config.pretrained.model = world.name
    config.experiment.reward_fn = world.name
    config.experiment.prompt_fn = world.name
    config.experiment.method = "nabla-db-lambda"
    config.method.window = TRANSITIONS
    config.method.return_lambda = 0.9
    config.model.reward_adaptive_mode = "none"
    config.model.reward_scale = world.beta
    config.model.unet_reg_scale = 0.0  # one update per epoch: nothing to hold on to
    config.model.timestep_fraction = (TRANSITIONS - 1) / NUM_STEPS  # and the last
    config.sampling.num_steps = NUM_STEPS
    config.sampling.guidance_scale = 1.0
    config.sampling.batch_size = 64
    config.sampling.num_batches_per_epoch = 1
    config.training.batch_size = 64
    config.training.gradient_accumulation_steps = 1
    config.training.micro_batch = 1024
    config.training.lr = config.training.flow_lr = 2e-3
    config.training.lr_schedule = "cosine"
    config.training.adam_beta2 = 0.95
    config.training.adam_weight_decay = config.training.flow_wd = 0.0
    config.training.num_epochs = 1000
    config.evaluation.num_prompts = len(world.prompts)
    config.evaluation.images_per_prompt = SAMPLES
    config.evaluation.batch_size = SAMPLES
    config.logging.samples_per_prompt = SAMPLES
    config.logging.num_samples = SAMPLES * len(world.prompts)
    config.logging.sample_freq = config.logging.save_freq = 250
    config.logging.tensorboard = False
    return config
