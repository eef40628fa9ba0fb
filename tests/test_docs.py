"""The documents say what the code does: metrics explained, options.md fresh, links whole."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from nablagfn import Config, PromptSet, StableDiffusionPolicy, Trainer, resolve_reward
from nablagfn.runfolder import RunFolder

from .tiny_pipeline import make_pipeline

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NEED_A_CLASSIFIER = {"probe_recognised"}


def documented() -> set[str]:
    """The keys that head a table row of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE))


def small_config(output: Path, no_flow: bool) -> Config:
    """Two epochs of one update, a probe after each, and both measurements."""
    config = Config()
    config.sampling.num_steps = 3
    config.sampling.batch_size = 2
    config.sampling.num_batches_per_epoch = 1
    config.training.batch_size = 2
    config.training.gradient_accumulation_steps = 1
    config.training.num_epochs = 2
    config.model.flow_channel_width = (8, 16)
    config.model.no_flow = no_flow
    config.experiment.reward_fn = "brightness"
    config.evaluation.num_prompts = 1
    config.evaluation.images_per_prompt = 2
    config.logging.sample_freq = 1
    config.logging.num_samples = 4
    config.logging.tensorboard = False
    config.saving.output_dir = str(output)
    return config


def run(output: Path, no_flow: bool) -> RunFolder:
    """A finished 2-update run on the random pipeline."""
    config = small_config(output, no_flow)
    trainer = Trainer(
        StableDiffusionPolicy(make_pipeline(), seed=config.seed),
        resolve_reward(config.experiment.reward_fn, torch.device("cpu")),
        PromptSet(("cat", "dog")),
        config,
        show_progress=False,
    )
    assert trainer.fit().updates == 2
    return trainer.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, RunFolder]:
    """One run with the flow network (False) and one with no_flow (True)."""
    return {no_flow: run(tmp_path_factory.mktemp("runs"), no_flow) for no_flow in (False, True)}


def logged(folder: RunFolder) -> set[str]:
    rows = folder.metrics()
    assert [row["update"] for row in rows] == [1, 2]
    return set().union(*rows)


@pytest.mark.parametrize("no_flow", [False, True])
def test_every_logged_key_is_documented(runs: dict[bool, RunFolder], no_flow: bool) -> None:
    assert logged(runs[no_flow]) <= documented()


def test_every_evaluated_key_is_documented(runs: dict[bool, RunFolder]) -> None:
    evaluation = runs[False].read_json("evaluation.json")
    assert set(evaluation) == {"before", "after", "updates"}
    assert set(evaluation["after"]) <= documented()


def test_every_documented_key_is_logged(runs: dict[bool, RunFolder]) -> None:
    known = logged(runs[False]) | set(runs[False].read_json("evaluation.json")["after"])
    assert documented() - NEED_A_CLASSIFIER == known


def test_the_zeros_that_metrics_md_promises_at_the_first_update(
    runs: dict[bool, RunFolder],
) -> None:
    first = runs[False].metrics()[0]
    assert first["residual_score_sq"] == first["flow_sq"] == first["loss_terminal"] == 0
    assert first["loss_forward"] == pytest.approx(first["guess_sq"])
    assert first["guess_sq"] > 0


def test_every_file_of_a_run_is_documented(runs: dict[bool, RunFolder]) -> None:
    text = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    folder = runs[False]
    newest = sorted(folder.checkpoints.iterdir())[-1]
    names = {p.name for p in (*folder.path.iterdir(), *newest.iterdir())}
    assert [name for name in sorted(names) if name not in text] == []


def test_options_page_is_up_to_date() -> None:
    path = ROOT / "tools" / "make_options_doc.py"
    spec = importlib.util.spec_from_file_location("make_options_doc", path)
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = ROOT / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == generator.render(), "stale: run `make docs`"


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    if not page.is_file():
        pytest.skip(f"no {page.name} yet")
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []
