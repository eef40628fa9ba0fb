"""The objective, and what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from .base import Group, Lower

LEAST_SIGNAL = 1e-4  # ᾱ, below which `lora_fade` strengthens a LoRA no further
Attenuation = Annotated[Literal["squared", "sqrt", "none"], Lower]


def lora_strength(alpha_bar: float, until: float, fade: float) -> float:
    """(until/ᾱ)^p, how strongly a LoRA acts at the share ᾱ of signal; 0 above `until`."""
    return (until / max(alpha_bar, LEAST_SIGNAL)) ** fade if alpha_bar <= until else 0.0


class Model(Group):
    """The objective and what is trained."""

    lora_rank: int = Field(8, ge=1, description="LoRA rank (= alpha)")
    lora_targets: tuple[str, ...] = Field(
        ("attention",),
        min_length=1,
        description="layers with a LoRA, separated by commas: attention (of a "
        "transformer both streams), resnets (of a U-Net), feed-forward (of a transformer), all "
        "(linear layers and convolutions), or endings of names, as to_v; which layers that are is "
        "in docs/models.md",
    )
    lora_until: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share ᾱ of signal up to which the LoRA acts; cleaner states are left to the "
        "pretrained model. A LoRA acts much alike at all steps, so that what decides the layout of "
        "a picture also moves its details, at a KL of its own; 1: it always acts",
    )
    lora_fade: float = Field(
        0.0,
        ge=0,
        description="p: the LoRA acts with the strength (model.lora_until/ᾱ)^p, most at the "
        "noisiest states (ᾱ counts as no less than 1e-4) and 1 at the last; 0.5 is one over the "
        "amount of signal. What a LoRA does to the predicted noise is else of much the same size "
        "at all steps, where a target asks for most at the first ones; 0: of strength 1",
    )
    reward_scale: float = Field(
        1e3, gt=0, description="β: the finetuned model samples p_pretrained·exp(β·reward)"
    )
    pretrained_strength: float = Field(
        1.0, ge=0, le=1, description="s: weight of the prior log p_pretrained; 1 is the paper"
    )
    timestep_fraction: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of each trajectory's transitions to learn from (the last always added); "
        "the paper has 0.1 for 50-step DDPM and 0.4 for 20-step SDE-DPM-Solver++",
    )
    unet_reg_scale: float = Field(
        1e3, ge=0, description="λ: trust region towards the parameters that drew the samples"
    )
    reverse_loss_scale: float = Field(1.0, ge=0, description="w_B: weight of the reverse loss")
    no_flow: bool = Field(
        False, description="forward loss only, no flow network: least memory, more bias"
    )
    reward_adaptive_mode: Attenuation = Field(
        "squared", description="γ, trust in the reward guess: squared (ᾱ), sqrt (√ᾱ) or none (1)"
    )
    guess_decoder: str = Field(
        "",
        description="a small decoder (AutoencoderTiny: hub name or folder) for the reward at "
        "predicted clean samples, instead of the VAE; faster, and other numbers. Finished samples "
        "are always decoded by the VAE",
    )
    flow_layers_per_block: int = Field(1, ge=1, description="layers per block of g_φ")
    flow_channel_width: tuple[PositiveInt, ...] = Field(
        (64, 128, 256, 256), min_length=2, description="channel widths of g_φ"
    )

    @property
    def lora_variation(self) -> str:
        """The option by which the LoRA's strength is not 1 at all steps, as it is given; ''."""
        if self.lora_until < 1:
            return f"config.model.lora_until={self.lora_until:g}"
        return f"config.model.lora_fade={self.lora_fade:g}" if self.lora_fade else ""
