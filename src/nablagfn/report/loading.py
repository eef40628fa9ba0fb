"""The code that draws with a run's LoRA, and with its sampler, in plain diffusers."""

from __future__ import annotations

from ..config import Config

EMBEDDED = "tiny-animals"  # shipped with nablagfn, not on the hub


def imports(config: Config) -> list[str]:
    """What the program needs."""
    solver = config.sampling.scheduler == "dpm-solver"
    scheduler = "DPMSolverMultistepScheduler" if solver else "DDIMScheduler"
    found = [f"from diffusers import {scheduler}, StableDiffusionPipeline"]
    if config.pretrained.model == EMBEDDED:
        found.append("from nablagfn.models.locate import locate")
    return [*found, ""]


def load_base(config: Config) -> list[str]:
    """Lines that make `pipe`, the pretrained model."""
    name, revision = config.pretrained.model, config.pretrained.revision
    if name == EMBEDDED:
        return [
            "pipe = StableDiffusionPipeline.from_pretrained(",
            f"    locate({name!r}), safety_checker=None, requires_safety_checker=False)",
        ]
    given = "" if revision == "main" else f", revision={revision!r}"
    return [f"pipe = StableDiffusionPipeline.from_pretrained({name!r}{given})"]


def set_sampler(config: Config) -> list[str]:
    """Lines that give `pipe` the sampler of the run."""
    if config.sampling.scheduler != "dpm-solver":
        return ["pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"]
    return [
        "pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config,",
        '    algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min")',
    ]


def draw(config: Config, prompt: str) -> list[str]:
    """Lines that draw one picture as the run does."""
    sampling = config.sampling
    noise = "" if sampling.scheduler == "dpm-solver" else f", eta={sampling.eta:g}"
    return [
        f"image = pipe({prompt!r}, guidance_scale={sampling.guidance_scale:g},",
        f"    num_inference_steps={sampling.num_steps}{noise}).images[0]",
    ]


def how_to_load(config: Config, prompt: str, weights: str, weight_name: str = "") -> str:
    """A program that draws `prompt` with the LoRA in the folder `weights`."""
    name = f", weight_name={weight_name!r}" if weight_name else ""
    lora = f"pipe.load_lora_weights({weights!r}{name})"
    lines = [*imports(config), *load_base(config), lora, *set_sampler(config)]
    return "\n".join([*lines, *draw(config, prompt)])
