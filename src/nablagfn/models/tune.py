"""Switches that change how fast a Stable Diffusion policy runs, and not what it computes."""

from __future__ import annotations

import torch

from ..config import Speed
from .stable_diffusion import StableDiffusionPolicy

BACKEND = "inductor"
VARIANTS = 32  # θ on, off or frozen, with and without gradients, batches of several sizes


def tune(policy: StableDiffusionPolicy, speed: Speed) -> StableDiffusionPolicy:
    """Set the policy up as `speed` says; returns it."""
    if speed.channels_last:
        for module in (policy.unet, policy.vae):
            module.to(memory_format=torch.channels_last)
    if speed.compile:
        compile_parts(policy)
    if speed.offload_text_encoder:
        policy.offload_text_encoder()
    return policy


def compile_parts(policy: StableDiffusionPolicy) -> None:
    """torch.compile for the U-Net and the VAE's decoder, each variant at its first use.

    The reverse loss goes back twice through one graph, so compiled backward passes must not give
    their buffers away.
    """
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = VARIANTS
    for module in (policy.unet, policy.vae.decoder):
        module.compile(backend=BACKEND)
