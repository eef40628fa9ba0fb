"""tiny-animals towards the glossy style by the published method, in minutes on two CPU cores."""

from ...config import Config


def get_config() -> Config:
    """The full method (flow network, reverse and terminal loss), small; figures in docs/log.md."""
    config = Config()
    config.pretrained.model = "tiny-animals"
    config.experiment.reward_fn = "tiny-aesthetic"
    config.experiment.prompt_fn = "simple_animals"
    config.model.reward_scale = 1e3
    config.model.unet_reg_scale = 0.0  # one update per epoch: nothing to hold on to
    config.model.timestep_fraction = 0.2  # 4 of 20 transitions, and the last
    config.model.flow_channel_width = (32, 64, 96)
    config.sampling.num_steps = 20
    config.sampling.spacing = "logsnr"  # each step weighs alike in the path KL
    config.sampling.guidance_scale = 1.0  # half the cost; tiny-animals needs no guidance
    config.sampling.batch_size = 16
    config.sampling.num_batches_per_epoch = 1
    config.training.batch_size = 16
    config.training.gradient_accumulation_steps = 1
    config.training.micro_batch = 40
    config.training.num_epochs = 36
    config.evaluation.num_prompts = 45
    config.evaluation.images_per_prompt = 6
    config.logging.sample_freq = 12
    config.logging.save_freq = 6
    return config
