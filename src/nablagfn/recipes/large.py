"""What the recipes of large models share; docs/models.md says where each setting is from."""

from ..config import Config


def large(model: str, *, guidance: float, pixels: int = 512) -> Config:
    """Residual ∇-DB without g_φ towards the LAION aesthetic score, in as little memory as it takes.

    model: hub name. guidance: w. pixels: height and width.
    """
    config = Config()
    config.pretrained.model = model
    config.experiment.reward_fn = "aesthetic"
    config.experiment.prompt_fn = "simple_animals"
    config.model.no_flow = True
    config.model.lora_rank = 32
    config.model.reward_scale = 1e4
    config.model.timestep_fraction = 0.25
    config.model.unet_reg_scale = 0.0  # one update per epoch: nothing to hold on to
    config.sampling.num_steps = 20
    config.sampling.guidance_scale = guidance
    config.sampling.height = config.sampling.width = pixels
    config.sampling.batch_size = 4
    config.sampling.num_batches_per_epoch = 1
    config.training.batch_size = 4
    config.training.gradient_accumulation_steps = 1
    config.training.micro_batch = 1
    config.training.lr = 3e-4
    config.training.num_epochs = 400
    config.training.gradient_checkpointing = True
    config.training.vae_slice = 1
    config.speed.offload_text_encoder = True
    return config
