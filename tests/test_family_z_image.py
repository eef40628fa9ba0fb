"""Z-Image: prompts of other lengths in one batch, what is refused, and the published sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nablagfn.config import ConfigError, set_option
from nablagfn.core.rollout import rollout
from nablagfn.families import FAMILIES
from nablagfn.models.latent import LatentPolicy
from nablagfn.models.latent_model import PipelineCall
from nablagfn.models.published import PUBLISHED
from nablagfn.models.z_image import EMBEDS, LENGTH, ZImage
from tests.test_conformance import W, config_of, noise_for, own_table, pictures
from tests.tiny_families import TINY, pixels

LONG = "a very long prompt of more tokens than the others"
PROMPTS = ["a cat", LONG, "a fox"]  # the network pads to multiples of 32 tokens
TOKENS = 56


def policy_of(guidance: float = W) -> LatentPolicy:
    side = pixels("z-image")
    call = PipelineCall(side, side, guidance, TOKENS)
    return LatentPolicy(ZImage(TINY["z-image"](), call), lora_rank=2)


@pytest.mark.parametrize("w", [W, 1.0])
def test_prompts_of_other_lengths_draw_the_pipeline_s_pictures(w: float) -> None:
    """w is the pipeline's own guidance_scale plus 1; each row alone is what it is in the batch."""
    policy = policy_of(w)
    table, noise = own_table(policy), noise_for(policy, rows=3)
    where = policy.condition(PROMPTS)
    assert where.tensors[LENGTH].tolist() == [len(prompt) + 1 for prompt in PROMPTS]
    assert where.tensors[EMBEDS].shape[1] == TOKENS
    with policy.reference():
        found = pictures(policy, rollout(policy, table, noise, where).clean)
        alone = rollout(policy, table, noise[1:2], where[torch.tensor([1])])
    known = TINY["z-image"]()(
        prompt=list(PROMPTS),
        height=pixels("z-image"),
        width=pixels("z-image"),
        num_inference_steps=table.num_steps,
        guidance_scale=w - 1,
        latents=noise[:, 0],
        max_sequence_length=TOKENS,
        output_type="np",
    ).images
    assert np.abs(found - known).max() < 1e-4
    assert np.abs(pictures(policy, alone.clean) - found[1:2]).max() < 1e-4
    assert policy.model.passes == (1 if w == 1 else 2)


def test_what_lies_behind_a_prompt_is_not_seen() -> None:
    policy = policy_of()
    where = policy.condition(PROMPTS)
    x = noise_for(policy, rows=3)[:, 0]
    time = torch.full((3,), 0.5)
    with torch.no_grad():
        known = policy.output(x, time, where)
        where.tensors[EMBEDS][0, len(PROMPTS[0]) + 1 :] = 7.0
        assert torch.equal(policy.output(x, time, where), known)
        where.tensors[EMBEDS][0, len(PROMPTS[0])] = 7.0
        changed = (policy.output(x, time, where) - known).abs().amax((1, 2, 3))
    assert changed[0] > 1e-3 and changed[1:].max() < 1e-5


@pytest.mark.parametrize("key", ["compile", "cuda_graphs"])
def test_what_would_be_compiled_for_each_length_is_refused(key: str) -> None:
    config = config_of("z-image")
    set_option(config, f"speed.{key}", True)
    with pytest.raises(ConfigError, match=rf"config\.speed\.{key}=True: .* its own length"):
        FAMILIES["z-image"].check(config)


@pytest.mark.parametrize(("name", "shift"), [("Z-Image", 6.0), ("Z-Image-Turbo", 3.0)])
def test_the_known_architectures_have_the_published_sizes(name: str, shift: float) -> None:
    with torch.device("meta"):
        parts = PUBLISHED[f"Tongyi-MAI/{name}"]()
    count = sum(p.numel() for p in parts["transformer"].parameters())
    assert round(2 * count / 1e9, 1) == 12.3  # gigabytes of the published bfloat16 weights
    assert parts["scheduler"].config.shift == shift
