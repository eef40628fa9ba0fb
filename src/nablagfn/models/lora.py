"""Which layers get a LoRA, and what lies beside one in a file. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the linear maps of diffusers' attention
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")  # of diffusers' ResnetBlock2D
UNET = {"attention": ATTENTION, "resnets": RESNETS}  # by the words of model.lora_targets
ALL = "all"
FIRST_STATE, MEAN = "first_state.safetensors", "mean"  # a file, and the tensor in it


def endings(words: Sequence[str], known: Mapping[str, Sequence[str]]) -> list[str]:
    """Endings of the names of layers, from words that stand for some or are such endings."""
    return [ending for word in words for ending in known.get(word, (word,))]
