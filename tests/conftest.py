"""Shared fixtures: a world with a known answer, and a pipeline of random weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import hypothesis
import pytest
import torch

from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from tests.tiny_pipeline import make_pipeline, save_pipeline
from tests.worlds import MixtureWorld, randomise

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Only `pytest -m gpu` sees a GPU: all other tests are of the CPU, wherever they run."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# no deadline: a busy machine is not a failure. derandomize: the same examples every time.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved StableDiffusionPipeline with random weights."""
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")


@pytest.fixture
def policy64() -> StableDiffusionPolicy:
    """The tiny policy in float64, guidance 3, its LoRA away from the start."""
    pipeline = make_pipeline().to(torch.float64)
    policy = StableDiffusionPolicy(pipeline, guidance_scale=3.0, lora_rank=2, seed=0)
    randomise(policy.parameters(), 0.1)
    return policy


@pytest.fixture
def world() -> MixtureWorld:
    """The plane, its adapter away from the start."""
    world = MixtureWorld()
    randomise(world.parameters(), 0.1)
    return world


@pytest.fixture
def exact_world() -> MixtureWorld:
    """The plane with the adapter at zero: the exact mixture."""
    return MixtureWorld()


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than a small run does."""
    monkeypatch.setattr("nablagfn.report.build", lambda folder: None)
