"""The names of a CLIP's weights in openai-clip and open_clip, turned into transformers' names.

The architectures are the same but for layout: one fused projection in_proj for query, key and
value there, three here; output projections are stored transposed there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
STARTS = {
    "ln_final.": "text_model.final_layer_norm.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # so spelt
    "visual.ln_post.": "vision_model.post_layernorm.",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
DROPPED = ("input_resolution", "context_length", "vocab_size")  # numbers in openai's files


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip's CLIP by transformers' names (of `CLIPModel`); unknown names stay."""
    kept = {name: value for name, value in state.items() if name not in DROPPED}
    return dict(pair for name, value in kept.items() for pair in _rename(name, value))


def _rename(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in TRANSPOSED:
        yield TRANSPOSED[name], value.T.contiguous()
        return
    if found := BLOCK.fullmatch(name):
        yield from _in_block(found, value)
        return
    start = next((s for s in STARTS if name.startswith(s)), None)
    yield (STARTS[start] + name[len(start) :] if start else WHOLE.get(name, name)), value


def _in_block(found: re.Match[str], value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One transformer block's weight; the fused projection gives three."""
    visual, index, inner, kind = found.groups()
    prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}."
    if inner == "attn.in_proj_":
        for part, rows in zip("qkv", value.chunk(3), strict=True):
            yield f"{prefix}self_attn.{part}_proj.{kind}", rows.contiguous()
    else:
        inner = inner.rstrip(".")
        yield f"{prefix}{INSIDE.get(inner, inner)}.{kind}", value
