"""What a family knows of a model that lies in a folder of another name, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from nablagfn.commands.doctor import parts
from nablagfn.commands.doctor.records import Patient
from nablagfn.commands.planner.parts import META, build_subject, measure
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.config.drawn import drawn_with
from nablagfn.families import FAMILIES, find_family
from nablagfn.methods.build import build_kernel, build_objective
from nablagfn.methods.parts import Parts
from nablagfn.methods.registry import check_settings
from nablagfn.models.flux import Flux
from nablagfn.models.latent_model import PipelineCall
from nablagfn.models.load import policy_of
from nablagfn.models.locate import missing_parts
from nablagfn.models.published import PUBLISHED
from nablagfn.models.sd3 import StableDiffusion3
from nablagfn.prompts import PromptSet
from nablagfn.report.loading import stock_of
from nablagfn.rewards import NamedReward
from tests.tiny_families import TINY, pixels

CPU = torch.device("cpu")


def config_of(**options: object) -> Config:
    config = Config()
    for key, value in options.items():
        set_option(config, key.replace("__", "."), value)
    return config


def test_flux_without_a_shift_is_known_by_its_scheduler(tmp_path: Path) -> None:
    """FLUX.1-schnell in any folder: the stock sampler is given a shift of 0."""
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    found = []
    for shifts in (True, False):
        file.write_text(json.dumps({"use_dynamic_shifting": shifts}), encoding="utf-8")
        stock = FAMILIES["flux"].stock_sampler
        assert stock is not None
        found.append(dict(stock(config_of(pretrained__model=str(tmp_path)), ()).options))
    assert "base_shift" not in found[0]
    assert found[1]["use_dynamic_shifting"] and found[1]["max_shift"] == 0


@pytest.mark.parametrize(("told", "shifts"), [(True, True), (False, True), (False, False)])
def test_schnell_is_known_in_any_folder(told: bool, shifts: bool) -> None:
    """By what it has not: an input for w, and a shift. Others without the input are not it."""
    pipeline = TINY["flux"]()
    pipeline.transformer.register_to_config(guidance_embeds=told)
    pipeline.scheduler.register_to_config(use_dynamic_shifting=shifts)
    assert Flux(pipeline).distilled == (not told and not shifts)


def test_the_program_loads_a_pipeline_that_was_saved_without_t5(tmp_path: Path) -> None:
    pipeline = TINY["sd3"]()
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path)
    assert missing_parts(str(tmp_path)) == ["text_encoder_3", "tokenizer_3"]
    code = FAMILIES["sd3"].loading_code
    assert code is not None
    names: dict[str, object] = {"StableDiffusion3Pipeline": StableDiffusion3Pipeline}
    exec("\n".join(code(config_of(pretrained__model=str(tmp_path)))), names)
    assert names["pipe"].text_encoder_3 is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(("family", "most"), [("sd3", 512), ("flux", 512), ("qwen-image", 1024)])
def test_prompts_have_the_pipeline_s_bound(family: str, most: int) -> None:
    config = config_of(sampling__max_sequence_length=most + 1)
    with pytest.raises(ConfigError, match=rf"max_sequence_length={most + 1}: .* {most} at most"):
        FAMILIES[family].check(config)


def test_transformers_are_not_run_in_float16() -> None:
    config = config_of(training__mixed_precision="fp16")
    transformers = {k: v for k, v in FAMILIES.items() if v.network == "transformer"}
    for family in transformers.values():
        with pytest.raises(ConfigError, match=r"mixed_precision=fp16: .* take bf16"):
            family.check(config)
    assert transformers.keys() >= {"sd3", "sana"}


def test_samples_of_another_size_are_not_compared() -> None:
    plain = drawn_with(config_of())
    assert drawn_with(config_of(sampling__height=512)) != plain
    assert drawn_with(config_of(sampling__max_sequence_length=77)) != plain
    assert "height" not in plain["sampler"]  # as in files from before


@pytest.mark.parametrize(("family", "dtype"), [("sdxl", torch.float32), ("sd3", torch.bfloat16)])
def test_a_plan_has_the_autoencoder_s_true_dtype(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    TINY[family]().save_pretrained(tmp_path)
    config = config_of(
        pretrained__model=str(tmp_path),
        pretrained__family=family,
        experiment__reward_fn="brightness",
        sampling__height=pixels(family),
        sampling__width=pixels(family),
        model__flow_channel_width="8,16",
    )
    with META:
        subject = build_subject(config, torch.bfloat16, META)
    assert {p.dtype for p in subject.policy.vae.parameters()} == {dtype}
    assert subject.policy.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("option", "value"), [("scheduler", "cps"), ("scheduler", "flow-sde"), ("final_sigma", 0.1)]
)
def test_paths_without_noise_have_no_sampler_of_noise(option: str, value: object) -> None:
    config = config_of(experiment__method="vgg-flow", **{f"sampling__{option}": value})
    with pytest.raises(ConfigError, match=rf"config\.sampling\.{option}=.*=vgg-flow"):
        check_settings(config)


def test_sd3_draws_as_far_as_it_knows_places() -> None:
    pipeline = TINY["sd3"]()
    most = pipeline.transformer.config.pos_embed_max_size * pipeline.transformer.config.patch_size
    most *= pipeline.vae_scale_factor
    assert StableDiffusion3(pipeline, PipelineCall(height=most)).sample_shape[1] > 0
    step = pipeline.transformer.config.patch_size * pipeline.vae_scale_factor
    with pytest.raises(ConfigError, match=rf"config\.sampling\.width={most + step}: .* {most} pix"):
        StableDiffusion3(pipeline, PipelineCall(width=most + step))


@pytest.mark.parametrize("no_flow", [True, False])
def test_a_flow_network_that_is_not_learned_is_not_built(no_flow: bool, tmp_path: Path) -> None:
    """Latents of 10×10 have no third level: no matter where g_φ is not there."""
    TINY["sd3"]().save_pretrained(tmp_path)
    config = config_of(
        pretrained__model=str(tmp_path),
        pretrained__family="sd3",
        experiment__reward_fn="brightness",
        sampling__height=20,
        sampling__width=20,
        model__flow_channel_width="8,16,32",
        model__no_flow=no_flow,
    )
    if not no_flow:
        with pytest.raises(ConfigError, match="flow_channel_width"):
            measure(config, CPU)
        return
    found = measure(config, CPU)
    assert found.flow.peak == found.fixed["flow network and its optimizer"] == 0
    patient = Patient(config, CPU)
    vars(patient).update(policy=find_family(config).load(config, CPU, False))
    assert parts.flow(patient).text == "none"


@pytest.mark.parametrize("name", ["vgg-flow", "nabla-db"])
def test_sana_of_512_pixels_is_drawn_so_with_and_without_noise(name: str) -> None:
    config = config_of(
        pretrained__model="Efficient-Large-Model/Sana_1600M_512px_diffusers",
        experiment__method=name,
        sampling__scheduler="ddpm",
    )
    call = stock_of(find_family(config), config, ()).call
    assert call["height"] == call["width"] == 512 and not call["use_resolution_binning"]


def test_a_world_has_no_pixels() -> None:
    for key in ("height", "width", "max_sequence_length"):
        config = config_of(pretrained__model="worlds/ring", **{f"sampling__{key}": 64})
        with pytest.raises(ConfigError, match=rf"config\.sampling\.{key}=64: worlds/ring is a wor"):
            FAMILIES["world"].check(config)


def test_vgg_flow_in_half_precision_minds_the_difference_that_it_takes() -> None:
    policy = policy_of(
        StableDiffusion3,
        "tiny-animals-flow",
        PipelineCall(max_sequence_length=1),
        device="cpu",
        dtype=torch.bfloat16,
    )
    config = config_of(experiment__method="vgg-flow", sampling__num_steps=4)
    given = NamedReward("dark", lambda images, prompts, metadata: -images.mean((1, 2, 3)))
    made = Parts(config, policy, given, PromptSet(("a cat",)), build_kernel(config, policy))
    with pytest.raises(ConfigError, match=r"config\.method\.vgg_difference=0.01"):
        build_objective(made)
    config.model.no_flow = True
    assert len(build_objective(made).modules) == 0


@pytest.mark.parametrize("family", list(TINY))
def test_one_update_at_full_size_is_there_for_every_family(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tools/full_size_update.py` with narrow parts: its random model gives finite outputs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    tool = importlib.import_module("full_size_update")
    name = next(n for n in (*PUBLISHED, "runwayml/stable-diffusion-v1-5") if of(n) == family)

    numbered = ("stable-diffusion", "sdxl", "sana")  # their schedulers' numbers are needed

    def narrow() -> dict[str, Any]:
        with torch.device("cpu" if family in numbered else "meta"):
            return dict(TINY[family]().to("meta").components)

    monkeypatch.setitem(tool.PUBLISHED, name, narrow)
    config = tool.settings("aesthetic", name, pixels(family), "out")
    known = FAMILIES[family].of_diffusers
    assert known is not None
    if known.lengths:
        config.sampling.max_sequence_length = 16
    policy = tool.random_policy(config, CPU)
    x = torch.zeros(1, *policy.sample_shape)
    with torch.no_grad():
        found = policy.output(x, torch.tensor([policy.noising.noisiest]), policy.condition(["a"]))
        assert torch.isfinite(found).all() and torch.isfinite(policy.decode(x)).all()


def of(name: str) -> str:
    return find_family(config_of(pretrained__model=name)).name
