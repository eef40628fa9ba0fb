"""The code that draws with a run's LoRA, and with its sampler, in plain diffusers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import Config, ConfigError
from ..families import Family, StockSampler, family_of_run
from ..families.family import guidance_of
from ..methods.registry import find_method
from ..models.lora import MEAN


def how_to_load(
    config: Config,
    prompt: str,
    weights: str,
    weight_name: str = "",
    times: Sequence[float] = (),
    strengths: Sequence[float] = (),
    first_state: str = "",
) -> str:
    """A program that draws `prompt` with the LoRA in the folder `weights`.

    times: of the run's steps (RunFolder.times), which an uneven grid needs. strengths: of the
    LoRA in each of them; none: 1 in all. first_state: the file with the mean of the first state;
    "": it is 0.

    Where no scheduler of diffusers draws as the run does, how this package does; empty for a family
    that has no pipeline.
    """
    family = family_of_run(config)
    if family.stock_sampler is None or family.loading_code is None:
        return ""
    try:
        stock = stock_of(family, config, times)
    except ConfigError as error:
        return f"# {error}\nnablagfn sample RUN --prompts {prompt!r}"
    name = f", weight_name={weight_name!r}" if weight_name else ""
    lines = [
        *(["import torch"] if first_state else []),
        f"from diffusers import {', '.join(sorted({stock.scheduler, *family.pipelines} - {''}))}",
        *(["from safetensors.torch import load_file"] if first_state else []),
        *base(family, config),
        f"pipe.load_lora_weights({weights!r}{name})",
        *set_sampler(stock),
        *changing(strengths),
        *begin(first_state),
        *draw(config, stock, prompt, bool(strengths), bool(first_state)),
    ]
    return "\n".join(lines)


def stock_of(family: Family, config: Config, times: Sequence[float]) -> StockSampler:
    """How diffusers draws as the run does, for a family that has pipelines; without noise where the
    paths of the run's method have none. Raises ConfigError when no scheduler does."""
    assert family.stock_sampler is not None
    if find_method(config.experiment.method).ode and family.of_diffusers:
        return family.of_diffusers.ode_sampler(config)
    return family.stock_sampler(config, times)


def base(family: Family, config: Config) -> list[str]:
    """Lines that make `pipe`, the pretrained model; what they import comes first."""
    assert family.loading_code is not None
    lines = family.loading_code(config)
    imports = [line for line in lines if line.startswith("from ")]
    return [*imports, "", *(line for line in lines if line not in imports)]


def set_sampler(stock: StockSampler) -> list[str]:
    """Lines that give `pipe` the sampler of the run; none where it is its own."""
    if not stock.scheduler:
        return []
    start = f"pipe.scheduler = {stock.scheduler}.from_config(pipe.scheduler.config"
    taken = [f"{name}=pipe.scheduler.config.{other}" for name, other in stock.taken.items()]
    after = counting() if stock.counts else []
    if not stock.options and not taken:
        return [f"{start})", *after]
    given = ", ".join([*([arguments(stock.options)] if stock.options else []), *taken])
    return [f"{start},", *(f"    {line}" for line in wrapped(f"{given})")), *after]


def counting() -> list[str]:
    """Lines that let the scheduler be given σ, as `models.latent.count_steps`."""
    return [
        "begin = pipe.scheduler.set_timesteps  # the pipeline also gives σ, and this takes none",
        "shifts = pipe.scheduler.config.use_dynamic_shifting",
        "pipe.scheduler.set_timesteps = lambda steps=None, device=None, sigmas=(), mu=None: begin(",
        "    steps or len(sigmas), device, mu=mu if shifts else None)",
    ]


def wrapped(text: str) -> list[str]:
    """Arguments in lines of at most 92 characters."""
    return textwrap.wrap(text, 92, break_long_words=False, break_on_hyphens=False)


def changing(strengths: Sequence[float]) -> list[str]:
    """Lines of a callback that changes the LoRA's strength from step to step, or switches it off
    where that is all; none where it is 1 in all steps."""
    if not strengths:
        return []
    begin = ["", "def ended(pipe, step, time, given):"]
    if set(strengths) <= {0.0, 1.0}:
        acting = strengths.count(1.0)
        return [
            *begin,
            f"    if step == {acting - 1}:  # the LoRA acts in the first {acting} steps only",
            "        pipe.disable_lora()",
            f"    if step == {len(strengths) - 1}:  # ready for the next picture",
            "        pipe.enable_lora()",
            "    return given",
            "",
            "pipe.enable_lora()",
        ]
    told = ", ".join(f"{strength:.6g}" for strength in strengths)
    return [
        "",
        f"strengths = [{told}]  # of the LoRA, by step",
        *begin,
        "    pipe.set_adapters(names, strengths[(step + 1) % len(strengths)])",
        "    return given",
        "",
        "names = pipe.get_active_adapters()",
        "pipe.set_adapters(names, strengths[0])",
    ]


def begin(first_state: str) -> list[str]:
    """Lines that read the mean of the first state; none where it is 0."""
    if not first_state:
        return []
    return ["", f'mean = load_file({first_state!r})["{MEAN}"]  # of the first state']


def draw(
    config: Config, stock: StockSampler, prompt: str, called_back: bool, moved: bool
) -> list[str]:
    """Lines that draw one picture as the run does. called_back: after each step by `ended`. moved:
    from a first state of mean `mean`."""
    sampling = config.sampling
    guidance = guidance_of(stock, config)
    guided = "".join(f", {key}={_number(value)}" for key, value in guidance.items())
    given = "".join(f", {key}={_number(value)}" for key, value in stock.call.items())
    if called_back:
        given += ", callback_on_step_end=ended"
    if moved:
        given += ", latents=latents"
    return [
        *(["latents = torch.randn(1, *mean.shape) + mean"] if moved else []),
        f"image = pipe(prompt={prompt!r}{guided},",
        f"    num_inference_steps={sampling.num_steps}{given}).images[0]",
    ]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def arguments(options: Mapping[str, Any]) -> str:
    """Keyword arguments as they are written, strings in double quotes."""
    written = {k: f'"{v}"' if isinstance(v, str) else repr(v) for k, v in options.items()}
    return ", ".join(f"{key}={value}" for key, value in written.items())
