"""tiny-animals towards warm colours, beside its exact target, in minutes on two CPU cores
(`make demo`)."""

from ...config import Config
from . import demo


def get_config() -> Config:
    """nabla-db-pool with the linear fit; figures in docs/pool.md."""
    config = demo.get_config()
    config.experiment.reward_fn = "warmth"
    config.experiment.method = "nabla-db-pool"
    config.model.reward_scale = 6.0  # a target of 0.8 nats
    config.model.lora_until = 0.3  # backgrounds are decided before that
    config.model.lora_fade = 0.5  # most of the target is there at the first steps
    config.model.timestep_fraction = 0.25  # 2 of the 8 steps at which the LoRA acts
    config.pool.gradient = "linear"
    config.pool.shift_start = True  # a quarter of the target is decided before the first step
    config.pool.size = 360
    config.pool.images_per_prompt = 15  # eight know too little of their mean weight
    config.sampling.batch_size = 32
    config.training.batch_size = 32
    config.training.micro_batch = 64
    config.training.num_epochs = 50
    config.training.lr = 2e-4
    config.training.lr_schedule = "cosine"
    config.training.adam_beta2 = 0.99
    config.evaluation.num_prompts = 24
    config.evaluation.images_per_prompt = 8
    config.logging.sample_freq = 25
    config.logging.save_freq = 25
    return config
