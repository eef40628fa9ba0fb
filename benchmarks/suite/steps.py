"""The suite's steps, the most important first. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    Step("tests", "checks", "pytest -m gpu: every claim about a GPU", 180, 20, ("pytest",)),
    Step("demo", "demo", "make demo: seconds, figures, pictures", 75, 20, ("demo",)),
    Step(
        "commands",
        "commands",
        "the README's four commands, one update each, SD1.5 at full size",
        150,
        40,
        ("default", "fast", "fewer_gpus", "fewer_gpus_no_flow_correction"),
    ),
    Step(
        "updates",
        "updates",
        "whole updates of SD1.5, warm: three settings, three rewards",
        120,
        25,
        ("fast", "no_flow", "default", "hpsv2", "imagereward"),
    ),
    Step("published", "published", "as the published code does it, in turns", 75, 25, ("turns",)),
    Step("switches", "switches", "each switch on SD1.5", 240, 30, SWITCHES),
    Step(
        "gradients",
        "gradients",
        "reward gradients: seconds and memory by resolution",
        90,
        20,
        ("aesthetic", "hpsv2", "imagereward"),
    ),
    Step("profile", "profile", "the ten largest costs of an update", 45, 20, ("fast",)),
    Step(
        "compiled",
        "switches",
        "torch.compile, CUDA graphs, and all that pays together",
        240,
        60,
        ("cuda_graphs", "compile", "together"),
    ),
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
    return Step(
        step.name,
        step.module,
        step.why,
        step.limit,
        step.least,
        tuple(case for case in step.cases if case in chosen),
    )
