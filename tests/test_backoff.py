"""Memory runs out within an update: the same update with smaller parts, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nablagfn.core.types import Condition
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.prompts import PromptSet
from nablagfn.rewards import resolve
from nablagfn.training.trainer import Trainer, TrainingError
from tests.test_trainer import small_config
from tests.tiny_pipeline import make_pipeline

pytestmark = pytest.mark.usefixtures("no_report")


class Small(StableDiffusionPolicy):
    """A policy on a device that holds `limit` rows with a graph, and no more."""

    limit = 10**6

    def output(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        if torch.is_grad_enabled() and len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().output(x, time, condition)


def run(out: Path, limit: int, method: str) -> Trainer:
    options = {"experiment.method": method, "training.micro_batch": 6, "model.lora_rank": 2}
    policy = Small(make_pipeline().to(torch.float64), guidance_scale=1.0, lora_rank=2)
    policy.limit = limit
    trainer = Trainer(
        policy,
        resolve("colourfulness", torch.device("cpu")),
        PromptSet(("a cat", "a dog")),
        small_config(out, **{"sampling.guidance_scale": 1.0, **options}),
        show_progress=False,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("method", ["nabla-db", "adjoint-matching"])
def test_a_run_that_backs_off_equals_one_with_enough_memory(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, metrics and weights; adjoint-matching meets the limit in `prepare`, too."""
    plenty, little = (run(tmp_path / str(n), n, method) for n in (100, 1))
    assert plenty.updater.rows == 6 and little.updater.rows == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.rpartition("=")[2] for line in said] == ["3, same results", "1, same results"]
    for a, b in zip(plenty.folder.metrics(), little.folder.metrics(), strict=True):
        same = [key for key in a if key not in ("seconds", "model_evals", "decode_evals")]
        assert [b[key] for key in same] == pytest.approx(
            [a[key] for key in same], rel=1e-4, abs=1e-6
        )
    after = little.policy.state_dict()
    for name, weight in plenty.policy.state_dict().items():
        torch.testing.assert_close(after[name], weight, rtol=1e-3, atol=1e-5)


def test_when_one_row_is_too_many_one_line_names_what_saves_memory(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"out of memory: .*gradient_checkpointing") as found:
        run(tmp_path, 0, "nabla-db")
    assert "\n" not in str(found.value)
