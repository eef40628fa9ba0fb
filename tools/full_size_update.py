"""One update at full size: a model and a reward by their true architectures, random weights.

Prints what it took in time and memory:

    python tools/full_size_update.py aesthetic|hpsv2|imagereward [OUT_FOLDER]
    python tools/full_size_update.py aesthetic --model HUB_NAME --pixels 256

It answers: does the whole graph fit and run, and what does it cost? Everything is as in
config/NAME.py except how much is drawn: one trajectory of two steps, both learnt from. Stable
Diffusion 1.5 is whole, its words are letters (no vocabulary is shipped), which changes no shape.
Other models (docs/models.md) are without their text encoders, whose output is random numbers of
the same shapes: a run needs them once for each prompt.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from nablagfn import Config, PromptSet, StableDiffusionPolicy, Trainer, load_config
from nablagfn.commands.architectures import REWARDS
from nablagfn.families import find_family
from nablagfn.models.architectures import assembled, random_sd15
from nablagfn.models.latent import LatentPolicy
from nablagfn.models.latent_model import PipelineCall
from nablagfn.models.locate import SD15
from nablagfn.models.published import PUBLISHED
from nablagfn.rewards import NamedReward
from nablagfn.runs.runfolder import RunFolder


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def peak_gib(device: torch.device) -> float:
    """Of the device's memory; of the process's on a CPU (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def filled(part: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The part with small random matrices, norms of 1, and zeros elsewhere."""
    part.to_empty(device=device)
    for module in part.modules():
        if isinstance(module, QwenEmbedRope):  # its tables are neither parameters nor buffers
            fresh = QwenEmbedRope(module.theta, module.axes_dim, module.scale_rope)
            module.pos_freqs, module.neg_freqs = fresh.pos_freqs, fresh.neg_freqs
    with torch.no_grad():
        for name, value in [*part.named_parameters(), *part.named_buffers()]:
            if value.ndim > 1 and value.is_floating_point():
                value.normal_(std=0.02)
            else:
                value.fill_(1 if name.endswith("weight") else 0)
    return part.eval()


def random_policy(config: Config, device: torch.device) -> LatentPolicy:
    """The model of `config` with random weights; its text encoders stay on "meta", unused."""
    of = find_family(config).of_diffusers
    kind = of.latent_model
    with torch.device("meta"):  # an encoder alone may be larger than the memory
        made = PUBLISHED[config.pretrained.model]()
    for name in ("unet", "transformer", "vae"):
        if name in made:
            filled(made[name], device)
    policy = LatentPolicy(
        kind(assembled(kind, made), PipelineCall.of(config)),
        name=f"{config.pretrained.model}, random",
        gradient_checkpointing=True,
        vae_checkpointing=config.training.vae_checkpointing,
    )

    def encode(prompts, device):
        draw = torch.Generator().manual_seed(len(prompts[0]))
        blank = policy.model.blank(len(prompts)).items()  # its whole numbers are masks and lengths
        return {
            name: (
                torch.randn(value.shape, generator=draw) if value.is_floating_point() else value
            ).to(device)
            for name, value in blank
        }

    policy.model.encode = encode
    policy.model.negative = lambda device: encode([""], device)
    return policy


def settings(name: str, model: str, pixels: int, out: str) -> Config:
    config = load_config(name)
    config.training.batch_size = 1
    config.training.gradient_accumulation_steps = 1
    config.training.num_epochs = 1
    config.training.gradient_checkpointing = True
    config.sampling.batch_size = config.sampling.num_batches_per_epoch = 1
    config.sampling.num_steps = 2
    config.model.timestep_fraction = 1.0
    config.evaluation.num_prompts = 0
    config.logging.sample_freq = 0
    config.logging.tensorboard = False
    config.saving.output_dir = out
    if model not in SD15:
        config.pretrained.model = model
        config.sampling.height = config.sampling.width = pixels
        of = find_family(config).of_diffusers
        config.training.vae_checkpointing = of.recomputes_vae
    return config


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("reward", choices=("aesthetic", "hpsv2", "imagereward"))
    p.add_argument("out", nargs="?", default="")
    p.add_argument("--model", choices=list(PUBLISHED), default=SD15[0])
    p.add_argument("--pixels", type=int, default=0, help="height and width (0: the model's own)")
    p.add_argument(
        "--light", action="store_true", help="no guidance, no g_φ, 16 tokens of T5: for a CPU"
    )
    args = p.parse_args()
    name, out = args.reward, args.out or tempfile.mkdtemp()
    torch.manual_seed(0)
    config = settings(name, args.model, args.pixels, out)
    if args.light:
        config.sampling.guidance_scale, config.model.no_flow = 1.0, True
        config.sampling.max_sequence_length = 16 if "diffusion-3" in args.model else 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.model in SD15:
        policy: LatentPolicy = StableDiffusionPolicy(
            random_sd15().to(device), name="sd15-random", gradient_checkpointing=True
        )
    else:
        policy = random_policy(config, device)
    reward = REWARDS[name]().to(device)
    built = peak_gib(device)
    started = time.perf_counter()
    trainer = Trainer(
        policy,
        NamedReward(name, reward),
        PromptSet(("a red car", "two dogs")),
        config,
        folder=RunFolder(Path(out) / name),
    )
    trainer.fit()
    (row,) = trainer.folder.metrics()
    figures = {
        "model": args.model,
        "latents": list(policy.sample_shape),
        "reward": name,
        "network, millions": round(millions(policy.network), 1),
        "reward, millions": round(millions(reward), 1),
        "device": str(device),
        "seconds": round(time.perf_counter() - started, 1),
        "GiB with everything loaded": round(built, 1),
        "GiB at the peak": round(peak_gib(device), 1),
        "guess_sq": row["guess_sq"],
        "grad_norm": row["grad_norm"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
