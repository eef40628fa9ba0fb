"""The suite's steps, the most important first. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

REST = 3600.0  # seconds: as long as there is time


@dataclass(frozen=True)
class Step:
    """A process of its own.

    module: of this package; its CASES has a function for each of `cases`. limit: seconds at most.
    least: with fewer left it is not begun.
    """

    name: str
    module: str
    why: str
    limit: float
    least: float
    cases: tuple[str, ...]


SWITCHES = (
    "micro_batch=4",
    "micro_batch=8",
    "micro_batch=16",
    "micro_batch=32",
    "micro_batch=16, vae_slice=4",
    "micro_batch=32, vae_slice=4, gradient_checkpointing",
    "channels_last",
    "gradient_checkpointing",
    "vae_slice=1",
    "vae_checkpointing",
    "guess_decoder",
    "fused_optimizer",
    "offload_reward",
    "offload_text_encoder",
    "adamw8bit",
)

STEPS = (
    Step("machine", "machine", "versions; rates of matrix products; memory", 60, 5, ("rates",)),
    Step("doctor", "machine", "nablagfn doctor on tiny-animals", 60, 10, ("doctor",)),
    Step(
        "tests",
        "checks",
        "pytest -m gpu: every claim about a GPU",
        300,
        20,
        ("core", "whole_runs", "compiled"),
    ),
    Step("demo", "demo", "make demo: seconds, figures, pictures", 120, 30, ("demo",)),
    Step(
        "commands",
        "commands",
        "two of the README's commands, one update each, SD1.5 at full size",
        90,
        30,
        ("fast", "fewer_gpus_no_flow_correction"),
    ),
    Step(
        "updates",
        "updates",
        "whole updates of SD1.5, warm: two settings, three rewards",
        90,
        25,
        ("fast", "no_flow", "hpsv2", "imagereward"),
    ),
    Step("published", "published", "as the published code does it, in turns", 75, 25, ("turns",)),
    Step("profile", "profile", "the ten largest costs of an update", 60, 25, ("fast",)),
    Step("switches", "switches", "each switch on SD1.5", 240, 30, SWITCHES),
    Step(
        "gradients",
        "gradients",
        "reward gradients: seconds and memory by resolution",
        120,
        25,
        ("aesthetic", "hpsv2", "imagereward"),
    ),
    Step("graphs", "switches", "CUDA graphs on SD1.5", 120, 40, ("cuda_graphs",)),
    Step(
        "compiled",
        "machine",
        "a compiled step of tiny-animals beside the plain one, by nablagfn doctor",
        150,
        60,
        ("doctor-compiled",),
    ),
    Step("compile", "switches", "torch.compile on SD1.5", 240, 90, ("compile",)),
    Step("together", "switches", "all that may pay, together", 240, 90, ("together",)),
    Step(
        "long-commands",
        "commands",
        "the README's other two commands",
        180,
        60,
        ("fewer_gpus", "default"),
    ),
    Step("long-updates", "updates", "the default's update, warm", 120, 60, ("default",)),
    Step("unet", "unet", "more training of tiny-animals' U-Net", REST, 40, ("train",)),
)


def select(only: Iterable[str]) -> list[Step]:
    """STEPS, or of `only` (STEP or STEP:CASE). Raises ValueError for an unknown one."""
    wanted: dict[str, list[str]] = {}
    known = {step.name: step for step in STEPS}
    for text in only:
        name, _, case = text.partition(":")
        if name not in known or (case and case not in known[name].cases):
            choice = ", ".join(known[name].cases if name in known else known)
            raise ValueError(f"--only {text}: there is no such step or case; there are: {choice}")
        wanted.setdefault(name, []).extend([case] if case else known[name].cases)
    if not wanted:
        return list(STEPS)
    return [narrowed(step, wanted[step.name]) for step in STEPS if step.name in wanted]


def narrowed(step: Step, cases: Iterable[str]) -> Step:
    """The step with these cases only, in its own order."""
    chosen = set(cases)
    return replace(step, cases=tuple(case for case in step.cases if case in chosen))
