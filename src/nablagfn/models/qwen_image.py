"""Qwen-Image: packed latents of one frame, prompts of any length, guidance that keeps the norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor
from torch.nn import functional

from .latent_model import FlowModel, packed, unpacked
from .lora import QWEN_IMAGE

EMBEDS, MASK = "prompt_embeds", "prompt_embeds_mask"
ROUND = 32  # lengths of prompts come in multiples of it, so that a compiled network sees few


class QwenImage(FlowModel):
    """A loaded Qwen-Image pipeline (Qwen team 2025).

    The pipeline's own steps end at σ = 0.02 before 0 (its scheduler's shift_terminal). A run's end
    at `FLOW_END` and need no such stretch.
    """

    family = "qwen-image"
    pipeline_class = QwenImagePipeline
    lora_targets = QWEN_IMAGE
    own_tokens = 512
    tells_sigmas = True
    patch = 2

    def idle_layers(self) -> set[str]:
        """The last block's prompt stream is dropped, and with it what only it depends on."""
        last = f"transformer_blocks.{self.network.config.num_layers - 1}"
        ends = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        return {f"{last}.{end}" for end in ends}

    def channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The template's beginning is left out by the pipeline; what is missing to `tokens` is 0
        and not attended to."""
        embeds, mask = self.pipeline.encode_prompt(
            list(prompts), device=device, max_sequence_length=self.tokens
        )
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = self.tokens - embeds.shape[1]
        return {
            EMBEDS: functional.pad(embeds, (0, 0, 0, missing)),
            MASK: functional.pad(mask, (0, missing)),
        }

    def negative(self, device: torch.device) -> dict[str, Tensor]:
        """A space, with which Qwen-Image is guided: the pipeline has no guidance without one."""
        return self.encode([" "], device)

    def blank(self, rows: int) -> dict[str, Tensor]:
        return {
            EMBEDS: torch.zeros(rows, self.tokens, self.network.config.joint_attention_dim),
            MASK: torch.ones(rows, self.tokens, dtype=torch.long),
        }

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        rows, _, height, width = x.shape
        words = longest(given[MASK])
        found: Tensor = network(
            hidden_states=packed(x),
            timestep=(1000 * time).to(x.dtype) / 1000,  # rounded where the pipeline rounds it
            encoder_hidden_states=given[EMBEDS][:, :words],
            encoder_hidden_states_mask=given[MASK][:, :words],
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return unpacked(found, height, width)

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guided u with the norm of the conditional one in each token of 2×2 pixels."""
        _, _, height, width = conditional.shape
        tokens = packed(super().guide(conditional, unconditional))
        norm = tokens.norm(dim=-1, keepdim=True)
        kept = packed(conditional).norm(dim=-1, keepdim=True)
        tiny = torch.finfo(norm.dtype).tiny  # 0 stays 0
        return unpacked(tokens * (kept / norm.clamp_min(tiny)), height, width)

    def to_pipeline(self, x: Tensor) -> Tensor:
        return packed(x)

    def decode(self, x: Tensor) -> Tensor:
        """The one frame, without the clamp to [-1, 1] of the autoencoder's own `decode`, beyond
        which a reward would have no gradient."""
        config = self.vae.config
        mean, std = (
            x.new_tensor(values).reshape(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        frame = (x * std + mean).unsqueeze(2).to(self.vae.dtype)
        images: Tensor = self.vae.decoder(self.vae.post_quant_conv(frame))
        return images[:, :, 0]


def longest(mask: Tensor) -> int:
    """How many tokens the rows of a mask [M, L] need at most, rounded up; L where none are known
    ("meta")."""
    if mask.is_meta:
        return mask.shape[1]
    most = int(mask.sum(1).max())
    return min(-(-most // ROUND) * ROUND, mask.shape[1])
