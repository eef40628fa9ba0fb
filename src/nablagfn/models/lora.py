"""Which layers get a LoRA, and what lies beside one in a file. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the linear maps of diffusers' attention
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")  # of diffusers' ResnetBlock2D
UNET = {"attention": ATTENTION, "resnets": RESNETS}  # by the words of model.lora_targets
TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # of joint attention
MMDIT = {  # SD3's names: attention of both streams, and their feed-forward maps
    "attention": (*ATTENTION, *TEXT_STREAM),
    "feed-forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
}
FLUX = {**MMDIT, "feed-forward": (*MMDIT["feed-forward"], "proj_mlp", "proj_out")}
FLUX2 = {  # whose single blocks have attention and feed-forward map in one
    "attention": (*MMDIT["attention"], "attn.to_qkv_mlp_proj", "attn.to_out"),
    "feed-forward": (
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
    ),
}
QWEN_IMAGE = {
    **MMDIT,
    "feed-forward": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
}
SANA = {"attention": ATTENTION, "feed-forward": ("ff.conv_inverted", "ff.conv_point")}
Z_IMAGE = {
    "attention": ATTENTION,
    "feed-forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
}
ALL = "all"
FIRST_STATE, MEAN = "first_state.safetensors", "mean"  # a file, and the tensor in it


def endings(words: Sequence[str], known: Mapping[str, Sequence[str]]) -> list[str]:
    """Endings of the names of layers, from words that stand for some or are such endings."""
    return [ending for word in words for ending in known.get(word, (word,))]
