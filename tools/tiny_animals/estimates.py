"""The U-Net's own estimates of the composites' latents: training data to polish the decoder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import data
import numpy as np
import torch
from common import device_for
from torch import Tensor
from train_unet import Policy, Tokens, build_scheduler, build_tokenizer, latents


@torch.no_grad()
def estimate(policy: Policy, z: Tensor, ids: Tensor, alphas: Tensor, start: int) -> Tensor:
    """Noise latents to time ``start``, then denoise them in three DDIM steps; [B, 16, 8, 8]."""
    times = [start, int(0.55 * start), int(0.2 * start)]
    x = alphas[start].sqrt() * z + (1 - alphas[start]).sqrt() * torch.randn_like(z)
    for now, after in zip(times, [*times[1:], None], strict=True):
        signal, noise = alphas[now].sqrt(), (1 - alphas[now]).sqrt()
        v = policy(x, torch.full((len(x),), now, device=x.device), ids)
        x0, e = signal * x - noise * v, noise * x + signal * v
        x = x0 if after is None else alphas[after].sqrt() * x0 + (1 - alphas[after]).sqrt() * e
    return x


def main() -> None:
    """Write estimates.npy [N, 16, 8, 8], row by row as in latents.npy."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--batch", type=int, default=96)
    args = p.parse_args()
    device, rng = device_for(args.threads), np.random.default_rng(0)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokens, policy = Tokens(tokenizer), Policy(tokenizer).to(device)
    state = torch.load(args.work / "policy.pt", map_location=device, weights_only=True)
    policy.load_state_dict(state)
    alphas = build_scheduler().alphas_cumprod.to(device)
    table, z = data.load(args.work / "data" / "modes"), latents(args.work, device)
    labels, out = table.labels(), np.empty_like(z)
    for i in range(0, len(z), args.batch):
        rows = slice(i, i + args.batch)
        texts = [data.random_caption(*row, rng, p_empty=0.0) for row in labels[rows].tolist()]
        batch = torch.from_numpy(z[rows]).to(device)
        start = int(rng.integers(300, 700))
        out[rows] = estimate(policy, batch, tokens(texts).to(device), alphas, start).cpu().numpy()
    partial = args.work / "estimates.partial.npy"
    np.save(partial, out)
    os.replace(partial, args.work / "estimates.npy")
    print(f"error of the estimates: {np.mean((out - z) ** 2):.4f}")


if __name__ == "__main__":
    main()
