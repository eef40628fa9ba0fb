"""Each switch of SD1.5, on eight paths of an update, eight transitions at a time."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from update import SWITCHES as KNOWN

from nablagfn.core.counting import compilations

from .child import Case, Setup, Unavailable
from .subject import Options, measured, one_update, paths, trainer_of

BASE: Options = {**paths(8), "training.micro_batch": 8}
TOGETHER: Options = {
    "training.micro_batch": 16,
    "training.vae_slice": 4,
    "speed.channels_last": True,
    "speed.compile": True,
    "speed.cuda_graphs": True,
    "speed.fused_optimizer": True,
}
ALONE = (
    "channels_last",
    "gradient_checkpointing",
    "vae_checkpointing",
    "fused_optimizer",
    "offload_reward",
    "offload_text_encoder",
)
SWITCHES: dict[str, Options] = {
    **{f"micro_batch={n}": {"training.micro_batch": n} for n in (4, 8, 16, 32)},
    "micro_batch=16, vae_slice=4": {"training.micro_batch": 16, "training.vae_slice": 4},
    "micro_batch=32, vae_slice=4, gradient_checkpointing": {
        "training.micro_batch": 32,
        "training.vae_slice": 4,
        "training.gradient_checkpointing": True,
    },
    "vae_slice=1": {"training.vae_slice": 1},
    **{name: KNOWN[name] for name in ALONE},
}
COMPILED: dict[str, Options] = {
    "cuda_graphs": KNOWN["cuda_graphs"],
    "compile": KNOWN["compile"],
    "together": TOGETHER,
}


def base(setup: Setup) -> Options:
    """Fewer paths for a rehearsal."""
    return {**paths(4), "training.micro_batch": 8} if setup.small else BASE


def switch(setup: Setup, *, options: Options) -> dict[str, Any]:
    """Raises Unavailable where the card is too small: some are tried to find that out."""
    try:
        return measured(setup, {**base(setup), **options})
    except torch.OutOfMemoryError as error:
        raise Unavailable(f"out of memory: {str(error).splitlines()[0]}") from None


def guess_decoder(setup: Setup) -> dict[str, Any]:
    """A decoder of TAESD's shape with random weights."""
    folder: Path = setup.work / "taesd"
    AutoencoderTiny(latent_channels=16 if setup.small else 4).save_pretrained(folder)
    return measured(setup, {**base(setup), "model.guess_decoder": str(folder)})


def adamw8bit(setup: Setup) -> dict[str, Any]:
    """Raises Unavailable without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not on this machine")
    return measured(setup, {**base(setup), "training.optimizer": "adamw8bit"})


def compiled(setup: Setup, *, options: Options) -> dict[str, Any]:
    """Cold, with the compiling in it, then warm. Raises Unavailable where there is no GPU."""
    if setup.device != "cuda":
        raise Unavailable("compiling takes minutes on a CPU, and CUDA graphs need CUDA")
    torch._dynamo.reset()
    chosen = {**base(setup), **options}
    trainer = trainer_of(setup, chosen)
    cold = one_update(trainer, warm=False)
    setup.note({"cold": cold.figures(), "compilations": compilations(), "options": chosen})
    warm = one_update(trainer, warm=False)
    return {
        **warm.figures(),
        "cold": cold.figures(),
        "compilations": compilations(),
        "options": chosen,
        "reward": "aesthetic",
    }


CASES: dict[str, Case] = {
    **{name: partial(switch, options=options) for name, options in SWITCHES.items()},
    **{name: partial(compiled, options=options) for name, options in COMPILED.items()},
    "guess_decoder": guess_decoder,
    "adamw8bit": adamw8bit,
}
