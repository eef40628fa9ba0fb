"""g_φ for image latents: a small conditional U-Net that starts at exactly zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..config import ConfigError
from ..core.types import Condition


class UNetFlow(nn.Module):
    """UNet2DConditionModel with a zero output layer (weight *and* bias), in float32.

    text, text_width: the tensor of a condition that it attends to, and its last size. widths:
    channels per level, the first ones with cross-attention. hint: it sees x̂ too. time_scale: brings
    the model's times to 0..1000, for which diffusers' embedding is made. Raises ConfigError when
    the sample cannot be halved that often.
    """

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        text: str,
        text_width: int,
        widths: Sequence[int],
        layers: int,
        *,
        hint: bool = False,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.text, self.time_scale = text, time_scale
        channels, height, width = sample_shape
        halvings = 2 ** (len(widths) - 1)
        if height % halvings or width % halvings:
            raise ConfigError(
                f"config.model.flow_channel_width has {len(widths)} levels, too many for latents "
                f"of {height}x{width}: give fewer widths"
            )
        self.net = UNet2DConditionModel(
            in_channels=2 * channels if hint else channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
            layers_per_block=layers,
            cross_attention_dim=text_width,
            norm_num_groups=math.gcd(32, *widths),
        )
        nn.init.zeros_(self.net.conv_out.weight)
        nn.init.zeros_(self.net.conv_out.bias)

    def forward(
        self, x: Tensor, time: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> Tensor:
        """x, and hint if it was made for one, [M, C, H, W], time [M] -> [M, C, H, W]."""
        dtype = self.net.dtype
        seen = x if hint is None else torch.cat([x, hint], 1)
        if self.time_scale != 1.0:
            time = time * self.time_scale
        return self.net(seen.to(dtype), time, condition.tensors[self.text].to(dtype)).sample
