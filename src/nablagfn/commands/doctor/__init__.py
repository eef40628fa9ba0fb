"""`nablagfn doctor`: can this run work on this machine? Every check is one function and one row.

Nothing is written, least of all into a run folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...config import Config, ConfigError
from ...runtime.backoff import SAVE_MEMORY
from . import machine, parts
from .compiled import compiled
from .records import Exam, Finding, Line, Patient

CHECKS = (
    Exam("versions", machine.versions),
    Exam("device", machine.devices),
    Exam("disk", machine.disk),
    Exam("hub", machine.hub),
    Exam("W&B", machine.wandb),
    Exam("batches", parts.batches),
    Exam("prompts", parts.prompts),
    Exam("reward", parts.reward),
    Exam("model", parts.model),
    Exam("steps", parts.steps, needs=("model",)),
    Exam("memory", machine.memory, needs=("model", "reward")),
    Exam("denoiser and adapter", parts.denoiser, needs=("model", "prompts", "batches")),
    Exam("decoder", parts.decoder, needs=("model",)),
    Exam("reward's gradient", parts.gradient, needs=("model", "reward", "prompts")),
    Exam("flow network", parts.flow, needs=("model", "prompts")),
    Exam("compiled step", compiled, needs=("device", "batches", "prompts", "reward", "model")),
)


def examine(
    config: Config, device: torch.device, checks: Sequence[Exam] = CHECKS
) -> Iterator[Line]:
    """Every check in order, as it is done; one that needs what failed is skipped."""
    patient, rows = Patient(config, device), dict[str, Line]()
    for check in checks:
        lacking = [n for n in check.needs if rows[n].finding.status in ("failure", "skipped")]
        finding = Finding("skipped", f"needs: {', '.join(lacking)}")
        rows[check.name] = Line(check.name, finding if lacking else _run(check, patient))
        yield rows[check.name]


def _run(check: Exam, patient: Patient) -> Finding:
    try:
        return check.run(patient)
    except ConfigError as error:  # says what to do
        return Finding("failure", str(error))
    except torch.OutOfMemoryError:
        return Finding("failure", "out of memory", SAVE_MEMORY)
    except Exception as error:  # a row, whatever a model or a user's reward raises
        return Finding("failure", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


__all__ = ["CHECKS", "Exam", "Finding", "Patient", "Line", "examine"]
