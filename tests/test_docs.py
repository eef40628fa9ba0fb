"""The documents say what the code does: metrics explained, options.md fresh, links whole."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from nablagfn import Config, PromptSet, StableDiffusionPolicy, Trainer, resolve_reward
from nablagfn.config import set_option
from nablagfn.methods.build import build_kernel
from nablagfn.methods.registry import METHODS, target_of
from nablagfn.rewards import NamedReward
from nablagfn.runs.runfolder import RunFolder
from nablagfn.worlds import load
from nablagfn.worlds.policy import WorldPolicy, WorldReward
from nablagfn.worlds.view import WorldView

from .tiny_pipeline import make_pipeline

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NEED_A_CLASSIFIER = {"probe_recognised"}
BASE = 2_000  # samples behind a world's target: names matter here, figures do not
SAMPLES = 100  # the fewest of a prompt that a world measures


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


@dataclass(frozen=True)
class Case:
    """A run in a world: a method and options that change which keys it logs."""

    method: str
    world: str = "ring"
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.method, self.world, *(f"{k}={v}" for k, v in self.options)])


CASES = [
    *(Case(name, "ring-flow" if method.ode else "ring") for name, method in METHODS.items()),
    Case("nabla-db", options=(("model.no_flow", True),)),
    Case("nabla-db-lambda", options=(("method.window", 2), ("method.return_lambda", 0.5))),
    Case("nabla-db-lambda", options=(("method.return_lambda", 1.0),)),
    Case("nabla-db-lambda", world="gaussian"),
]


@cache
def view_of(world: str, method: str, num_steps: int) -> WorldView:
    """One for all runs, which share its target and its floors."""
    config = Config()
    config.experiment.method = method
    config.sampling.num_steps = num_steps
    policy = WorldPolicy(load(world))
    return WorldView(policy.world, build_kernel(config, policy), count=BASE)


def run_in_world(case: Case, output: Path) -> RunFolder:
    """Two updates of a method in a world, a probe at the end, and both measurements."""
    world = load(case.world)
    config = small_config(output, no_flow=False)
    config.experiment.reward_fn = config.pretrained.model = world.name
    config.evaluation.images_per_prompt = config.logging.samples_per_prompt = SAMPLES
    config.evaluation.batch_size = SAMPLES
    config.logging.sample_freq = 2
    for key, value in (("experiment.method", case.method), *case.options):
        set_option(config, key, value)
    trainer = Trainer(
        WorldPolicy(world),
        NamedReward(world.name, WorldReward(world)),
        PromptSet(world.prompts),
        config,
        view=view_of(case.world, case.method, config.sampling.num_steps),
        show_progress=False,
    )
    assert trainer.fit().updates == 2
    return trainer.folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, RunFolder]:
    """Every method, once in a world; without plots, which take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nablagfn.report.build", lambda folder: None)
        patch.setattr(WorldView, "save", lambda *arguments: None)
        return {case: run_in_world(case, tmp_path_factory.mktemp("worlds")) for case in CASES}


def logged(folder: RunFolder) -> set[str]:
    rows = folder.metrics()
    assert [row["update"] for row in rows] == [1, 2]
    return set().union(*rows)


def evaluated(folder: RunFolder) -> set[str]:
    """The keys of evaluation.json; figures in `others` have the names of probes."""
    evaluation = folder.read_json("evaluation.json")
    aimed = target_of(folder.config()).beta is not None
    against = {"against_target"} if aimed else set()
    assert set(evaluation) == {"before", "after", "updates"} | against
    assert set(evaluation["before"]["others"]) == set(evaluation["after"]["others"])
    keys = set(evaluation["after"]) | set(evaluation.get("against_target", {}))
    return keys | {f"probe_{name}" for name in evaluation["after"]["others"]}


@pytest.mark.parametrize("no_flow", [False, True])
def test_every_key_of_a_picture_run_is_documented(
    runs: dict[bool, RunFolder], no_flow: bool
) -> None:
    assert logged(runs[no_flow]) | evaluated(runs[no_flow]) <= documented()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_key_of_every_method_is_documented(worlds: dict[Case, RunFolder], case: Case) -> None:
    found = logged(worlds[case]) | evaluated(worlds[case])
    assert "probe_mmd2" in found
    assert sorted(found - documented()) == []


def test_every_documented_key_is_logged(
    runs: dict[bool, RunFolder], worlds: dict[Case, RunFolder]
) -> None:
    folders = [*runs.values(), *worlds.values()]
    known = set().union(*(logged(folder) | evaluated(folder) for folder in folders))
    assert sorted(documented() - known - NEED_A_CLASSIFIER) == []


def test_the_zeros_that_metrics_md_promises_at_the_first_update(
    runs: dict[bool, RunFolder],
) -> None:
    first = runs[False].metrics()[0]
    assert first["residual_score_sq"] == first["flow_sq"] == first["loss_terminal"] == 0
    assert first["loss_forward"] == pytest.approx(first["guess_sq"])
    assert first["guess_sq"] > 0


def test_the_zeros_that_metrics_md_promises_of_other_methods(
    worlds: dict[Case, RunFolder],
) -> None:
    first = {str(case): folder.metrics()[0] for case, folder in worlds.items()}
    ours, ddpo, dag = (first[f"{name}-ring"] for name in ("nabla-db-lambda", "ddpo", "dag-db"))
    assert ours["residual_score_sq"] == ours["flow_sq"] == ddpo["ratio_clipped"] == 0
    assert dag["log_ratio"] == 0
    assert ours["value_gradient_sq"] > 0 and ours["loss_bellman"] > 0


def test_the_cost_of_windows_is_that_of_the_documents(worlds: dict[Case, RunFolder]) -> None:
    """docs/methods.md: 5n + 1 evaluations and n + 1 decodes per path, 2 evaluations less at x_N."""
    (folder,) = (run for case, run in worlds.items() if ("method.window", 2) in case.options)
    paths, drawing, n = 2, 3, 2
    for row in folder.metrics():
        saved = paths * (drawing + 5 * n + 1) - row["model_evals"]
        assert saved in {0, 2, 4}
        assert row["decode_evals"] == paths * (n + 1)


def test_every_file_of_a_run_is_documented(
    runs: dict[bool, RunFolder], worlds: dict[Case, RunFolder]
) -> None:
    text = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
    for folder in (runs[False], worlds[CASES[0]]):
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
