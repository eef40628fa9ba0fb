"""Train the network of worlds/learned-grid by denoising; writes its safetensors file.

python tools/train_learned_world.py --out out/learned_grid.safetensors      # 20 seconds on one core

The same machine and torch write the same file; others differ by rounding that training amplifies.
So the packaged file is kept as it is, and tests/test_learned_world.py knows its SHA-256.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from nablagfn.core import rng
from nablagfn.core.schedules import Levels
from nablagfn.worlds.features import OCTAVES
from nablagfn.worlds.learned import Dense, LearnedScore, uneven_grid
from nablagfn.worlds.mixture import Mixture
from nablagfn.worlds.world import COSINE

HIDDEN, DEPTH = 64, 3
BATCH = 1024
LEARNING_RATE = 3e-3  # falls to zero along a cosine
SEED = 0


def untrained(mixture: Mixture) -> LearnedScore:
    """A network of normal weights of variance 1/inputs; its last layer is zero, and so is v."""
    generator = rng.generator(SEED, "learned world", 0)
    widths = [mixture.dim + 2 * OCTAVES, *[HIDDEN] * DEPTH, mixture.dim]
    layers = []
    for k, inputs in enumerate(widths[:-1]):
        scale = 0.0 if k == DEPTH else 1 / math.sqrt(inputs)
        weight = scale * torch.randn(widths[k + 1], inputs, generator=generator)
        layers.append(Dense(weight, torch.zeros(widths[k + 1])))
    for layer in layers:
        layer.weight.requires_grad_()
        layer.bias.requires_grad_()
    return LearnedScore(mixture, tuple(layers))


def denoising_loss(score: LearnedScore, generator: torch.Generator) -> Tensor:
    """Mean of ‖v_θ(x) − (α·noise − σ·x_clean)‖² over a batch at random noise angles.

    A whole number is drawn for each sample's time, as the sampler's times are.
    """
    x_clean = score.trained_on.sample(BATCH, generator).float()
    noise = torch.randn(x_clean.shape, generator=generator)
    wide = COSINE.levels(torch.randint(COSINE.last + 1, (BATCH,), generator=generator))
    levels = Levels(wide.alpha.float()[:, None], wide.sigma.float()[:, None])
    x = levels.alpha * x_clean + levels.sigma * noise
    velocity = levels.alpha * noise - levels.sigma * x_clean
    return (score.velocity(x, levels) - velocity).square().sum(1).mean()


def train(steps: int) -> LearnedScore:
    """A network after so many steps of Adam; prints the loss, a mean since the last line."""
    score = untrained(uneven_grid())
    weights = [t for layer in score.layers for t in (layer.weight, layer.bias)]
    optimizer = torch.optim.Adam(weights, LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, total, every = rng.generator(SEED, "learned world", 1), 0.0, max(1, steps // 10)
    for step in range(1, steps + 1):
        loss = denoising_loss(score, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        total += float(loss.detach())
        if step % every == 0:
            print(f"{step:6d} steps: loss {total / every:.4f}", flush=True)
            total = 0.0
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file")
    parser.add_argument("--steps", type=int, default=2500, help="more make it more exact")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    score = train(args.steps)
    score.check()
    score.save(args.out)


if __name__ == "__main__":
    main()
