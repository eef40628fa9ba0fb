"""What is Sana's own: whole thousandths of time, an instruction before prompts, sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nablagfn.config import Config, ConfigError
from nablagfn.families.sana import OF_512, OF_1024, SANA, stock
from nablagfn.models.architectures import assembled
from nablagfn.models.flow_shift import shifted
from nablagfn.models.latent import set_sampler
from nablagfn.models.latent_model import PIPELINE_GRID, PipelineCall
from nablagfn.models.published import PUBLISHED
from nablagfn.models.sana import EMBEDS, MASK, Sana, instruction_of
from nablagfn.report.loading import how_to_load
from tests.test_conformance import PROMPTS, STEPS, noise_for, policy_of
from tests.tiny_families import TINY

NAME = "sana"


def told(policy, times) -> list[float]:
    """What the network is told of these times."""
    seen = []
    hook = policy.network.register_forward_pre_hook(
        lambda layer, args, given: seen.append(float(given["timestep"][0])), with_kwargs=True
    )
    x, where = noise_for(policy, rows=1)[:, 0], policy.condition(PROMPTS[:1])
    with torch.no_grad():
        for time in times:
            policy.output(x, torch.tensor([time], dtype=torch.float32), where)
    hook.remove()
    return seen


@pytest.mark.parametrize("steps", [4, 20, 28, 50])
def test_the_network_is_told_what_its_scheduler_says(steps: int) -> None:
    """Whole thousandths, rounded down, times timestep_scale, which is 0.5 here."""
    policy = policy_of(NAME)
    times = policy.times(PIPELINE_GRID, steps)
    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.dtype == torch.int64
    assert told(policy, times) == (0.5 * scheduler.timesteps).tolist()
    assert any(1000 * time % 1 > 0.5 for time in times)


def test_the_stock_sampler_has_the_shift_of_the_model() -> None:
    policy = policy_of(NAME)
    found = stock(Config())
    set_sampler(policy.pipeline, found.scheduler, found.options, found.taken)
    scheduler = policy.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    shift = policy.model.shift(STEPS)
    known = [shifted(0.999 * k / STEPS, shift) for k in range(STEPS, 0, -1)]
    assert shift == 3 and np.allclose(scheduler.sigmas[:-1], known, atol=1e-6)
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"


def test_prompts_come_after_an_instruction_and_the_negative_one_does_not() -> None:
    model = policy_of(NAME).model
    instruction = instruction_of(model.pipeline)
    assert len(instruction) > 1 and instruction[-1] == "User Prompt: "
    device = torch.device("cpu")
    empty, negative = model.encode([""], device), model.negative(device)
    assert negative[MASK].sum() == 1  # the beginning's token
    assert empty[MASK].shape == negative[MASK].shape
    assert not torch.allclose(empty[EMBEDS], negative[EMBEDS])


def test_a_learned_variance_is_cut_off() -> None:
    policy = policy_of(NAME)
    assert policy.network.config.out_channels == 2 * policy.network.config.in_channels
    x, where = noise_for(policy)[:, 0], policy.condition(PROMPTS)
    with torch.no_grad():
        policy.network.proj_out.weight[4:] = float("nan")
        assert policy.output(x, torch.tensor([0.5, 0.5]), where).isfinite().all()


def test_another_scheduler_is_refused() -> None:
    pipeline = TINY[NAME]()
    pipeline.scheduler = TINY["sd3"]().scheduler
    with pytest.raises(ConfigError, match=r"a FlowMatchEulerDiscreteScheduler, .* give it a DPM"):
        Sana(pipeline, PipelineCall())


def test_printed_programs_ask_for_the_model_s_own_size(tmp_path: Path) -> None:
    config = Config()
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"sample_size": 64}')
    for model, size in (
        (OF_512[0], ", height=512, width=512"),
        (OF_1024[0], ""),
        (str(tmp_path), ", height=2048, width=2048"),
    ):
        config.pretrained.model, config.pretrained.family = model, NAME
        program = how_to_load(config, "a cat", "weights")
        assert f"{size}, use_resolution_binning=False)" in program
        assert ("height" in program) == bool(size)


def test_its_decoder_cannot_recompute() -> None:
    config = Config()
    config.training.vae_checkpointing = True
    with pytest.raises(ConfigError, match=r"vae_checkpointing=True: .*set it to False"):
        SANA.check(config)


def test_the_published_models_have_their_published_sizes() -> None:
    """The autoencoder and Gemma as the hub counts them. Of the networks only 0.6, 1.6 and 4.8
    billion are known: their exact counts here are those of the configurations."""
    sizes = {
        OF_512[0]: (591_747_872, 512),
        OF_1024[1]: (1_604_462_752, 1024),
        OF_1024[3]: (1_604_641_952, 1024),
        OF_1024[4]: (4_721_825_952, 1024),
    }
    assert {name for name in PUBLISHED if "ana" in name or "SANA" in name} == {*OF_512, *OF_1024}
    for name, (known, side) in sizes.items():
        with torch.device("meta"):
            parts = PUBLISHED[name]()
            model = Sana(assembled(Sana, parts))
        count = {
            key: sum(p.numel() for p in part.parameters())
            for key, part in parts.items()
            if key != "scheduler"
        }
        assert count == {
            "transformer": known,
            "vae": 312_250_275,
            "text_encoder": 2_614_341_888,
        }
        assert model.sample_shape == (32, side // 32, side // 32)
