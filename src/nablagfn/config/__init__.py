"""Every option of a run: name, type, default, range and help text, in one place (torch-free).

The names are those of the original `config/*.py` files; the defaults are the paper's
(`docs/options.md` is generated from here).
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names the key and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # whatever it quotes, one line


class Group(BaseModel):
    """Base of all groups: unknown keys are refused, assignments are checked."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Scheduler = Annotated[Literal["ddim", "ddpm", "dpm-solver"], BeforeValidator(_lower)]
Method = Annotated[
    Literal[
        "nabla-db",
        "nabla-db-lambda",
        "adjoint-matching",
        "terminal-gradient",
        "refl",
        "draft-k",
        "draft-lv",
        "alignprop",
        "ddpo",
        "dag-db",
    ],
    BeforeValidator(_lower),
]
# methods whose passes depend on the steps that a process drew, so that they cannot be sharded
UNEVEN = ("adjoint-matching", "alignprop", "dag-db")
Attenuation = Annotated[Literal["squared", "sqrt", "none"], BeforeValidator(_lower)]


class Training(Group):
    """Optimisation."""

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


class Speed(Group):
    """How fast a run is, at the same mathematics: results change by rounding only. All are off,
    because what they gain on a GPU has not been measured (docs/performance.md).
    """

    compile: bool = Field(
        False,
        description="torch.compile for the U-Net and the VAE's decoder; the first update compiles "
        "for minutes",
    )
    compile_reward: bool = Field(
        False, description="torch.compile for the networks of the reward, if it has any"
    )
    cuda_graphs: bool = Field(
        False,
        description="CUDA graphs (torch.compile's reduce-overhead) for passes of the U-Net without "
        "gradient, those of sampling; needs a CUDA device",
    )
    channels_last: bool = Field(
        False, description="channels-last memory format for the U-Net and the VAE"
    )
    fused_optimizer: bool = Field(False, description="adamw in one kernel (torch's fused=True)")
    offload_text_encoder: bool = Field(
        False,
        description="the text encoder stays in the computer's memory while no new prompt is "
        "encoded; each prompt is encoded once",
    )
    offload_reward: bool = Field(
        False,
        description="the weights of the reward, and of held-out ones, stay in the computer's "
        "memory while no pictures are scored; each scoring copies them (each micro-batch or "
        "training.vae_slice)",
    )

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is at work."""
        return self.compile or self.compile_reward or self.cuda_graphs


class Model(Group):
    """The objective and what is trained."""

    lora_rank: int = Field(8, ge=1, description="LoRA rank (= alpha) on to_q, to_k, to_v, to_out.0")
    reward_scale: float = Field(
        1e3, gt=0, description="β: the finetuned model samples p_pretrained·exp(β·reward)"
    )
    pretrained_strength: float = Field(
        1.0, ge=0, le=1, description="s: weight of the prior log p_pretrained; 1 is the paper"
    )
    timestep_fraction: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of each trajectory's transitions to learn from (the last always added); "
        "the paper has 0.1 for 50-step DDPM and 0.4 for 20-step SDE-DPM-Solver++",
    )
    unet_reg_scale: float = Field(
        1e3, ge=0, description="λ: trust region towards the parameters that drew the samples"
    )
    reverse_loss_scale: float = Field(1.0, ge=0, description="w_B: weight of the reverse loss")
    no_flow: bool = Field(
        False, description="forward loss only, no flow network: least memory, more bias"
    )
    reward_adaptive_mode: Attenuation = Field(
        "squared", description="γ, trust in the reward guess: squared (ᾱ), sqrt (√ᾱ) or none (1)"
    )
    guess_decoder: str = Field(
        "",
        description="a small decoder (AutoencoderTiny: hub name or folder) for the reward at "
        "predicted clean samples, instead of the VAE; faster, and other numbers. Finished samples "
        "are always decoded by the VAE",
    )
    flow_layers_per_block: int = Field(1, ge=1, description="layers per block of g_φ")
    flow_channel_width: tuple[PositiveInt, ...] = Field(
        (64, 128, 256, 256), min_length=2, description="channel widths of g_φ"
    )


class Experiment(Group):
    """Which reward, which prompts, which method."""

    method: Method = Field(
        "nabla-db",
        description="nabla-db (residual ∇-DB, the paper), nabla-db-lambda (∇-DB(λ)), "
        "adjoint-matching, terminal-gradient, refl, draft-k, draft-lv, alignprop, ddpo or dag-db; "
        "docs/methods.md compares them",
    )
    reward_fn: str = Field(
        "aesthetic",
        min_length=1,
        description="a built-in reward, or package.module:function for your own "
        "(images [B,3,H,W] in [0,1], prompts, metadata) -> [B]; or a sum of these, "
        "'0.7*hpsv2 + 0.3*aesthetic - 0.1*jpeg-size', minus to minimise",
    )
    prompt_fn: str = Field(
        "simple_animals",
        min_length=1,
        description="a built-in prompt set, or a .txt, .json or .csv file of prompts",
    )


class MethodSettings(Group):
    """Settings of particular methods (`experiment.method`)."""

    return_lambda: float = Field(
        0.0,
        ge=0,
        le=1,
        description="nabla-db-lambda: λ of the return; 0 bootstraps after one step, 1 is the lean "
        "adjoint. Above 0 and without method.window every update sweeps whole trajectories",
    )
    window: int = Field(
        0,
        ge=0,
        description="nabla-db-lambda: learn from a window of this many consecutive transitions of "
        "each trajectory, with the λ-return inside it; 0: from transitions chosen by "
        "model.timestep_fraction",
    )
    flow_hint: bool = Field(
        True,
        description="nabla-db-lambda: the flow network also sees x̂, which the guess has computed",
    )
    step_weight: Literal["auto", "one", "std"] = Field(
        "auto",
        description="w_k of the matching loss: one, or std (σ_k); auto: one for nabla-db, std for "
        "the other matching methods",
    )
    guess_model: Literal["auto", "finetuned", "pretrained"] = Field(
        "auto",
        description="whose x̂ the reward guess uses; auto: finetuned for nabla-db, pretrained for "
        "nabla-db-lambda",
    )
    draft_steps: int = Field(
        10, ge=1, description="draft-k: K, the last steps that the reward's gradient passes"
    )
    draft_lv_samples: int = Field(
        2, ge=1, description="draft-lv: noisy copies of each sample at the last step"
    )
    refl_share: float = Field(
        0.25, gt=0, le=1, description="refl: the last share of the steps to draw the one step from"
    )
    clip_range: float = Field(1e-4, gt=0, description="ddpo: clip of the probability ratio")
    advantage_clip: float = Field(5.0, gt=0, description="ddpo: clip of the advantages")
    prompt_buffer: int = Field(
        32, ge=2, description="ddpo: rewards remembered per prompt for its mean and deviation"
    )
    prompt_min_count: int = Field(
        16, ge=2, description="ddpo: below this many rewards, the whole epoch's statistics are used"
    )


class RewardSettings(Group):
    """Where rewards find their weights, and how several become one."""

    weights: str = Field(
        "",
        description="folder with the weights of rewards and feature extractors; empty: the hub",
    )
    normalise: tuple[str, ...] = Field(
        (),
        description="NAME=MEAN/STD for each reward to standardise, in its own units, before it is "
        "weighted",
    )
    clamp: tuple[str, ...] = Field(
        (),
        description="NAME=LOW:HIGH, in the reward's own units (one may be left out): beyond them "
        "the reward is constant and pulls no more",
    )
    project_conflicts: bool = Field(
        False, description="several rewards: drop the part of a gradient that opposes another's"
    )
    zeroth_order: int = Field(
        0,
        ge=0,
        description="n: pairs of values from which the gradient of a reward without one is "
        "estimated, roughly; 0: not",
    )
    zeroth_order_radius: float = Field(
        0.05, gt=0, le=1, description="ρ: size of the tried changes, in pixel units of [0, 1]"
    )
    zeroth_order_grid: int = Field(
        8, ge=1, le=512, description="g: the estimate is constant on g x g blocks of pixels"
    )


class Sampling(Group):
    """How trajectories are drawn."""

    num_steps: int = Field(50, ge=2, le=1000, description="N: denoising steps")
    eta: float = Field(1.0, gt=0, le=1, description="DDIM η; 1 is DDPM (exact); ddim only")
    guidance_scale: float = Field(
        5.0, ge=1, description="classifier-free guidance; 1 switches it off (half the cost)"
    )
    batch_size: int = Field(16, ge=1, description="trajectories per sampling batch and process")
    num_batches_per_epoch: int = Field(4, ge=1, description="sampling batches per epoch")
    low_var_subsampling: bool = Field(
        True, description="stratify the choice of transitions over the trajectory"
    )
    scheduler: Scheduler = Field(
        "ddpm", description="ddim (with sampling.eta), ddpm, or dpm-solver (SDE-DPM-Solver++)"
    )


class Pretrained(Group):
    """The model to finetune."""

    model: str = Field(
        "runwayml/stable-diffusion-v1-5",
        min_length=1,
        description="hub name or folder of a Stable-Diffusion-type pipeline, or tiny-animals "
        "(shipped with nablagfn)",
    )
    revision: str = Field("main", description="hub revision")


class Evaluation(Group):
    """The before/after measurement at the end of a run."""

    num_prompts: int = Field(8, ge=0, description="prompts measured before and after; 0: none")
    images_per_prompt: int = Field(
        4, ge=2, description="samples per prompt (at least 2: diversity needs pairs)"
    )
    seed: int = Field(1234, ge=0, description="seed of the evaluation samples")
    batch_size: int = Field(
        0, ge=0, description="samples drawn at once when measuring; 0: sampling.batch_size"
    )
    extractor: Literal["efficientnet-lite0", "clip", "dinov2", "dreamsim", "inception"] = Field(
        "efficientnet-lite0",
        description="network whose features measure diversity, drift and distance to the "
        "pretrained model; all but efficientnet-lite0 (inside the package) need weights",
    )
    held_out_rewards: tuple[str, ...] = Field(
        (),
        description="rewards that are measured and not trained on, separated by commas; they tell "
        "a better picture from an exploited reward",
    )


class GuardSettings(Group):
    """Budgets of the fixed-seed samples; beyond one of them a run is stopped or calmed. All off
    by default. The best checkpoint within the budgets is kept."""

    min_diversity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the pretrained model's diversity that must be kept (0.85: 85 %); "
        "0: no budget",
    )
    max_path_kl: float = Field(
        0.0, ge=0, description="most KL of the sampling paths p_θ‖p_#, in nats; 0: no budget"
    )
    max_held_out_drop: float = Field(
        0.0,
        ge=0,
        description="how far a reward of evaluation.held_out_rewards may fall below its best, in "
        "standard deviations of the pretrained model's; 0: no budget",
    )
    patience: int = Field(
        1, ge=1, description="measurements in a row beyond a budget before the guard acts"
    )
    action: Literal["stop", "lower-beta"] = Field(
        "stop",
        description="what it does: stop, or lower-beta (and stop if three times do not help)",
    )
    beta_factor: float = Field(
        0.5, gt=0, lt=1, description="lower-beta: what β is multiplied by each time"
    )

    @property
    def active(self) -> bool:
        """Whether any budget is set."""
        return bool(self.min_diversity or self.max_path_kl or self.max_held_out_drop)


class Logging(Group):
    """What is written during a run."""

    use_wandb: bool = Field(
        False, description="log to Weights & Biases (key from WANDB_API_KEY or `wandb login`)"
    )
    tensorboard: bool = Field(True, description="log to TensorBoard (RUN/tensorboard)")
    wandb_dir: str = Field("", description="where W&B keeps its files; empty: the run folder")
    proj_name: str = Field("nablagfn", min_length=1, description="W&B project")
    save_freq: int = Field(5, ge=1, description="epochs between checkpoints")
    num_checkpoint_limit: int = Field(5, ge=1, description="checkpoints kept")
    sample_freq: int = Field(5, ge=0, description="epochs between sample grids; 0: none")
    eval_freq: int = Field(
        0,
        ge=0,
        description="epochs between measurements of the fixed-seed samples (reward, diversity, "
        "drift, path KL; the guard looks at them); 0: with each sample grid",
    )
    num_samples: int = Field(
        16,
        ge=1,
        description="pictures in a sample grid and a measurement, spread over prompts (at least "
        "one prompt's)",
    )
    samples_per_prompt: int = Field(
        4, ge=2, description="pictures of each prompt in a sample grid; figures need at least 2"
    )


class Saving(Group):
    """Where runs are kept."""

    output_dir: str = Field("runs", min_length=1, description="folder that holds the run folders")


class Config(Group):
    """All settings of one run. `seed` is set by --seed."""

    seed: int = Field(0, ge=0, description="seed of the run")
    training: Training = Field(default_factory=Training)
    speed: Speed = Field(default_factory=Speed)
    model: Model = Field(default_factory=Model)
    experiment: Experiment = Field(default_factory=Experiment)
    method: MethodSettings = Field(default_factory=MethodSettings)
    reward: RewardSettings = Field(default_factory=RewardSettings)
    sampling: Sampling = Field(default_factory=Sampling)
    pretrained: Pretrained = Field(default_factory=Pretrained)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    guard: GuardSettings = Field(default_factory=GuardSettings)
    logging: Logging = Field(default_factory=Logging)
    saving: Saving = Field(default_factory=Saving)

    def check(self) -> None:
        """Raises ConfigError when settings contradict each other."""
        self.updates_per_epoch()
        if self.sampling.eta != 1 and self.sampling.scheduler != "ddim":
            raise ConfigError(
                f"config.sampling.eta={self.sampling.eta} has a meaning for "
                "config.sampling.scheduler=ddim only"
            )
        if self.guard.max_held_out_drop and not self.evaluation.held_out_rewards:
            raise ConfigError(
                f"config.guard.max_held_out_drop={self.guard.max_held_out_drop:g} needs a reward "
                "to watch: set config.evaluation.held_out_rewards"
            )
        if self.guard.active and not (self.logging.eval_freq or self.logging.sample_freq):
            raise ConfigError(
                "the guard needs measurements: set config.logging.eval_freq (epochs between them)"
            )
        if self.speed.fused_optimizer and self.training.optimizer != "adamw":
            raise ConfigError(
                "config.speed.fused_optimizer=True has a meaning for "
                "config.training.optimizer=adamw only"
            )
        if self.training.shard_base:
            self._check_shards()

    def _check_shards(self) -> None:
        """A pass of a sharded model is made by all processes or hangs: raises ConfigError for what
        leaves passes out by what this process has drawn, and for what was not tried.
        """
        method = self.experiment.method
        sweeps = self.method.return_lambda > 0 and not self.method.window
        key = "config.training.shard_base=True"
        if method in UNEVEN:
            even = [name for name in get_args(get_args(Method)[0]) if name not in UNEVEN]
            raise ConfigError(
                f"{key} does not go with config.experiment.method={method}: its processes make "
                f"different numbers of passes; take one of {', '.join(even)}"
            )
        if method == "nabla-db-lambda" and sweeps:
            raise ConfigError(
                f"{key} does not go with config.method.return_lambda={self.method.return_lambda:g} "
                "over whole trajectories, whose processes make different numbers of passes: set "
                "config.method.window, or config.method.return_lambda=0"
            )
        for name in ("compile", "cuda_graphs", "channels_last"):
            if getattr(self.speed, name):
                raise ConfigError(f"{key} was not tried with config.speed.{name}: leave one out")

    def updates_per_epoch(self) -> int:
        """Optimizer updates per inner epoch. Raises ConfigError when the batches do not divide."""
        drawn = self.sampling.batch_size * self.sampling.num_batches_per_epoch
        used = self.training.batch_size * self.training.gradient_accumulation_steps
        if drawn % used:
            raise ConfigError(
                f"training.batch_size x training.gradient_accumulation_steps = {used} must divide "
                f"sampling.batch_size x sampling.num_batches_per_epoch = {drawn}"
            )
        return drawn // used


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """{'training.lr': 0.001, ...}: every option by its dotted name."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def describe() -> dict[str, tuple[str, Any]]:
    """Help text and default of every option by its dotted name."""
    rows: dict[str, tuple[str, Any]] = {}

    def walk(group: BaseModel, prefix: str) -> None:
        for name, info in type(group).model_fields.items():
            value = getattr(group, name)
            if isinstance(value, BaseModel):
                walk(value, f"{prefix}{name}.")
            else:
                rows[prefix + name] = (info.description or "", value)

    walk(Config(), "")
    return rows


REMOVED = {
    "logging.wandb_key": "keys are never kept in a config: set WANDB_API_KEY or run `wandb login`",
    "logging.save_json": "metrics are always written to RUN/metrics.jsonl",
}

ELSEWHERE = {"training.learning_rate": "training.lr"}  # names of other programs, unlike ours


def find_file(name: str) -> Path | None:
    """The file `name` (~ expanded), or None; never raises, however odd the name."""
    expanded = os.path.expanduser(name)
    return Path(expanded) if os.path.isfile(expanded) else None


def set_option(config: Config, key: str, value: Any) -> None:
    """Set one dotted option; strings are parsed by the option's type.

    Raises ConfigError, one line, for an unknown key (naming the nearest) or a bad value.
    """
    known = flatten(config)
    if key in REMOVED:
        raise ConfigError(f"config.{key} does not exist here: {REMOVED[key]}")
    if key not in known:
        near = ELSEWHERE.get(key) or difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown option config.{key}: did you mean config.{near}?")
    *path, name = key.split(".")
    group: Any = config
    for part in path:
        group = getattr(group, part)
    if isinstance(known[key], tuple) and isinstance(value, str):
        value = [part for part in value.strip("()[] ").split(",") if part.strip()]
    try:
        setattr(group, name, value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        help_text = describe()[key][0]
        raise ConfigError(f"config.{key}={value!r}: {reason} ({help_text})") from None


def merge(config: Config, values: dict[str, Any], prefix: str = "") -> Config:
    """Set a nested mapping of options (an original-style config file's content) on `config`."""
    for name, value in values.items():
        if isinstance(value, dict):
            merge(config, value, f"{prefix}{name}.")
        else:
            set_option(config, f"{prefix}{name}", value)
    return config
