"""What a family knows of a model that lies in a folder of another name, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from nablagfn.commands.planner.parts import META, build_subject
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.config.drawn import drawn_with
from nablagfn.families import FAMILIES
from nablagfn.methods.registry import check_settings
from nablagfn.models.locate import missing_parts
from tests.tiny_families import TINY, pixels


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
