"""What one update of the demo's settings holds in autograd graphs, in MiB, and its CPU seconds.

    python tools/graph_memory.py [training.vae_slice=4 …]

Bytes are counted, not sampled: the same on every machine (tests/live_graph.py). Two updates: one
counted, one timed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from nablagfn import PromptSet, Trainer, load_config
from nablagfn.commands.assemble import build_policy
from nablagfn.config import set_option
from nablagfn.core.types import Selection
from nablagfn.rewards import resolve

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.live_graph import LiveGraph

CPU = torch.device("cpu")


def build(options: list[str], out: str) -> Trainer:
    """The demo's trainer with options set."""
    config = load_config("demo")
    config.saving.output_dir = out
    for option in options:
        set_option(config, *option.split("=", 1))
    reward = resolve(config.experiment.reward_fn, CPU)
    prompts = PromptSet(("a cat", "a dog", "a fox"))
    return Trainer(build_policy(config, CPU), reward, prompts, config, show_progress=False)


def first_update(trainer: Trainer) -> Selection:
    """The data of the run's first update."""
    drawn = trainer.collector.collect(0)
    scores = trainer._scores(drawn)
    drawn = replace(drawn, reward=getattr(scores, "total", scores))
    trainer._observe(drawn)
    return next(iter(trainer.collector.batches(drawn, 0, 0, trainer.objective)))


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        trainer = build(options, out)
        chosen = first_update(trainer)
        with LiveGraph() as graph:
            trainer.update(chosen)
        started = time.process_time()
        trainer.update(chosen)
        seconds = time.process_time() - started
    names = " ".join(options) or "as it is"
    print(f"{names}: {graph.peak / 2**20:.0f} MiB, {seconds:.1f} s, {len(chosen.step)} transitions")


if __name__ == "__main__":
    main(sys.argv[1:])
