"""A small decoder in place of the VAE's for the reward guess (AutoencoderTiny of diffusers)."""

from __future__ import annotations

import os

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from ..config import ConfigError
from ..core.types import Policy
from .latent import quiet

KEY = "config.model.guess_decoder"


class GuessDecoder:
    """Latents [M, C, H, W] to images as `Policy.decode` gives them, by an AutoencoderTiny."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        self.vae = vae.requires_grad_(False).eval()

    def __call__(self, x: Tensor) -> Tensor:
        latents = (x / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (self.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).to(x.dtype)


def load_guess_decoder(name: str, policy: Policy, dtype: torch.dtype) -> GuessDecoder:
    """Load it to the policy's device, by hub name or folder. Raises ConfigError if it does not fit.

    float16 becomes float32, as in the policy: reward gradients underflow in a float16 decoder.
    """
    wide = torch.float32 if dtype == torch.float16 else dtype
    try:
        with quiet():
            vae = AutoencoderTiny.from_pretrained(os.path.expanduser(name), dtype=wide)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{KEY}={name!r} cannot be loaded ({reason}): give the folder of an AutoencoderTiny, "
            f"or download it where there is network (`hf download {name}`)"
        ) from None
    if vae.config.latent_channels != policy.sample_shape[0] or len(policy.sample_shape) != 3:
        raise ConfigError(
            f"{KEY}={name!r} decodes latents of {vae.config.latent_channels} channels, the model "
            f"has samples of shape {list(policy.sample_shape)}: give a decoder made for it"
        )
    return GuessDecoder(vae.to(policy.device))
