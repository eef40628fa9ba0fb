"""How the model is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Group


class Training(Group):
    """Optimisation."""

    source: Literal["auto", "paths", "pool"] = Field(
        "auto",
        description="what is learned from: paths (drawn anew each epoch by the model as it is) or "
        "pool (paths of the pretrained model, drawn once, and a share of the model's own: pool.…); "
        "auto: pool for nabla-db-pool and reward-weighted, paths for all others",
    )
    lr: float = Field(1e-3, gt=0, description="learning rate of the LoRA")
    flow_lr: float = Field(1e-3, gt=0, description="learning rate of the flow network g_φ")
    flow_wd: float = Field(1e-2, ge=0, description="weight decay of the flow network")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="of both learning rates over the run's updates; cosine falls to 0 at the end",
    )
    optimizer: Literal["adamw", "lion", "adamw8bit"] = Field(
        "adamw",
        description="adamw (torch), lion (lion-pytorch; use a 3-10 times lower lr) or adamw8bit "
        "(bitsandbytes: moments of matrices from 4,096 elements on in 8 bits; other numbers)",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="first moment decay (adamw and lion)")
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="second moment decay; 0.95 is often stabler"
    )
    adam_weight_decay: float = Field(1e-4, ge=0, description="weight decay of the LoRA")
    adam_epsilon: float = Field(1e-8, gt=0, description="epsilon of adamw")
    max_grad_norm: float = Field(
        1.0, gt=0, description="gradient norm limit, applied to LoRA and flow network separately"
    )
    num_inner_epochs: int = Field(1, ge=1, description="passes over each epoch's samples")
    batch_size: int = Field(4, ge=1, description="trajectories per accumulation step and process")
    gradient_accumulation_steps: int = Field(
        8, ge=1, description="accumulation steps per optimizer update"
    )
    micro_batch: int = Field(
        0,
        ge=0,
        description="transitions per forward pass; 0 means training.batch_size. Changes memory "
        "and speed, not results",
    )
    num_epochs: int = Field(100, ge=1, description="epochs (sample, then update)")
    max_minutes: float = Field(
        0.0,
        ge=0,
        description="minutes of training after which the run ends, with the epoch that is under "
        "way; over restarts, measurements not counted. 0: only training.num_epochs ends it",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "bf16",
        description="dtype of the frozen weights on a GPU; the LoRA, scores, scheduler algebra and "
        "rewards stay float32. On CPU float32 is used",
    )
    allow_tf32: bool = Field(True, description="TF32 matrix products on NVIDIA GPUs")
    gradscaler_growth_interval: int = Field(
        2000, ge=1, description="updates between attempts to raise the fp16 loss scale"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute U-Net activations to save memory"
    )
    vae_slice: int = Field(
        0,
        ge=0,
        description="pictures decoded and scored at a time; 0: all of a micro-batch. Saves memory, "
        "and changes results by rounding only",
    )
    vae_checkpointing: bool = Field(
        False, description="recompute the activations of the VAE's decoder to save memory"
    )
    shard_base: bool = Field(
        False,
        description="several processes: each keeps its share of the U-Net's frozen weights and "
        "gathers a part at a time for each pass (FSDP2); for a model that does not fit beside "
        "its activations. docs/many_gpus.md says what it refuses",
    )
