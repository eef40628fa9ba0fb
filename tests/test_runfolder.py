"""Files of a run: whole or not at all, readable after a crash, checkpoints kept and skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nablagfn.config import Config, ConfigError, GuardSettings
from nablagfn.runs import runfolder
from nablagfn.runs.runfolder import (
    RunFolder,
    check_same_settings,
    complete_checkpoints,
    fresh_folder,
    run_folder,
)
from nablagfn.training.checkpoint import CheckpointIO, Position, load_policy
from nablagfn.training.guard import Guard, Probe
from tests.worlds import MixtureWorld, randomise

# -------------------------------------------------------------------------------- atomic writes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.json"
    runfolder.write_atomic(file, "a long first version\n")
    runfolder.write_atomic(file, "é\n")
    assert file.read_text(encoding="utf-8") == "é\n"
    assert names(file.parent) == ["a.json"]


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    runfolder.write_atomic(file, "old")
    with pytest.raises(UnicodeEncodeError):
        runfolder.write_atomic(file, "x" * 100_000 + "\ud800")
    assert file.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_crash_before_the_replacement_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    folder = RunFolder(tmp_path)
    folder.write_json("config.json", {"a": 1})
    monkeypatch.setattr(runfolder.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        folder.write_json("config.json", {"a": 2})
    assert folder.read_json("config.json") == {"a": 1}
    assert names(tmp_path) == ["config.json"]


def test_a_value_that_json_does_not_know_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunFolder(tmp_path).write_json("a.json", {"a": object()})
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------- metrics


def folder_with_metrics(path: Path, updates: int, cut: str = "") -> RunFolder:
    folder = RunFolder(path)
    for update in range(1, updates + 1):
        folder.append("metrics.jsonl", {"update": update, "loss": 0.5 * update})
    if cut:
        with (folder.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(cut)
    return folder


def updates_of(folder: RunFolder) -> list[int]:
    return [row["update"] for row in folder.metrics()]


def test_metrics_come_back_in_order(tmp_path: Path) -> None:
    folder = folder_with_metrics(tmp_path, 3)
    assert folder.metrics()[1] == {"update": 2, "loss": 1.0}
    assert updates_of(folder) == [1, 2, 3]
    assert RunFolder(tmp_path / "none").metrics() == []


CUTS = ['{"update": 4, "lo', '{"update"', "{", '{"update": 4', "\0\0\0"]


@pytest.mark.parametrize("cut", CUTS)
def test_a_last_line_cut_by_a_crash_is_left_out(tmp_path: Path, cut: str) -> None:
    assert updates_of(folder_with_metrics(tmp_path, 3, cut)) == [1, 2, 3]


@pytest.mark.parametrize("cut", ["", *CUTS])
@pytest.mark.parametrize(("updates", "kept"), [(2, [1, 2]), (0, []), (9, [1, 2, 3])])
def test_truncation_keeps_whole_rows_up_to_the_checkpoint(
    tmp_path: Path, cut: str, updates: int, kept: list[int]
) -> None:
    folder = folder_with_metrics(tmp_path, 3, cut)
    folder.truncate(updates)
    assert updates_of(folder) == kept
    folder.append("metrics.jsonl", {"update": updates + 1})
    assert updates_of(folder) == [*kept, updates + 1]
    assert all(
        json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()
    )


def test_truncating_a_new_run_makes_an_empty_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.truncate(0)
    assert folder.metrics() == []


# -------------------------------------------------------------------------------- which folder


def test_config_round_trip(tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path), Config(seed=7)
    config.model.flow_channel_width = (8, 16)
    config.experiment.reward_fn = "brightness"
    folder.write_json("config.json", config.model_dump(mode="json"))
    assert folder.exists and folder.config() == config


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path).exists
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder(tmp_path).config()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no": {"such": 1}}', '{"training": {"lr": -1}}'])
def test_a_damaged_config_gives_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        RunFolder(tmp_path).config()
    assert len(str(caught.value).splitlines()) == 1


def test_run_folders_are_named_by_reward_experiment_and_seed(tmp_path: Path) -> None:
    config = Config(seed=3)
    config.saving.output_dir = str(tmp_path)
    config.experiment.reward_fn = "my.pack/age:fun"
    folder = run_folder(config, "big run")
    assert folder.path == tmp_path / "my.pack-age.fun_big-run_seed3"
    assert run_folder(config, "").path.name == "my.pack-age.fun_seed3"


def test_experiments_cannot_leave_the_output_folder(tmp_path: Path) -> None:
    config = Config()
    config.saving.output_dir = str(tmp_path)
    for name in ("../../elsewhere", "/etc", "a\nb", ".."):
        assert run_folder(config, name).path.parent == tmp_path


def test_fresh_folder_takes_the_first_free_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert fresh_folder(folder) == folder
    for expected in ("run-2", "run-3"):
        fresh_folder(folder).write_json("config.json", {})
        assert fresh_folder(folder).path == tmp_path / expected


CHANGES: dict[str, tuple[Callable[[Config], None], str]] = {
    "seed": (lambda c: setattr(c, "seed", 1), "seed (0 -> 1)"),
    "lr": (lambda c: setattr(c.training, "lr", 0.5), "training.lr (0.001 -> 0.5)"),
    "scale": (lambda c: setattr(c.model, "reward_scale", 7), "model.reward_scale (1000.0 -> 7.0)"),
    "eval": (lambda c: setattr(c.evaluation, "seed", 2), "evaluation.seed (1234 -> 2)"),
    "epochs": (lambda c: setattr(c.training, "num_epochs", 7), ""),
    "micro": (lambda c: setattr(c.training, "micro_batch", 7), ""),
    "saving": (lambda c: setattr(c.saving, "output_dir", "x"), ""),
    "logging": (lambda c: setattr(c.logging, "save_freq", 7), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_continuing_with_other_settings_names_them(change: str, tmp_path: Path) -> None:
    apply, named = CHANGES[change]
    new = Config()
    apply(new)
    assert new != Config()
    if not named:
        check_same_settings(Config(), new, tmp_path)
        return
    with pytest.raises(ConfigError) as caught:
        check_same_settings(Config(), new, tmp_path)
    message = str(caught.value)
    assert named in message and str(tmp_path) in message and message.count("->") == 1
    assert len(message.splitlines()) == 1 and "--resume=never" in message


def test_a_schedule_that_ends_with_the_run_fixes_its_length(tmp_path: Path) -> None:
    old, new = Config(), Config()
    old.training.lr_schedule = new.training.lr_schedule = "cosine"
    check_same_settings(old, new, tmp_path)
    new.training.num_epochs = 7
    with pytest.raises(ConfigError, match=r"training\.num_epochs"):
        check_same_settings(old, new, tmp_path)


# -------------------------------------------------------------------------------- checkpoints


def make_checkpoints(folder: Path, limit: int = 5, seed: int = 0) -> CheckpointIO:
    policy = MixtureWorld()
    flow = policy.make_flow((8, 8), 1, seed=0)
    randomise([*policy.parameters(), *flow.parameters()], 0.3, seed)
    optimizer = torch.optim.AdamW([*policy.parameters(), *flow.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    guard = Guard(GuardSettings(min_diversity=0.5))
    modules = nn.ModuleDict({"flow": flow})
    return CheckpointIO(folder, policy, modules, optimizer, scaler, guard, limit)


def step(parts: CheckpointIO) -> None:
    parts.optimizer.zero_grad()
    parameters = [*parts.policy.parameters(), *parts.modules.parameters()]
    sum((p - 1).square().sum() for p in parameters).backward()
    parts.optimizer.step()


def weights(parts: CheckpointIO) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*parts.policy.parameters(), *parts.modules.parameters())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_run_without_checkpoints_starts_at_zero(tmp_path: Path) -> None:
    parts = make_checkpoints(tmp_path / "none")
    before = weights(parts)
    assert parts.load_latest() == Position(0, 0, 0.0)
    assert same(before, weights(parts))


def test_a_checkpoint_restores_weights_moments_and_position(tmp_path: Path) -> None:
    """Six straight steps equal three, a restart from another start, and three."""
    straight = make_checkpoints(tmp_path)
    for _ in range(3):
        step(straight)
    straight.save(Position(1, 3, 4.5))
    restarted = make_checkpoints(tmp_path, seed=9)
    assert restarted.load_latest() == Position(1, 3, 4.5)
    for _ in range(3):
        step(straight)
        step(restarted)
    assert same(weights(straight), weights(restarted))


def test_a_checkpoint_restores_the_loss_scale_where_there_is_one(tmp_path: Path) -> None:
    """And one that was written without, on a CPU, is taken up with the scale as it is."""
    scaled, plain = make_checkpoints(tmp_path / "scaled"), make_checkpoints(tmp_path / "plain")
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled.save(Position(1, 1, 0.0))
    plain.save(Position(1, 1, 0.0))
    for parts, scale in ((scaled, 8.0), (plain, 32.0)):
        parts.scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
        assert parts.load_latest().update == 1
        assert parts.scaler.get_scale() == scale
    snapshot = scaled.snapshot(Position(1, 1, 0.0))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    scaled.restore(snapshot)
    assert scaled.scaler.get_scale() == 8.0


def test_the_newest_checkpoint_is_loaded_and_the_oldest_are_removed(tmp_path: Path) -> None:
    parts, kept = make_checkpoints(tmp_path, limit=2), {}
    for update in (2, 9, 10, 100):
        step(parts)
        parts.save(Position(0, update, 0.0))
        kept[update] = weights(parts)
    assert names(tmp_path) == ["update_000010", "update_000100"]
    other = make_checkpoints(tmp_path, seed=5)
    assert other.load_latest().update == 100 and same(weights(other), kept[100])
    load_policy(other.policy, tmp_path / "update_000010")
    count = len(other.policy.parameters())
    assert same(weights(other)[:count], kept[10][:count])
    assert same(weights(other)[count:], kept[100][count:])


def test_the_best_checkpoint_outlives_newer_ones_and_its_fame_the_restart(tmp_path: Path) -> None:
    parts = make_checkpoints(tmp_path, limit=2)
    for update, reward in ((1, 0.0), (2, 5.0), (3, 1.0), (4, 2.0), (5, 3.0)):
        parts.guard.judge(update, Probe(reward, 1.0, 0.0, 1.0))
        parts.save(Position(0, update, 0.0))
    assert names(tmp_path) == ["update_000002", "update_000004", "update_000005"]
    other = make_checkpoints(tmp_path)
    other.load_latest()
    assert other.guard.best_checkpoint == "update_000002"


def test_saving_the_same_update_again_replaces_it(tmp_path: Path) -> None:
    parts = make_checkpoints(tmp_path)
    parts.save(Position(0, 1, 0.0))
    step(parts)
    parts.save(Position(0, 1, 2.0))
    other = make_checkpoints(tmp_path, seed=5)
    assert other.load_latest().seconds == 2.0 and same(weights(other), weights(parts))
    assert names(tmp_path) == ["update_000001"]


def test_partial_checkpoints_are_ignored_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    parts = make_checkpoints(tmp_path)
    parts.save(Position(0, 1, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr("nablagfn.training.checkpoint.os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            parts.save(Position(0, 2, 0.0))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["update_000001"]
    assert parts.load_latest().update == 1
    parts.save(Position(0, 2, 0.0))
    assert names(tmp_path) == ["update_000001", "update_000002"]


@pytest.mark.parametrize("stray", ["update_000003.bak", "update_last", "update_000009~"])
def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path, stray: str) -> None:
    parts = make_checkpoints(tmp_path)
    parts.save(Position(0, 1, 0.0))
    (tmp_path / stray).mkdir()
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["update_000001"]
    assert parts.load_latest().update == 1
