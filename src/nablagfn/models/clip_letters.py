"""CLIP's text model by its published configuration, and its tokenizer without merges."""

from __future__ import annotations

from transformers import CLIPTextConfig, CLIPTokenizer

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
CLIP_TEXT = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
)


def clip_letters() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: words are spelt. End mark 49407 as in the true one."""
    entries = [*LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
