"""Z-Image: one stream of picture and prompt, each prompt of its own length, time that runs to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor
from torch.nn import functional

from .latent_model import FlowModel
from .lora import Z_IMAGE

EMBEDS, LENGTH = "prompt_embeds", "prompt_length"
SIDE = 1024  # of the pipeline's own pictures, in pixels


class ZImage(FlowModel):
    """A loaded Z-Image pipeline (Z-Image team 2025).

    Its network is told 1 − σ and gives −u. w of guidance is the pipeline's own plus 1.
    """

    family = "z-image"
    pipeline_class = ZImagePipeline
    lora_targets = Z_IMAGE
    own_tokens = 512  # at most
    tells_sigmas = True
    patch = 2

    def default_pixels(self) -> tuple[int, int]:
        return SIDE, SIDE

    def encode(self, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """What is missing to `tokens` is 0, and cut before the network sees it."""
        found, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
        )
        padded = [functional.pad(row, (0, 0, 0, self.tokens - len(row))) for row in found]
        lengths = torch.tensor([len(row) for row in found], device=padded[0].device)
        return {EMBEDS: torch.stack(padded), LENGTH: lengths}

    def blank(self, rows: int) -> dict[str, Tensor]:
        return {
            EMBEDS: torch.zeros(rows, self.tokens, self.network.config.cap_feat_dim),
            LENGTH: torch.full((rows,), self.tokens),
        }

    def call(
        self, network: Callable[..., Any], x: Tensor, time: Tensor, given: Mapping[str, Tensor]
    ) -> Tensor:
        found: list[Tensor] = network(
            list(x.unsqueeze(2).unbind()),
            1 - time.float(),
            cut(given[EMBEDS], given[LENGTH]),
            return_dict=False,
        )[0]
        return -torch.stack(found).squeeze(2)


def cut(embeds: Tensor, lengths: Tensor) -> list[Tensor]:
    """The tokens that each prompt has, of padded ones [M, L, D]; all L where no length is known
    ("meta")."""
    if lengths.is_meta:
        return list(embeds.unbind())
    return [row[: int(n)] for row, n in zip(embeds, lengths.tolist(), strict=True)]
