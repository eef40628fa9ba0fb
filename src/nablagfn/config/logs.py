"""What is written during a run, and where runs are kept."""

from __future__ import annotations

from pydantic import Field

from .base import Group


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
