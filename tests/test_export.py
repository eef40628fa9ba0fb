"""Exports of a real pipeline, loaded by diffusers as a user would, against the trained model."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file

from nablagfn.cli import main
from nablagfn.commands.assemble import build_policy
from nablagfn.commands.export import export
from nablagfn.commands.export.card import licence, plain
from nablagfn.commands.export.proof import GREY_LEVEL, ROUNDING, Proof
from nablagfn.config import Config, ConfigError, set_option
from nablagfn.core import rng
from nablagfn.families import ExportForm
from nablagfn.families.stable_diffusion import STABLE_DIFFUSION
from nablagfn.methods.build import build_kernel
from nablagfn.models.latent import LatentPolicy
from nablagfn.models.locate import EMBEDDED
from nablagfn.models.lora import FIRST_STATE, MEAN
from nablagfn.models.stable_diffusion import StableDiffusionPolicy
from nablagfn.report.loading import how_to_load
from nablagfn.report.read import read
from nablagfn.report.render import code
from nablagfn.runs.runfolder import RunFolder
from nablagfn.training.checkpoint import load_policy
from nablagfn.training.trainer import steps_of
from tests.worlds import randomise

PROMPTS = ("a cat", "a fox on a blue background")
STEPS, RANK = 4, 3


def settings() -> dict[str, object]:
    return {
        "pretrained.model": "tiny-animals",
        "experiment.reward_fn": "tiny-aesthetic",
        "sampling.num_steps": STEPS,
        "sampling.guidance_scale": 2.0,
        "model.lora_rank": RANK,
        "saving.output_dir": "/home/someone/private",
    }


@pytest.fixture(scope="module")
def policy() -> StableDiffusionPolicy:
    """tiny-animals with a LoRA far from zero."""
    policy = StableDiffusionPolicy.from_pretrained("tiny-animals", lora_rank=RANK)
    randomise(policy.parameters(), 0.1)
    return policy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, policy: StableDiffusionPolicy) -> RunFolder:
    """A run folder with that LoRA as its one checkpoint."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "tiny_seed0")
    config = Config()
    for key, value in settings().items():
        set_option(config, key, value)
    folder.write_json("config.json", config.model_dump(mode="json"))
    folder.write_json("prompts.json", list(PROMPTS))
    for update in (1, 2):
        folder.append("metrics.jsonl", {"update": update, "reward": 1.0 * update})
    place = folder.checkpoints / "update_000002"
    place.mkdir(parents=True)
    policy.save(place)
    save_file(policy.state_dict(), place / "policy.safetensors")
    return folder


@pytest.fixture(scope="module")
def exported(run: RunFolder) -> Path:
    main(["export", str(run.path), "--format=all"])
    return run.path / "export" / "update_000002"


def pictures(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        list(PROMPTS),
        guidance_scale=2.0,
        num_inference_steps=STEPS,
        eta=1.0,
        generator=[rng.generator(7, "test", index=i) for i in range(2)],
        output_type="np",
    ).images


def plain_pipeline(folder: Path = EMBEDDED["tiny-animals"]) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False
    )


def test_each_form_draws_the_trained_model_s_pictures(
    exported: Path, policy: StableDiffusionPolicy
) -> None:
    known, base = pictures(policy.pipeline), pictures(plain_pipeline())
    assert np.abs(known - base).max() > 0.1
    lora, kohya = plain_pipeline(), plain_pipeline()
    lora.load_lora_weights(exported / "diffusers")
    kohya.load_lora_weights(exported / "kohya", weight_name="tiny_seed0.safetensors")
    assert np.array_equal(pictures(lora), known)
    assert np.array_equal(pictures(kohya), known)
    np.testing.assert_allclose(pictures(plain_pipeline(exported / "fused")), known, atol=1e-4)


def test_kohya_keys_are_those_of_stable_diffusion_one(
    exported: Path, policy: StableDiffusionPolicy
) -> None:
    state = load_file(exported / "kohya" / "tiny_seed0.safetensors")
    block = r"(down_blocks_\d_attentions_\d|mid_block_attentions_0|up_blocks_\d_attentions_\d)"
    layer = r"transformer_blocks_0_attn[12]_to_(q|k|v|out_0)"
    pattern = rf"lora_unet_{block}_{layer}\.(lora_down\.weight|lora_up\.weight|alpha)"
    assert all(re.fullmatch(pattern, key) for key in state)
    assert len(state) == 3 * len(policy.state_dict()) // 2
    for key, value in state.items():
        if key.endswith("alpha"):
            assert float(value) == RANK
        elif key.endswith("lora_down.weight"):
            assert value.shape[0] == RANK


def test_the_card_tells_where_it_comes_from_and_nothing_private(exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    for text in ("license: apache-2.0", "`nabla-db`", "β = 1000", '"a cat"', "kohya: reloaded"):
        assert text in card
    assert "/home/someone" not in card
    for picture in ("pictures.png", "curves.png"):
        assert f"]({picture})" in card and (exported / picture).stat().st_size > 500


def test_the_code_of_report_and_card_runs_and_draws_with_the_lora(run: RunFolder) -> None:
    drawn = []
    for folder in (run.checkpoints / "update_000002", None):
        code = how_to_load(run.config(), PROMPTS[0], str(folder))
        code = code if folder else code.replace("pipe.load_lora_weights('None')\n", "")
        names: dict[str, object] = {}
        torch.manual_seed(0)
        exec(code, names)
        drawn.append(np.asarray(names["image"], dtype=float))
    assert drawn[0].shape == (64, 64, 3) and np.abs(drawn[0] - drawn[1]).max() > 20


def test_dpm_solver_code_names_the_first_order_sde(run: RunFolder) -> None:
    config = run.config()
    config.sampling.scheduler = "dpm-solver"
    config.pretrained.model, config.pretrained.revision = "someone/model", "v1"
    code = how_to_load(config, "it's", "lora")
    compile(code, "code", "exec")
    for text in ("revision='v1'", "solver_order=1", "sde-dpmsolver++", '"it\'s"'):
        assert text in code
    assert "eta" not in code


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The strength of the LoRA in each pass of a U-Net that is to come; 0 where it is off."""
    seen: list[float] = []
    plain = UNet2DConditionModel.forward

    def spied(self: UNet2DConditionModel, *args: object, **given: object) -> object:
        layer = next((m for m in self.modules() if isinstance(m, LoraLayer)), None)
        if layer is not None:
            (name,) = layer.active_adapters
            seen.append(0.0 if layer.disable_adapters else float(layer.scaling[name]))
        return plain(self, *args, **given)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spied)
    return seen


@pytest.mark.parametrize("fade", [0.0, 0.5])
def test_a_lora_that_acts_in_the_first_steps_is_exported_and_proved_so(
    fade: float,
    run: RunFolder,
    tmp_path: Path,
    acted: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a callback that weakens it and switches it off, in the proof and in the card's program,
    which draws what the trainer draws; `fused`, in which it would act always, is refused."""
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    part = RunFolder(tmp_path / "run")
    config = run.config()
    options = {"model.lora_until": 0.3, "model.lora_fade": fade, "sampling.spacing": "logsnr"}
    for key, value in options.items():
        set_option(config, key, value)
    part.write_json("config.json", config.model_dump(mode="json"))
    policy = build_policy(config, torch.device("cpu"))
    assert isinstance(policy, LatentPolicy)
    part.write_json("sampler.json", steps_of(build_kernel(config, policy)))
    strengths = part.lora_strengths(config)
    acting = sum(strength > 0 for strength in strengths)
    assert 0 < acting < STEPS == len(strengths)
    assert strengths == pytest.approx(policy.lora_strengths(part.times()))
    main(["export", str(part.path), "--format=all"])
    # without it, by the trained model, and by each of the two forms
    assert acted[STEPS:] == pytest.approx([*strengths] * 3) and len(acted) == 4 * STEPS
    found = part.path / "export" / "update_000002"
    assert {folder.name for folder in found.iterdir() if folder.is_dir()} == {"diffusers", "kohya"}
    with pytest.raises(SystemExit):
        main(["export", str(part.path), "--format=fused", "--out", str(tmp_path / "no")])
    assert "--format fused: with config.model.lora_until=0.3" in capsys.readouterr().err
    weights = part.checkpoints / "update_000002"
    drawn = []
    for given in (strengths, ()):
        code = how_to_load(config, PROMPTS[0], str(weights), "", part.times(), given)
        assert ("disable_lora" in code) == bool(given and not fade)
        assert ("set_adapters" in code) == bool(given and fade)
        names: dict[str, object] = {}
        for program in (code, code[code.index("image = ") :]):  # a second picture with one `pipe`
            torch.manual_seed(0)
            acted.clear()
            exec(program, names)
            assert acted == pytest.approx(given or [1.0] * STEPS, rel=1e-4)  # written in 6 digits
            image = np.asarray(names["image"], dtype=float)
            assert program is code or np.array_equal(image, drawn[-1])
            drawn.append(image)
    assert np.abs(drawn[0] - drawn[-1]).max() > 5
    words = f"{strengths[0]:.6g}, " if fade else f"the first {acting} steps"
    assert words in (found / "README.md").read_text(encoding="utf-8")


def test_a_first_state_goes_with_every_form_and_with_the_programs(
    run: RunFolder, tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    moved = RunFolder(tmp_path / "run")
    config = run.config()
    policy = build_policy(config, torch.device("cpu"))
    assert isinstance(policy, LatentPolicy)
    weights = moved.checkpoints / "update_000002"
    load_policy(policy, weights)
    before = code(read(moved))
    policy.first.mean = torch.zeros(policy.sample_shape)
    policy.first.mean[0] = 1.5
    policy.save(weights)
    save_file(policy.state_dict(), weights / "policy.safetensors")
    done = export(moved, form="all")
    plain = export(run, form="diffusers", out=tmp_path / "plain")
    assert {proof.form for proof in done.proofs} == {"diffusers", "kohya", "fused"}
    assert min(proof.change for proof in done.proofs) > 0.1
    looks = [np.asarray(Image.open(at.folder / "pictures.png"), float) for at in (done, plain)]
    assert np.array_equal(*(look[:40] for look in looks))  # above, the pretrained model
    assert np.abs(looks[0] - looks[1]).max() > 20
    for proof in done.proofs:
        state = load_file(done.folder / proof.form / FIRST_STATE)
        assert torch.equal(state[MEAN], policy.first.mean)
    card, other = ((at.folder / "README.md").read_text(encoding="utf-8") for at in (done, plain))
    assert f"In each lies `{FIRST_STATE}`" in card and FIRST_STATE not in other
    assert f"load_file('diffusers/{FIRST_STATE}')" in card
    program, drawn = code(read(moved)), []
    assert "latents" in program and "latents" not in before
    for given in (program, before.replace("pipe(", "pipe(latents=begin, ")):
        names: dict[str, object] = {}
        torch.manual_seed(0)
        if given is not program:
            names["begin"] = torch.randn(1, *policy.sample_shape) + policy.first.mean
        exec(given, names)
        drawn.append(np.asarray(names["image"], dtype=float))
    assert np.array_equal(*drawn)


# -------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize(
    "change, bound", [(0.5, GREY_LEVEL), (0.01, 0.001), (0.0, ROUNDING), (1e-4, ROUNDING)]
)
def test_the_bound_is_a_grey_level_or_a_tenth_of_the_change(change: float, bound: float) -> None:
    Proof("kohya", 0.99 * bound, change).check()
    for beyond in (1.01 * bound, float("nan")):
        with pytest.raises(ConfigError, match="draws other pictures"):
            Proof("kohya", beyond, change).check()


def test_an_export_that_draws_other_pictures_leaves_nothing(
    run: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forms = STABLE_DIFFUSION.export_forms
    form = forms["kohya"]

    def lossy(policy: object, config: Config, folder: Path, name: str, stock: object) -> None:
        form.write(policy, config, folder, name, stock)  # type: ignore[arg-type]
        (file,) = folder.iterdir()
        state = load_file(file)
        save_file({k: v for k, v in state.items() if "down_blocks_0" not in k}, file)

    monkeypatch.setitem(forms, "kohya", ExportForm(lossy, form.load))  # type: ignore[arg-type]
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["export", str(run.path), "--format=kohya", f"--out={out}"])
    told = capsys.readouterr().err
    assert "the kohya export draws other pictures" in told and len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_loaded_afresh_has_the_room_of_the_trained_model(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That model waits in the computer's memory; parts come one by one where they did in the run;
    a GPU that is too small all the same is one line, and nothing is written."""
    module = importlib.import_module("nablagfn.commands.export.export")
    seen: list[object] = []

    class Pipeline:
        def to(self, device: torch.device) -> Pipeline:
            seen.append(device)
            return self

        def enable_model_cpu_offload(self, device: torch.device) -> None:
            seen.append(("one by one", device))

    gpu, config = torch.device("cuda"), run.config()
    for offload in (False, True):
        config.speed.offload_text_encoder = offload
        drew = SimpleNamespace(config=config, device=gpu)
        assert isinstance(module._placed(Pipeline(), drew), Pipeline)
    assert seen == [gpu, ("one by one", gpu)]

    def full(*given: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "_placed", full)
    with pytest.raises(ConfigError, match="does not fit on this GPU"):
        export(run, out=tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- refusals


def test_what_cannot_be_exported_is_one_line(
    run: RunFolder, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = RunFolder(tmp_path / "world")
    config = Config()
    set_option(config, "pretrained.model", "worlds/ring")
    world.write_json("config.json", config.model_dump(mode="json"))
    bare = RunFolder(tmp_path / "bare")
    bare.write_json("config.json", run.config().model_dump(mode="json"))
    for command, said in (
        ([str(world.path)], "a run in worlds/ring: there is no LoRA"),
        ([str(bare.path)], "has no checkpoint yet"),
        ([str(run.path), "--checkpoint=update_9"], "no checkpoint update_9; there is: update_0"),
        ([str(run.path)], "is there already"),
        ([str(run.path), "--format=onnx"], "invalid choice: 'onnx'"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *command])
        told = capsys.readouterr().err
        assert said in told and len(told.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "world"]


def test_out_and_default_checkpoint(run: RunFolder, tmp_path: Path) -> None:
    done = export(run, out=tmp_path / "deep" / "out", show_progress=False)
    assert done.folder == tmp_path / "deep" / "out"
    assert [p.name for p in done.folder.parent.iterdir()] == ["out"]
    assert [proof.form for proof in done.proofs] == ["diffusers"]
    assert done.proofs[0].difference == 0 and done.proofs[0].change > 0.1


def test_licences_and_escapes(tmp_path: Path) -> None:
    assert licence("tiny-animals") == "apache-2.0"
    assert licence("runwayml/stable-diffusion-v1-5") == "creativeml-openrail-m"
    assert licence("someone/model") == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n", encoding="utf-8")
    assert licence(str(tmp_path)) == "mit"
    assert plain("a|b\n<i>`") == "a&#124;b &lt;i>'"
