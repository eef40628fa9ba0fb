"""What is Qwen-Image's own: prompts of any length, the norm that guidance keeps, the frame."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core.rollout import rollout
from nablagfn.families.qwen_image import QWEN_IMAGE, stock
from nablagfn.models.architectures import assembled
from nablagfn.models.flow_shift import shifted
from nablagfn.models.latent import set_sampler
from nablagfn.models.latent_model import even_sigmas, packed
from nablagfn.models.published import PUBLISHED
from nablagfn.models.qwen_image import MASK, ROUND, QwenImage, longest
from tests.test_conformance import (
    PROMPTS,
    STEPS,
    W,
    noise_for,
    own_table,
    pictures,
    policy_of,
    stock_pictures,
)
from tests.tiny_families import TINY

NAME = "qwen-image"


@pytest.mark.parametrize("tokens", [0, 64])
def test_padding_of_any_length_leaves_the_pipeline_s_picture(tokens: int) -> None:
    """Prompts of 10 and 12 tokens, padded to 512 and to 64, are cut to 32; each alone, too."""
    policy = policy_of(NAME, call={"max_sequence_length": tokens})
    table, noise = own_table(policy), noise_for(policy)
    known = stock_pictures(NAME, TINY[NAME](), noise[:, 0] * table.start_std, policy)
    where = policy.condition(PROMPTS)
    assert where.tensors[MASK].shape == (2, tokens or 512)
    assert where.tensors[MASK].sum(1).tolist() == [10, 12]
    assert longest(where.tensors[MASK]) == ROUND
    with policy.reference():
        for rows in ([0, 1], [0], [1]):
            index = torch.tensor(rows)
            paths = rollout(policy, table, noise[index], where[index])
            assert np.abs(pictures(policy, paths.clean) - known[rows]).max() < 1e-4


def test_the_network_is_not_given_tokens_that_no_prompt_has() -> None:
    policy = policy_of(NAME, call={"max_sequence_length": 64})
    seen = []
    hook = policy.network.register_forward_pre_hook(
        lambda layer, args, given: seen.append(given["encoder_hidden_states"].shape[1]),
        with_kwargs=True,
    )
    x = noise_for(policy)[:, 0]
    policy.output(x, torch.tensor([0.5, 0.5]), policy.condition(PROMPTS))
    hook.remove()
    assert seen == [ROUND]
    assert longest(torch.ones(3, 40, dtype=torch.long)) == 40
    assert longest(torch.ones(3, 512, dtype=torch.long, device="meta")) == 512


def test_guidance_keeps_the_norm_of_each_token() -> None:
    model = policy_of(NAME).model
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 3, *model.sample_shape)
    found = packed(model.guide(cond, uncond))
    plain = packed(uncond + W * (cond - uncond))
    assert torch.allclose(found.norm(dim=-1), packed(cond).norm(dim=-1), atol=1e-5)
    assert torch.cosine_similarity(found, plain, dim=-1).min() > 1 - 1e-5
    assert (found - plain).abs().max() > 1
    zero = torch.zeros_like(cond)
    assert torch.equal(model.guide(zero, zero), zero)


def test_a_reward_has_a_gradient_beyond_the_clamp() -> None:
    """Within it, pictures are the autoencoder's own."""
    policy = policy_of(NAME)
    vae, model = policy.vae, policy.model
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(20)
    x = noise_for(policy)[:, 0].requires_grad_()
    found = model.decode(x)
    mean, std = (
        torch.tensor(v).reshape(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    known = vae.decode(x[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
    assert torch.equal(found.clamp(-1, 1), known)
    outside = found.detach().abs() > 1
    assert 0.01 < outside.float().mean() < 0.99
    (slope,) = torch.autograd.grad(found[outside].sum(), x)
    assert slope.abs().max() > 0


def test_the_stock_sampler_has_the_shift_of_the_model() -> None:
    """σ = 0.999·k/N before it; the pipeline gives σ and μ, of which the number and μ are taken."""
    policy = policy_of(NAME)
    found = stock(Config())
    assert found.counts
    set_sampler(policy.pipeline, found.scheduler, found.options, found.taken, counts=True)
    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(sigmas=even_sigmas(STEPS), **{"mu": policy.model.mu(STEPS)})
    shift = policy.model.shift(STEPS)
    even = [0.999 * k / STEPS for k in range(STEPS, 0, -1)]
    known = [shifted(sigma, shift) for sigma in even]
    assert shift > 1.5
    assert np.allclose(scheduler.sigmas[:-1], known, atol=1e-6) and scheduler.sigmas[-1] == 0


def test_its_decoder_cannot_recompute() -> None:
    config = Config()
    set_option(config, "training.vae_checkpointing", True)
    with pytest.raises(ConfigError, match=r"vae_checkpointing=True: .*set it to False"):
        QWEN_IMAGE.check(config)


def test_the_published_model_has_its_published_sizes() -> None:
    """Parameters as the hub counts them."""
    with torch.device("meta"):
        parts = PUBLISHED["Qwen/Qwen-Image-2512"]()
        model = QwenImage(assembled(QwenImage, parts))
    sizes = {"transformer": 20430401088, "vae": 126892531, "text_encoder": 8292166656}
    for name, known in sizes.items():
        assert sum(p.numel() for p in parts[name].parameters()) == known
    assert model.sample_shape == (16, 128, 128)
    assert model.pixels_per_latent == 8
    assert dataclasses.astuple(model.asked) == (0, 0, 1.0, 0)
