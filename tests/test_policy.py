"""The Stable-Diffusion policy against the pipeline it was made from (random weights)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.schedulers import scheduling_ddim, scheduling_dpmsolver_multistep
from torch import Tensor

from nablagfn.commands import assemble
from nablagfn.commands.assemble import check_names
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core.rollout import rollout
from nablagfn.core.samplers import find_sampler
from nablagfn.families import find_family
from nablagfn.methods.build import build_kernel
from nablagfn.models.latent import ADAPTER
from nablagfn.models.locate import locate
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.recipes.options import load_config
from tests.tables import table_of
from tests.tiny_pipeline import make_pipeline
from tests.worlds import randomise

PROMPTS = ("a cat", "a dog", "a red fox on a hill")


def make_policy(
    pipeline: StableDiffusionPipeline | None = None, *, scale: float = 0.3, **options
) -> StableDiffusionPolicy:
    """A policy whose LoRA is away from the start by `scale`."""
    policy = StableDiffusionPolicy(
        pipeline or make_pipeline(), **{"guidance_scale": 3.0, "lora_rank": 2, **options}
    )
    randomise(policy.parameters(), scale)
    return policy


def some_inputs(policy: StableDiffusionPolicy, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *policy.sample_shape, generator=generator, dtype=dtype)
    return x, torch.tensor([1, 400, 981]), policy.condition(PROMPTS)


def noise_for(policy: StableDiffusionPolicy, num_steps: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, num_steps + 1, *policy.sample_shape, generator=generator)


# -------------------------------------------------------------------------------- the adapter


def test_without_its_lora_the_policy_is_the_pretrained_pipeline() -> None:
    policy, untouched = make_policy(guidance_scale=1.0), make_pipeline()
    x, timestep, where = some_inputs(policy)
    with policy.reference(), torch.no_grad():
        reference = policy.output(x, timestep, where)
    with torch.no_grad():
        known = untouched.unet(x, timestep, where.tensors["prompt_embeds"]).sample
        finetuned = policy.output(x, timestep, where)
    assert torch.equal(reference, known)
    assert not torch.allclose(finetuned, known, atol=1e-3)


def test_a_new_lora_changes_nothing() -> None:
    policy = make_policy(scale=0.0)
    x, timestep, where = some_inputs(policy)
    with torch.no_grad():
        eps = policy.output(x, timestep, where)
        with policy.reference():
            assert torch.equal(eps, policy.output(x, timestep, where))


def test_the_lora_comes_back_after_an_error() -> None:
    policy = make_policy()
    x, timestep, where = some_inputs(policy)
    with torch.no_grad():
        before = policy.output(x, timestep, where)
        with contextlib.suppress(RuntimeError), policy.reference():
            raise RuntimeError
        assert torch.equal(before, policy.output(x, timestep, where))


def test_only_the_lora_is_trained() -> None:
    policy = make_policy(lora_rank=3)
    x, timestep, where = some_inputs(policy)
    policy.output(x, timestep, where).square().sum().backward()
    ours = {id(p) for p in policy.parameters()}
    parts = (policy.network, policy.vae, policy.pipeline.text_encoder)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == ours
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())
    names = [n for n, _ in policy.network.named_parameters() if ".lora_" in n]
    for target in ("to_q", "to_k", "to_v", "to_out.0"):
        for block in ("attn1", "attn2"):
            assert any(f"{block}.{target}.lora_A" in name for name in names)
    assert all(p.shape[0] == 3 for n, p in policy.network.named_parameters() if ".lora_A." in n)


def test_the_lora_s_start_depends_on_its_seed_only() -> None:
    starts = []
    for seed, noise in ((0, 5), (0, 6), (1, 5)):
        pipeline = make_pipeline()
        torch.manual_seed(noise)
        starts.append(make_policy(pipeline, scale=0.0, seed=seed).parameters()[0])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


# -------------------------------------------------------------------------------- guidance


def test_guidance_one_is_the_conditional_model() -> None:
    policy = make_policy(guidance_scale=1.0)
    x, timestep, where = some_inputs(policy)
    with torch.no_grad():
        known = policy.network(x, timestep, where.tensors["prompt_embeds"]).sample
        assert torch.equal(policy.output(x, timestep, where), known)


@pytest.mark.parametrize("reference", [False, True])
def test_guidance_extrapolates_from_the_empty_prompt(
    policy64: StableDiffusionPolicy, reference: bool
) -> None:
    policy = policy64
    policy.guidance_scale = 1.0
    x, timestep, where = some_inputs(policy, torch.float64)
    empty = policy.condition([""] * 3)
    switch = policy.reference() if reference else contextlib.nullcontext()
    with torch.no_grad(), switch:
        conditional = policy.output(x, timestep, where)
        unconditional = policy.output(x, timestep, empty)
        policy.guidance_scale = 4.0
        guided = policy.output(x, timestep, where)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    torch.testing.assert_close(guided, 4 * conditional - 3 * unconditional)


def test_conditions_are_encoded_like_the_pipeline_does() -> None:
    policy = make_policy()
    encoded, empty = policy.pipeline.encode_prompt(list(PROMPTS), "cpu", 1, True)
    torch.testing.assert_close(policy.condition(PROMPTS).tensors["prompt_embeds"], encoded)
    torch.testing.assert_close(policy.condition([""] * 3).tensors["prompt_embeds"], empty)
    shuffled = policy.condition(PROMPTS[::-1]).tensors["prompt_embeds"]
    assert torch.equal(shuffled, policy.condition(PROMPTS).tensors["prompt_embeds"].flip(0))


# -------------------------------------------------------------------------------- diffusers' own


@contextlib.contextmanager
def given_noise(module, noise: Tensor, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scheduler in `module` draws noise[:, 1], noise[:, 2] … instead of random numbers."""
    drawn = iter(noise.unbind(1)[1:])
    with monkeypatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda shape, **_: next(drawn).reshape(shape))
        yield
    assert next(drawn, None) is None


def by_diffusers(policy: StableDiffusionPolicy, noise: Tensor) -> Tensor:
    num_steps = noise.shape[1] - 1
    return policy.pipeline(
        list(PROMPTS),
        num_inference_steps=num_steps,
        guidance_scale=policy.guidance_scale,
        eta=1.0,
        latents=noise[:, 0],
        output_type="latent",
    ).images


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ddpm_draws_what_diffusers_draws(
    prediction_type: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(make_pipeline(prediction_type), guidance_scale=guidance)
    policy.pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(policy, 5, len(PROMPTS))
    table = table_of(policy, 5)
    ours = rollout(policy, table, noise, policy.condition(PROMPTS)).clean
    with given_noise(scheduling_ddim, noise, monkeypatch):
        theirs = by_diffusers(policy, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpm_solver_draws_what_diffusers_draws(
    prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(make_pipeline(prediction_type))
    pipeline = policy.pipeline
    pipeline.set_progress_bar_config(disable=True)
    noise = noise_for(policy, 5, len(PROMPTS))
    table = table_of(policy, 5, "dpm-solver")
    ours = rollout(policy, table, noise, policy.condition(PROMPTS)).clean
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config,
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        final_sigmas_type="sigma_min",
    )
    with given_noise(scheduling_dpmsolver_multistep, noise, monkeypatch):
        theirs = by_diffusers(policy, noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_decode_is_diffusers_decoding_without_the_clamp() -> None:
    policy = make_policy()
    latents = some_inputs(policy)[0]
    with torch.no_grad():
        ours = policy.decode(latents)
        raw = policy.vae.decode(latents / policy.vae.config.scaling_factor).sample
    theirs = policy.pipeline.image_processor.postprocess(raw, output_type="pt")
    torch.testing.assert_close(ours.clamp(0, 1), theirs)
    far = 40 * latents
    with torch.no_grad():
        pictures = policy.decode(far)
    assert pictures.min() < 0 or pictures.max() > 1


SCHEDULERS = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "no offset": {"timestep_spacing": "leading", "steps_offset": 0},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
}


@pytest.fixture(scope="module")
def any_policy() -> StableDiffusionPolicy:
    return make_policy()


@pytest.mark.parametrize("num_steps", [2, 7, 50, 1000])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver"])
@pytest.mark.parametrize("spacing", SCHEDULERS)
def test_timesteps_give_a_table_for_every_scheduler(
    any_policy: StableDiffusionPolicy, spacing: str, sampler: str, num_steps: int
) -> None:
    """1,000 of 1,000 steps may be refused, with the ValueError that becomes one line."""
    config = {"beta_schedule": "scaled_linear", **SCHEDULERS[spacing]}
    any_policy.pipeline.scheduler = DDIMScheduler(**config)
    refused = contextlib.suppress(ValueError) if num_steps == 1000 else contextlib.nullcontext()
    with refused:
        table = table_of(any_policy, num_steps, find_sampler(sampler).grid)
        assert table.num_steps == num_steps
        assert table.time[0] <= 999 and table.time[-2] >= 1


# -------------------------------------------------------------------------------- files


def pictures(policy: StableDiffusionPolicy, noise: Tensor) -> Tensor:
    table = table_of(policy, noise.shape[1] - 1)
    where = policy.condition(PROMPTS)
    with torch.no_grad():
        return policy.decode(rollout(policy, table, noise, where).clean).clamp(0, 1)


def test_a_saved_lora_gives_the_same_pictures_in_a_fresh_pipeline(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = StableDiffusionPolicy.from_pretrained(
        str(tiny_folder), guidance_scale=3.0, lora_rank=2
    )
    noise = noise_for(policy, 4, len(PROMPTS))
    before = pictures(policy, noise)
    randomise(policy.parameters(), 0.3)
    policy.save(tmp_path)
    fresh = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    fresh.load_lora_weights(tmp_path)
    fresh.set_progress_bar_config(disable=True)
    with given_noise(scheduling_ddim, noise, monkeypatch):
        theirs = fresh(
            list(PROMPTS),
            num_inference_steps=4,
            guidance_scale=3.0,
            eta=1.0,
            latents=noise[:, 0],
            output_type="pt",
        ).images
    torch.testing.assert_close(pictures(policy, noise), theirs, rtol=0, atol=1e-4)
    assert (before - theirs).abs().max() > 1e-2


def test_state_dict_round_trip() -> None:
    one, other = make_policy(), make_policy(scale=0.0, seed=9)
    x, timestep, where = some_inputs(one)
    other.condition(PROMPTS)
    other.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(one.output(x, timestep, where), other.output(x, timestep, where))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("damage", ["a layer missing", "another rank", "a layer too many"])
def test_a_lora_that_does_not_fit_is_refused_untouched(damage: str) -> None:
    policy = make_policy()
    before = [p.clone() for p in policy.parameters()]
    state = dict(make_policy(lora_rank=3 if damage == "another rank" else 2, seed=1).state_dict())
    if damage == "a layer missing":
        state.popitem()
    elif damage == "a layer too many":
        state["another.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="do not fit"):
        policy.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


# -------------------------------------------------------------------------------- precision, memory


@pytest.mark.parametrize("through", ["parameters", "input"])
def test_gradient_checkpointing_gives_the_same_gradients(through: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(gradient_checkpointing=checkpointing)
        assert policy.network.is_gradient_checkpointing is checkpointing
        x, timestep, where = some_inputs(policy)
        leaves = [x.requires_grad_()] if through == "input" else policy.parameters()
        value = policy.output(x, timestep, where).square().sum()
        gradients.append(torch.autograd.grad(value, leaves))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-6)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_keeps_lora_and_algebra_in_float32(
    dtype: torch.dtype, tiny_folder: Path
) -> None:
    policy = StableDiffusionPolicy.from_pretrained(str(tiny_folder), dtype=dtype, lora_rank=2)
    assert policy.dtype == dtype and policy.network.conv_in.weight.dtype == dtype
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.noising.levels(torch.zeros(1)).alpha.dtype == torch.float64
    if dtype == torch.float16:
        assert policy.vae.dtype == torch.float32
    x, timestep, where = some_inputs(policy)
    eps = policy.output(x, timestep, where)
    eps.square().sum().backward()
    assert eps.dtype == torch.float32 and policy.decode(x).dtype == torch.float32
    assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}
    flow = policy.make_flow((8, 16), 1, seed=0)
    assert flow(x, timestep, where).dtype == torch.float32


# -------------------------------------------------------------------------------- not there


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "just-a-name", "a/b/c"])
def test_a_missing_model_gives_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        locate(name)
    assert name in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_model_of_the_hub_without_network_says_how_to_provide_it() -> None:
    with pytest.raises(ConfigError) as caught:
        locate("nobody/not-a-model-for-tests")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert "nobody/not-a-model-for-tests" in message and "--config.pretrained.model=" in message


def test_a_pipeline_of_no_known_family_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioPipeline"}', encoding="utf-8")
    config = Config()
    config.pretrained.model = str(tmp_path)
    with pytest.raises(ConfigError, match="AudioPipeline: there is no family for it"):
        find_family(config)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_folder_that_is_no_pipeline_gives_one_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError):
        locate(str(tmp_path))
    (tmp_path / "model_index.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        locate(str(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_flow_with_too_many_levels_says_so(policy64: StableDiffusionPolicy) -> None:
    with pytest.raises(ConfigError, match="flow_channel_width"):
        policy64.make_flow((8,) * 5, 1, seed=0)


@pytest.mark.parametrize("targets", [("attention",), ("attention", "resnets"), ("all",), ("to_v",)])
def test_diffusers_loads_a_lora_on_any_layers(targets: tuple[str, ...], tmp_path: Path) -> None:
    """The pictures' network from the saved file is the trained one, whatever layers have a LoRA."""
    policy = make_policy(lora_targets=targets, guidance_scale=1.0)
    x, timestep, where = some_inputs(policy)
    with torch.no_grad():
        known = policy.output(x, timestep, where)
        with policy.reference():
            assert not torch.allclose(policy.output(x, timestep, where), known, atol=1e-3)
    policy.save(tmp_path)
    pipeline = make_pipeline()
    pipeline.load_lora_weights(tmp_path)
    with torch.no_grad():
        found = pipeline.unet(x, timestep, where.tensors["prompt_embeds"]).sample
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-5)


def test_the_layers_are_those_asked_for() -> None:
    def layers(*targets: str) -> set[str]:
        state = make_policy(lora_targets=targets).state_dict()
        return {name.partition(".lora_")[0] for name in state}

    attention, every = layers("attention"), layers("all")
    assert layers("to_v") < attention < layers("attention", "resnets") < every
    assert {"conv_in", "conv_out"} <= every and attention == layers(
        "to_q", "to_k", "to_v", "to_out.0"
    )
    assert make_policy(lora_targets=("to_v",)).settings()["model.lora_targets"] == ("to_v",)
    with pytest.raises(ConfigError, match=r"lora_targets=to_w.*attention, resnets, all"):
        make_policy(lora_targets=("to_w",))


def test_a_lora_acts_up_to_its_share_of_signal_row_by_row() -> None:
    """Rows with more signal are the pretrained model's to the bit, with their gradient; the others
    what a LoRA gives that acts everywhere."""
    until = 0.5
    policy = make_policy(lora_until=until, guidance_scale=2.0)
    always = make_policy(guidance_scale=2.0)
    always.load_state_dict(policy.state_dict())
    x, _, where = some_inputs(policy)
    rows = torch.tensor([0, 1, 2, 0])
    x, where = x[rows], where[rows]
    levels = policy.noising.levels(torch.arange(1000.0)).alpha.square()
    last = float((levels <= until).nonzero()[0])  # the cleanest time at which it acts
    alpha_bar = policy.noising.levels(torch.tensor([last, last - 1])).alpha.square()
    assert alpha_bar[0] <= until < alpha_bar[1]
    time = torch.tensor([last, last - 1, 999.0, 0.0])
    acts = (time >= last).tolist()
    found = policy.output(x, time, where)
    with torch.no_grad():
        everywhere = always.output(x, time, where)
        with policy.reference():
            frozen = policy.output(x, time, where)
    for row, on in enumerate(acts):
        assert torch.equal(found[row], everywhere[row] if on else frozen[row])
        assert not torch.equal(everywhere[row], frozen[row])
    off = torch.tensor(acts).logical_not()
    (gradient,) = torch.autograd.grad(found[off].sum(), policy.parameters()[-1], retain_graph=True)
    assert not gradient.any()
    assert torch.autograd.grad(found[~off].sum(), policy.parameters()[-1])[0].any()
    assert policy.lora_strengths([last + 5, last, last - 1]) == (1, 1, 0)
    assert always.lora_strengths([999.0, 0.0]) == ()


@pytest.mark.parametrize("until", [1.0, 0.5])
def test_a_lora_fades_row_by_row(until: float) -> None:
    """With the strength s it does what one does whose scale is s, and its gradient is that one's.
    Above `lora_until` it does nothing."""
    power = 0.5
    policy = make_policy(lora_until=until, lora_fade=power)
    plain = make_policy()
    plain.load_state_dict(policy.state_dict())
    x, _, where = some_inputs(policy)
    time = torch.tensor([999.0, 600.0, 0.0])
    alpha_bar = policy.noising.levels(time).alpha.square()
    wanted = [(until / float(level)) ** power if level <= until else 0 for level in alpha_bar]
    assert policy.lora_strengths(time.tolist()) == pytest.approx(wanted)
    assert wanted[0] > wanted[1] > 1 and (wanted[2] == 0) == (until < 1)
    found = policy.output(x, time, where)
    for row, strength in enumerate(wanted):
        one = torch.tensor([row])
        plain.network.set_adapters(ADAPTER, strength)
        alike = plain.output(x[one], time[one], where[one])
        torch.testing.assert_close(found[one], alike, rtol=1e-4, atol=1e-4)
        ours, theirs = (
            torch.autograd.grad(out.sum(), made.parameters()[-1], retain_graph=True)[0]
            for out, made in ((found[one], policy), (alike, plain))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_lora_is_not_strengthened_without_end() -> None:
    """Where a schedule has no signal left at its noisiest time."""
    pipeline = make_pipeline()
    pipeline.scheduler.alphas_cumprod[-1] = 0
    policy = StableDiffusionPolicy(pipeline, guidance_scale=1.0, lora_fade=0.5)
    assert policy.lora_strengths([999.0]) == pytest.approx([100.0])
    x, _, where = some_inputs(policy)
    assert policy.output(x, torch.full((3,), 999.0), where).isfinite().all()


def test_a_lora_that_would_never_act_is_refused() -> None:
    config = load_config("demo")
    set_option(config, "model.lora_until", 1e-6)
    with pytest.raises(ConfigError, match=r"lora_until=1e-06 is below the share ᾱ=.* give more"):
        build_kernel(config, make_policy())


@pytest.mark.parametrize("key", ["training.gradient_checkpointing", "speed.compile"])
def test_a_lora_of_some_steps_refuses_passes_that_lose_its_rows(key: str) -> None:
    config = load_config("demo")
    for name, value in (("model.lora_until", 0.5), (key, True)):
        set_option(config, name, value)
    with pytest.raises(ConfigError, match=f"lora_until=0.5 does not go with config.{key}=True"):
        find_family(config).check(config)
    config.model.lora_until, config.model.lora_fade = 1, 0.5
    with pytest.raises(ConfigError, match=f"lora_fade=0.5 does not go with config.{key}=True"):
        find_family(config).check(config)


@pytest.mark.parametrize("key", ["model.lora_until", "model.lora_fade"])
def test_what_has_no_lora_has_none_to_switch_off(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("worlds/ring")
    set_option(config, key, 0.5)
    with pytest.raises(ConfigError, match=rf"{key}=0\.5 does not go .* no lora_targets"):
        check_names(config)
    config = load_config("demo")
    set_option(config, key, 0.5)
    check_names(config)
    mine = replace(find_family(config), name="mine", lora_targets={})
    monkeypatch.setattr(assemble, "find_family", lambda config: mine)
    with pytest.raises(ConfigError, match=rf"{key}=0\.5 does not go .* \(mine\)"):
        check_names(config)
