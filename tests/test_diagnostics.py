"""What is logged by noise level, against averages taken by hand."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from nablagfn.core import rng
from nablagfn.core.rollout import fingerprints
from nablagfn.training.diagnostics import StepDiagnostics, bin_edges, signal_to_noise


def test_bins_share_the_steps() -> None:
    assert bin_edges(50) == [(0, 9), (10, 19), (20, 29), (30, 39), (40, 49)]
    assert bin_edges(3) == [(0, 0), (1, 1), (2, 2)]
    assert [b - a + 1 for a, b in bin_edges(12)] == [3, 3, 2, 2, 2]


def test_averages_are_those_of_each_level_whatever_the_micro_batch() -> None:
    g = rng.generator(0, "t")
    step = torch.tensor([0, 9, 2, 3, 9, 1, 8, 9])
    value, vector = torch.randn(8, generator=g), torch.randn(8, 2, 3, generator=g)
    rows = []
    for size in (8, 3, 1):
        collected = StepDiagnostics(10, torch.device("cpu"))
        for part in torch.arange(8).split(size):
            collected.add(step[part], {"loss": value[part]}, {"v": vector[part]})
        rows.append(collected.row(Accelerator(cpu=True)))
    assert rows[0]["steps"] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert rows[0]["count"] == [2, 2, 0, 0, 4]
    expected = [float(value[[0, 5]].mean()), float(value[[2, 3]].mean())]
    for row in rows:
        assert row["loss"][2:4] == [None, None]
        torch.testing.assert_close(torch.tensor(row["loss"][:2]), torch.tensor(expected))
        torch.testing.assert_close(row["v_snr"][4], rows[0]["v_snr"][4])


def test_signal_to_noise_of_known_vectors() -> None:
    """g = μ + noise of variance 1 in each of D dimensions: ‖μ‖²/D; without a signal, about 0."""
    g = torch.randn(40_000, 4, generator=rng.generator(1, "t"), dtype=torch.float64)
    signal = g + torch.tensor([3.0, 0.0, 0.0, 4.0])

    def ratio(vectors: torch.Tensor) -> float:
        count = torch.tensor([float(len(vectors))])
        total, square = vectors.sum(0)[None], vectors.square().sum()[None]
        return float(signal_to_noise(count, total, square))

    assert abs(ratio(signal) - 25 / 4) < 0.1
    assert abs(ratio(g)) < 1e-3
    assert ratio(signal[:1]) != ratio(signal[:1])  # NaN: one vector has no spread


def test_fingerprints_tell_samples_apart() -> None:
    x = torch.randn(3, 4, generator=rng.generator(2, "t"))
    first, second, third = fingerprints(torch.stack([x[0], x[1], x[0]]))
    assert first == third != second
