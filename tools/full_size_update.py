"""One update at full size: SD1.5 and a reward by their true architectures, random weights.

Prints what it took in time and memory:

    python tools/full_size_update.py aesthetic|hpsv2|imagereward [OUT_FOLDER]

It answers: does the whole graph fit and run, and what does it cost? Everything is as in
config/NAME.py except how much is drawn: one trajectory of two steps, both learnt from. The words
are letters (no vocabulary is shipped), which changes no shape.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    BertTokenizer,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from nablagfn import PromptSet, StableDiffusionPolicy, Trainer, load_config
from nablagfn.rewards import NamedReward
from nablagfn.rewards.aesthetic import Aesthetic, Head
from nablagfn.rewards.clip import ClipScore
from nablagfn.rewards.hpsv2 import VIT_H_14
from nablagfn.rewards.imagereward import BLIP_LARGE, ImageReward
from nablagfn.rewards.pixels import longer_side
from nablagfn.runfolder import RunFolder

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def clip_letters() -> CLIPTokenizer:
    """CLIP's tokenizer without merges; end mark 49407 as in the true one."""
    entries = [*LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's four parts by their published configurations."""
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=clip_letters(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def aesthetic() -> Aesthetic:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    return Aesthetic(CLIPVisionModelWithProjection(vision), Head())


def hpsv2() -> ClipScore:
    return ClipScore(CLIPModel(VIT_H_14), clip_letters(), longer_side)


def imagereward() -> ImageReward:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    with tempfile.TemporaryDirectory() as folder:
        entries = "\n".join([*marks, *LETTERS, *("##" + c for c in LETTERS)])
        (Path(folder) / "vocab.txt").write_text(entries, encoding="utf-8")
        words = BertTokenizer.from_pretrained(folder)
    return ImageReward(BLIP_LARGE).with_words(words)


REWARDS = {"aesthetic": aesthetic, "hpsv2": hpsv2, "imagereward": imagereward}


def millions(*modules: torch.nn.Module) -> float:
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def peak_gib(device: torch.device) -> float:
    """Of the device's memory; of the process's on a CPU (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(name: str, out: str) -> None:
    torch.manual_seed(0)
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = sd15().to(device)
    reward = REWARDS[name]().to(device)
    policy = StableDiffusionPolicy(pipeline, name="sd15-random", gradient_checkpointing=True)
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
        "reward": name,
        "U-Net, millions": round(millions(pipeline.unet), 1),
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
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
