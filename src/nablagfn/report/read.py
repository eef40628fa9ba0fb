"""A run's files as records. A missing file leaves its part empty; a damaged one is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from ..config import Config, ConfigError, drawn_with
from ..runs.runfolder import DIAGNOSTICS, GUARD, METRICS, RunFolder

T = TypeVar("T")
TARGET = "target"  # the folder of `nablagfn target RUN`
TARGET_FILE = f"{TARGET}/target.json"
Row = dict[str, Any]


class PartRecord(BaseModel):
    """A piece of a file; keys that the report does not show are allowed."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class MeasuredRecord(PartRecord):
    """Before or after training: `Measurement` of evaluation.json."""

    num_samples: int
    reward_mean: float
    reward_std: float
    diversity: float
    recognised: float | None = None
    path_kl: float | None = None
    transport_cost: float | None = None
    others: dict[str, float] = Field(default_factory=dict)


class FigureRow(PartRecord):
    """A measured value with its interval, where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


class PointRow(PartRecord):
    """The target at one β: its KL from the pretrained model, and its mean reward."""

    beta: float
    kl: FigureRow
    reward: FigureRow


class CertificateRow(PartRecord):
    """A checkpoint against its target: `evaluation.certificate`."""

    beta: float | None = None
    figures: dict[str, FigureRow]
    step_kl: list[float] = Field(default_factory=list)
    why: str = ""
    notes: list[str] = Field(default_factory=list)


class TargetFile(PartRecord):
    """target/target.json: what `nablagfn target` found."""

    frontier: list[PointRow] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    chosen: float | None = None
    images_per_prompt: int = 0
    prompts: list[str] = Field(default_factory=list)


class ModelRow(PartRecord):
    """The pretrained model ("base", update 0) or a checkpoint, as `nablagfn evaluate` saw it."""

    name: str
    update: int
    figures: dict[str, FigureRow]
    prompts: dict[str, dict[str, float | None]] = Field(default_factory=dict)
    certificate: CertificateRow | None = None


class EvaluationSettings(PartRecord):
    """How they were evaluated."""

    prompts: list[str] = Field(default_factory=list)
    images_per_prompt: int | None = None
    seed: int | None = None
    extractor: str = ""
    trained_reward: str = ""
    confidence: float = 0.95


class EvaluatedRecord(PartRecord):
    """What `nablagfn evaluate` found: the base model first."""

    settings: EvaluationSettings = EvaluationSettings()
    models: list[ModelRow]
    frontier: list[PointRow] = Field(default_factory=list)


class SharesRow(PartRecord):
    """Shares of a label: of the pretrained model, of the finetuned one, of the target."""

    before: float
    after: float
    target: float | None = None


class ReachedRow(PartRecord):
    """What the run reached beside its target: `Reached` of evaluation.json."""

    beta: float
    samples: int
    effective_samples: float
    target_reward: float | None = None
    target_kl: float | None = None
    target_diversity: float | None = None
    target_recognised: float | None = None
    gain_reached: float | None = None
    least_kl: float | None = None
    efficiency: float | None = None
    shares: dict[str, SharesRow] = Field(default_factory=dict)


class EvaluationFile(PartRecord):
    """evaluation.json."""

    before: MeasuredRecord | None = None
    after: MeasuredRecord | None = None
    against_target: ReachedRow | None = None
    updates: int = 0
    evaluated: EvaluatedRecord | None = None


class Event(PartRecord):
    """Something the guard did."""

    update: int
    text: str


class Best(PartRecord):
    """The guard's best checkpoint."""

    checkpoint: str
    update: int


class Guarded(PartRecord):
    """guard.json."""

    best: Best | None = None
    events: list[Event] = Field(default_factory=list)


class SampleRow(PartRecord):
    """One picture of evaluation/NAME/."""

    index: int
    prompt: str
    rewards: dict[str, float]


class Sheet(PartRecord):
    """evaluation/NAME/samples.json: what is where in pictures.png. thumbnail: width, height."""

    columns: int = Field(gt=0)
    thumbnail: tuple[int, int] | None = None
    gap: int = 0
    samples: list[SampleRow]


class Versions(RootModel[dict[str, str]]):
    """versions.json."""


class Prompts(RootModel[list[str]]):
    """prompts.json."""


class LogRow(BaseModel):
    """A line of metrics.jsonl."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, float | None]

    update: int


class StepRow(BaseModel):
    """A line of diagnostics.jsonl: first and last step of each noise level, and values of each."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, list[float | None]]

    update: int
    steps: list[list[int]] = Field(min_length=1)


@dataclass(frozen=True)
class Record:
    """Everything that a report needs of a run."""

    folder: RunFolder
    config: Config
    rows: list[Row]
    diagnostics: list[Row]
    evaluation: EvaluationFile
    guard: Guarded
    versions: dict[str, str]
    prompts: tuple[str, ...]
    target: TargetFile

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def models(self) -> list[ModelRow]:
        """Evaluated models, the pretrained one first; empty without finetuned ones."""
        found = self.evaluation.evaluated.models if self.evaluation.evaluated else []
        return found if len(found) > 1 and found[0].update == 0 else []

    @property
    def updates(self) -> int:
        return int(self.rows[-1]["update"]) if self.rows else 0

    @property
    def result(self) -> str:
        """Name of the checkpoint that the run stands for; empty when there is none."""
        return self.folder.result_checkpoint()

    @property
    def final(self) -> ModelRow | None:
        """The evaluated model that the run stands for: its result, else the last evaluated."""
        found = [model for model in self.models if model.name == self.result] or self.models[-1:]
        return found[0] if found else None

    @property
    def best(self) -> list[PointRow]:
        """The best reward for each KL: by `nablagfn target` if it drew more of the same prompts
        than `nablagfn evaluate`; empty when neither was run."""
        evaluated = self.evaluation.evaluated
        own = evaluated.frontier if evaluated else []
        if not own:
            return self.target.frontier
        assert evaluated is not None
        settings = evaluated.settings
        same = set(self.target.prompts) == set(settings.prompts)
        more = self.target.images_per_prompt > (settings.images_per_prompt or 0)
        return self.target.frontier if same and more else own

    @property
    def target_pictures(self) -> Path | None:
        """What a perfect finetune would draw; None where no target was stated for this run."""
        return self.folder.path / TARGET / "pictures.png" if self.target.settings else None

    def sheet(self, name: str) -> Sheet | None:
        """Which picture is where in evaluation/NAME/pictures.png."""
        file = f"evaluation/{name}/samples.json"
        return checked(self.folder, file, Sheet.model_validate, self.folder.read_json)

    def evaluated_pictures(self, name: str) -> Path:
        return self.folder.path / "evaluation" / name / "pictures.png"

    def grids(self) -> list[tuple[int, Path]]:
        """(epoch, file) of the fixed-seed grids, in order."""
        found = [
            (int(match[1]), path)
            for path in self.folder.grids.glob("epoch_*.png")
            if (match := re.fullmatch(r"epoch_(\d+)\.png", path.name))
        ]
        return sorted(found)


def checked(
    folder: RunFolder, name: str, parse: Callable[[Any], T], load: Callable[[str], Any]
) -> T | None:
    """parse(load(name)), None when there is no such file. Raises ConfigError when it is damaged."""
    try:
        content = load(name)
        return None if content is None else parse(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    raise ConfigError(
        f"{folder.path / name} is damaged ({reason}): write it anew, or move it away and its part "
        "is left out"
    )


def read(folder: RunFolder) -> Record:
    """Raises ConfigError when this is no run folder, or one of its files is damaged."""

    config = folder.config()
    evaluation = checked(folder, "evaluation.json", EvaluationFile.model_validate, folder.read_json)
    guard = checked(folder, GUARD, Guarded.model_validate, folder.read_json)
    versions = checked(folder, "versions.json", Versions.model_validate, folder.read_json)
    prompts = checked(folder, "prompts.json", Prompts.model_validate, folder.read_json)
    target = checked(folder, TARGET_FILE, TargetFile.model_validate, folder.read_json)
    return Record(
        folder=folder,
        config=config,
        rows=checked(folder, METRICS, _rows_of(LogRow), folder.rows) or [],
        diagnostics=checked(folder, DIAGNOSTICS, _rows_of(StepRow), folder.rows) or [],
        evaluation=evaluation or EvaluationFile(),
        guard=guard or Guarded(),
        versions=(versions or Versions({})).root,
        prompts=tuple(prompts.root if prompts else ()),
        target=target if target and target.settings == drawn_with(config) else TargetFile(),
    )


def read_target(folder: Path) -> TargetFile:
    """target.json of a folder of `nablagfn target`. Raises ConfigError where there is none."""
    place = RunFolder(folder)
    found = checked(place, "target.json", TargetFile.model_validate, place.read_json)
    if found is None:
        raise ConfigError(f"{folder} has no target.json: nablagfn target --out {folder} makes it")
    return found


def _rows_of(kind: type[BaseModel]) -> Callable[[list[Row]], list[Row]]:
    """Checks that every row is of a kind."""

    def check(rows: list[Row]) -> list[Row]:
        for row in rows:
            kind.model_validate(row)
        return rows

    return check
