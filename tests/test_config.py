"""Options: all read, all described, checked with one helpful line; config and prompt files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import nablagfn
from nablagfn.cli import build_parser, resolve_config
from nablagfn.commands.assemble import check_names
from nablagfn.config import Config, ConfigError, describe, flatten, merge, set_option
from nablagfn.families import find_family
from nablagfn.methods.registry import check_settings, find_method
from nablagfn.prompts import PromptSet, load_prompts, read_prompts
from nablagfn.recipes.options import apply_overrides, load_config, packaged

SOURCE = Path(nablagfn.__file__).parent
OPTIONS = sorted(flatten(Config()))
fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def error_line(call: Callable[[], Any]) -> str:
    """The message of the ConfigError that `call` must raise: one line, not empty."""
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    return message


def succeeds_or_says_why(call: Callable[[], Any]) -> None:
    """Any other exception, or a message of several lines, fails the test."""
    try:
        call()
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, repr(str(error))


# -------------------------------------------------------------------------------- every option


def test_every_option_is_described() -> None:
    defaults = flatten(Config())
    for option, (text, default) in describe().items():
        assert len(text) > 8 and default == defaults[option], option


def test_every_default_can_be_given_on_the_command_line() -> None:
    for option, default in flatten(Config()).items():
        if default != "":
            config = apply_overrides(Config(), [f"--config.{option}={default}"])
            assert flatten(config)[option] == default, option


# -------------------------------------------------------------------------------- the paper's


PAPER = {
    "training.lr": 1e-3,
    "training.flow_lr": 1e-3,
    "training.flow_wd": 1e-2,
    "training.optimizer": "adamw",
    "training.adam_beta1": 0.9,
    "training.adam_beta2": 0.999,
    "training.adam_epsilon": 1e-8,
    "training.adam_weight_decay": 1e-4,
    "training.max_grad_norm": 1.0,
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 8,
    "training.num_epochs": 100,
    "training.mixed_precision": "bf16",
    "training.allow_tf32": True,
    "model.lora_rank": 8,
    "model.reward_scale": 1e3,
    "model.unet_reg_scale": 1e3,
    "model.reverse_loss_scale": 1.0,
    "model.pretrained_strength": 1.0,
    "model.timestep_fraction": 0.1,
    "model.no_flow": False,
    "model.reward_adaptive_mode": "squared",
    "model.flow_channel_width": (64, 128, 256, 256),
    "model.flow_layers_per_block": 1,
    "sampling.num_steps": 50,
    "sampling.eta": 1.0,
    "sampling.scheduler": "ddpm",
    "sampling.guidance_scale": 5.0,
    "sampling.batch_size": 16,
    "sampling.num_batches_per_epoch": 4,
    "sampling.low_var_subsampling": True,
    "logging.use_wandb": False,
    "logging.save_freq": 5,
    "pretrained.model": "runwayml/stable-diffusion-v1-5",
}
RUNS = {
    "aesthetic": {"experiment.reward_fn": "aesthetic", "experiment.prompt_fn": "simple_animals"},
    "imagereward": {"experiment.reward_fn": "imagereward", "experiment.prompt_fn": "drawbench"},
    "hpsv2": {
        "experiment.reward_fn": "hpsv2",
        "experiment.prompt_fn": "hpd_photo_painting",
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 16,
        "model.reward_scale": 1e4,
        "model.unet_reg_scale": 1e2,
    },
}


@pytest.mark.parametrize("spec", ["{}", "{}.py", "config/{}.py"])
@pytest.mark.parametrize("name", RUNS)
def test_named_runs_have_the_paper_s_settings(
    name: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no config folder
    config = load_config(spec.format(name))
    expected = {**PAPER, **RUNS[name]}
    assert {key: flatten(config)[key] for key in expected} == expected
    assert config.updates_per_epoch() == 2  # 100 epochs are 200 updates


LARGE = {
    "sdxl": "sdxl",
    "sd35": "sd3",
    "flux": "flux",
    "flux2_klein": "flux2",
    "qwen_image": "qwen-image",
    "z_image": "z-image",
}


@pytest.mark.parametrize("name", LARGE)
def test_recipes_of_large_models_are_of_their_family_and_consistent(name: str) -> None:
    config = load_config(name)
    config.check()
    check_settings(config)
    assert find_family(config).name.startswith(LARGE[name])  # by the hub name, without a network
    assert config.updates_per_epoch() == 1


@pytest.mark.parametrize("name", [*RUNS, "demo", "warmth", "warmth_flow", *LARGE])
def test_config_files_of_the_repository_are_the_packaged_ones(name: str) -> None:
    file = Path(__file__).parent.parent / "config" / f"{name}.py"
    assert load_config(str(file)) == load_config(name)


def test_the_demo_runs_the_embedded_model() -> None:
    config = load_config("demo")
    assert config.pretrained.model == "tiny-animals"
    assert config.experiment.reward_fn == "tiny-aesthetic"
    assert config.updates_per_epoch() >= 1


SHARED = "--config=config/aesthetic.py --seed=0 --config.model.reward_scale=1e4 "
SHARED += "--config.model.unet_reg_scale=2e3 --config.sampling.low_var_subsampling=True "
FEWER = "--config.model.timestep_fraction=0.1 --config.training.gradient_accumulation_steps=4 "
FEWER += "--config.sampling.batch_size=4 --config.sampling.num_batches_per_epoch=4 "
FEWER += "--config.training.num_epochs=400 "
FAST = FEWER.replace("steps=4", "steps=1").replace("per_epoch=4", "per_epoch=1")
COMMANDS = {
    "default": (SHARED, 2, 100, False),
    "fast": (SHARED + FAST, 1, 400, False),
    "fewer_gpus": (SHARED + FEWER, 1, 400, False),
    "no_flow": (SHARED + FEWER + "--config.model.no_flow=True ", 1, 400, True),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_original_commands_resolve(name: str) -> None:
    line, updates, epochs, no_flow = COMMANDS[name]
    known, rest = build_parser().parse_known_args(["train", *line.split(), f"--exp_name={name}"])
    config = resolve_config(known, rest)
    assert config.updates_per_epoch() == updates
    assert config.training.num_epochs == epochs and config.model.no_flow is no_flow
    assert (config.model.reward_scale, config.model.unet_reg_scale) == (1e4, 2e3)
    assert known.exp_name == name and config.seed == 0


# -------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("training.learning_rate=1", "training.lr"),
        ("sampling.guidence_scale=1", "sampling.guidance_scale"),
        ("model.rewardscale=1", "model.reward_scale"),
        ("model.noflow", "model.no_flow"),
        ("sampling.sheduler=ddim", "sampling.scheduler"),
    ],
)
def test_a_misspelt_option_names_the_nearest(wrong: str, right: str) -> None:
    message = error_line(lambda: apply_overrides(Config(), [f"--config.{wrong}"]))
    assert f"did you mean config.{right}?" in message


@pytest.mark.parametrize(
    ("wrong", "right"), [("--sed=1", "--seed"), ("--confg=demo", "--config"), ("-x", "--")]
)
def test_a_misspelt_flag_names_the_nearest(wrong: str, right: str) -> None:
    assert right in error_line(lambda: apply_overrides(Config(), [wrong]))


BAD = [
    ("training.lr", "fast"),
    ("training.lr", "0"),
    ("training.lr", "-1"),
    ("training.lr", "nan"),
    ("training.lr", "inf"),
    ("model.reward_scale", "nan"),
    ("model.reward_scale", "inf"),
    ("training.max_grad_norm", "nan"),
    ("training.batch_size", "2.5"),
    ("training.batch_size", "0"),
    ("training.optimizer", "sgd"),
    ("training.mixed_precision", "fp8"),
    ("model.no_flow", "maybe"),
    ("model.pretrained_strength", "1.1"),
    ("model.timestep_fraction", "0"),
    ("model.timestep_fraction", "1.5"),
    ("model.flow_channel_width", "(64,)"),
    ("model.flow_channel_width", "(64,wide)"),
    ("model.flow_channel_width", "(0,64)"),
    ("model.flow_channel_width", "(-8,8)"),
    ("model.reward_adaptive_mode", "cubed"),
    ("sampling.eta", "0"),
    ("sampling.guidance_scale", "0.5"),
    ("sampling.guidance_scale", "nan"),
    ("sampling.num_steps", "1"),
    ("seed", "-1"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_bad_value_is_refused_with_its_meaning(key: str, value: str) -> None:
    config = Config()
    message = error_line(lambda: apply_overrides(config, [f"--config.{key}={value}"]))
    assert f"config.{key}" in message and describe()[key][0] in message
    assert config == Config()


@pytest.mark.parametrize("key", ["sampling.scheduler", "experiment.method", "pretrained.family"])
def test_an_unknown_name_is_refused_with_the_known_ones(key: str) -> None:
    known = {
        "sampling.scheduler": "ddpm",
        "experiment.method": "refl",
        "pretrained.family": "world",
    }
    given = build_parser().parse_known_args(["train", f"--config.{key}=nobody"])
    if key == "pretrained.family":
        message = error_line(lambda: check_names(resolve_config(*given)))
    else:
        message = error_line(lambda: resolve_config(*given))
    assert f"config.{key}='nobody' is unknown: did you mean" in message and known[key] in message


def test_a_negative_seed_is_refused() -> None:
    known, rest = build_parser().parse_known_args(["train", "--seed=-1"])
    error_line(lambda: resolve_config(known, rest))


@pytest.mark.parametrize("key", ["logging.wandb_key", "logging.save_json"])
def test_options_of_the_original_that_are_gone_say_why(key: str) -> None:
    message = error_line(lambda: set_option(Config(), key, "x"))
    assert "does not exist here" in message and len(message) > 60


def test_an_option_without_a_value() -> None:
    message = error_line(lambda: apply_overrides(Config(), ["--config.training.lr"]))
    assert "--config.training.lr=VALUE" in message


@fuzz
@given(key=st.one_of(st.sampled_from(OPTIONS), st.text()), value=st.text())
@example(key="training.lr", value="9" * 5000)
@example(key="training\nlr", value="1")
@example(key="", value="")
def test_any_option_succeeds_or_gives_one_line(key: str, value: str) -> None:
    succeeds_or_says_why(lambda: apply_overrides(Config(), [f"--config.{key}={value}"]))


@fuzz
@given(arguments=st.lists(st.one_of(st.text(), st.text().map("--config.".__add__)), max_size=4))
def test_any_command_line_succeeds_or_gives_one_line(arguments: list[str]) -> None:
    succeeds_or_says_why(lambda: apply_overrides(Config(), arguments))


# -------------------------------------------------------------------------------- good spellings


@pytest.mark.parametrize("spelling", ["ddim", "DDIM", "ddpm", "DDPM", "DPM-solver", "dpm-Solver"])
def test_samplers_are_spelled_in_any_case(spelling: str) -> None:
    config = apply_overrides(Config(), [f"--config.sampling.scheduler={spelling}"])
    assert config.sampling.scheduler == spelling.lower()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.model.no_flow", "--config.training.lr", "1e-4"],
        ["--config.model.no_flow=True", "--config.training.lr=0.0001"],
        ["--config.training.lr=1e-4", "--config.model.no_flow"],
    ],
)
def test_spellings_of_the_command_line(arguments: list[str]) -> None:
    config = apply_overrides(Config(), arguments)
    assert config.model.no_flow is True and config.training.lr == 1e-4


@pytest.mark.parametrize("text", ["(8,16)", "[8, 16]", "8,16", "(8,16,)"])
def test_spellings_of_a_tuple(text: str) -> None:
    config = apply_overrides(Config(), [f"--config.model.flow_channel_width={text}"])
    assert config.model.flow_channel_width == (8, 16)


def test_json_round_trip() -> None:
    config = apply_overrides(
        Config(), ["--config.model.flow_channel_width=8,16", "--config.seed=3"]
    )
    assert merge(Config(), json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_batches_must_divide() -> None:
    config = Config()
    config.training.batch_size = 5
    message = error_line(config.updates_per_epoch)
    assert "= 40 must divide" in message and "= 64" in message
    config.training.batch_size = 8
    assert config.updates_per_epoch() == 1


# -------------------------------------------------------------------------------- config files

ORIGINAL_STYLE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.training = training = ml_collections.ConfigDict()
    training.lr = 3e-4
    training.batch_size = 2
    config.model = ml_collections.ConfigDict()
    config.model.flow_channel_width = (8, 16)
    config.sampling = ml_collections.ConfigDict({"scheduler": "DPM-solver"})
    return config
"""


def config_file(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_config_dict_file_of_the_original_style(tmp_path: Path) -> None:
    pytest.importorskip("ml_collections")
    config = load_config(config_file(tmp_path, ORIGINAL_STYLE))
    assert (config.training.lr, config.training.batch_size) == (3e-4, 2)
    assert config.model.flow_channel_width == (8, 16)
    assert config.sampling.scheduler == "dpm-solver"
    assert config.model.lora_rank == 8  # what the file leaves out keeps its default


@pytest.mark.parametrize("value", ["{'training': {'lr': 2e-4}}", "MINE"])
def test_a_file_may_return_a_dict_or_a_config(tmp_path: Path, value: str) -> None:
    text = "from nablagfn import Config\nMINE = Config()\nMINE.training.lr = 2e-4\n"
    config = load_config(config_file(tmp_path, f"{text}def get_config():\n    return {value}\n"))
    assert config.training.lr == 2e-4 and flatten(config).keys() == flatten(Config()).keys()


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "x = 1",
        "import a_package_that_is_not_there",
        "raise ValueError('two\\nlines')",
        "def get_config():\n    return 3",
        "def get_config():\n    return {'training': {'lr': 'fast'}}",
        "def get_config():\n    return {'training': {'lrr': 1}}",
        "def get_config():\n    return {'training': 1}",
        "def get_config():\n    return {1: 2}",
        "def get_config():\n    return 1 / 0",
        "from nablagfn import Config\ndef get_config():\n    Config().training.lr = -1",
        "get_config = 5",
    ],
)
def test_a_bad_config_file_gives_one_line(tmp_path: Path, text: str) -> None:
    spec = config_file(tmp_path, text)
    error_line(lambda: load_config(spec))


@pytest.mark.parametrize("spec", ["aesthetics", "config/aestetic.py", "demos.py"])
def test_a_misspelt_config_names_the_nearest(spec: str) -> None:
    message = error_line(lambda: load_config(spec))
    assert "did you mean" in message
    assert ("demo" if "demo" in spec else "aesthetic") in message.partition("(")[0]


@pytest.mark.parametrize("spec", ["~no-such-user/x.py", "x" * 300, "a\nb", ".", "/"])
def test_any_config_path_gives_one_line(spec: str) -> None:
    error_line(lambda: load_config(spec))


def test_packaged_names() -> None:
    assert {*RUNS, "demo", "warmth", "warmth_flow", *LARGE} <= set(packaged())


# -------------------------------------------------------------------------------- prompt files


FILES = {
    "a.txt": "a cat\n\n  a dog, running  \n",
    "a.json": '["a cat", "a dog, running"]',
    "first.csv": 'a cat,1\n"a dog, running",2\n',
    "named.csv": 'Category,Prompts\nx,a cat\ny,"a dog, running"\n',
    "single.csv": 'prompt,style\na cat,x\n"a dog, running",y\n',
    "windows.csv": '\ufeffPrompts,Category\r\na cat,x\r\n"a dog, running",y\r\n',
    "windows.txt": "\ufeffa cat\r\na dog, running\r\n",
    "UPPER.TXT": "a cat\na dog, running",
}


@pytest.mark.parametrize("name", FILES)
def test_prompt_files_of_every_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name].encode())
    assert load_prompts(str(path)).prompts == ("a cat", "a dog, running")


def test_a_quoted_line_break_in_a_csv_stays_in_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "quoted.csv"
    path.write_text('prompt\n"a cat\non a mat"\na dog\n', encoding="utf-8")
    cat, dog = read_prompts(path).prompts
    assert cat.split() == ["a", "cat", "on", "a", "mat"] and dog == "a dog"


def test_what_stands_beside_a_prompt_is_its_metadata(tmp_path: Path) -> None:
    files = {
        "a.csv": 'red,Prompts,a b\n0.5,a cat,\n1,"a dog, running","x, y",,\n',
        "a.json": '[{"prompt": "a cat", "red": "0.5", "a b": ""}, '
        '{"red": "1", "prompts": "a dog, running", "a b": "x, y"}]',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = load_prompts(str(tmp_path / name))
        assert found.prompts == ("a cat", "a dog, running")
        told = [{"red": "0.5", "a b": ""}, {"red": "1", "a b": "x, y"}, {}]
        assert found.metadata([*found.prompts, "a fox"]) == told, name


def test_metadata_is_a_copy_and_json() -> None:
    given = {"a cat": {"box": [1, 2]}}
    found = PromptSet(("a cat",), about=given)
    given["a cat"]["box"].append(3)
    assert found.metadata(["a cat"]) == [{"box": [1, 2]}]
    message = error_line(lambda: PromptSet(("a cat",), about={"a cat": {"box": object()}}))
    assert "metadata" in message and "JSON" in message


MALFORMED = {
    "empty.txt": b"",
    "blank.txt": b" \n\n",
    "latin.txt": b"caf\xe9",
    "object.json": b'{"a": 1}',
    "numbers.json": b'["a", 3]',
    "blank.json": b'["a", " "]',
    "cut.json": b'["a", "b',
    "empty.json": b"[]",
    "deep.json": b"[" * 200_000,
    "long.json": b"[" + b"9" * 5000 + b"]",
    "null.csv": b"a\x00b,c\n",
    "empty.csv": b"",
    "header.csv": b"prompt\n",
    "blank.csv": b"prompt\n \n",
    "huge.csv": b'"' + b"x" * 200_000,
    "commas.csv": b"prompt,red\na dog, running,1\n",
    "short.csv": b"prompt,red\na cat\n",
    "twice.csv": b"prompt,red,red\na cat,0,1\n",
    "differs.csv": b"prompt,red\na cat,0\na cat,1\n",
    "differs.json": b'["a cat", {"prompt": "a cat", "red": 1}]',
    "a.yaml": b"- a cat",
    "noending": b"a cat",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_prompt_file_gives_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(MALFORMED[name])
    if name == "null.csv":  # newer csv modules take it
        succeeds_or_says_why(lambda: load_prompts(str(path)))
    else:
        message = error_line(lambda: load_prompts(str(path)))
        assert name in message


utf8 = st.characters(codec="utf-8")


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv"])
@fuzz
@given(content=st.one_of(st.binary(max_size=200), st.text(utf8).map(str.encode)))
def test_any_prompt_file_gives_prompts_or_one_line(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)

    def read() -> None:
        prompts = read_prompts(path).prompts
        assert prompts and all(p == p.strip() != "" for p in prompts)

    succeeds_or_says_why(read)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)


@fuzz
@given(value=json_values)
def test_any_json_gives_prompts_or_one_line(tmp_path: Path, value: object) -> None:
    path = tmp_path / "fuzz.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    entries = value if isinstance(value, list) else []
    if entries and all(isinstance(p, str) and p.strip() for p in entries):
        assert read_prompts(path).prompts == tuple(p.strip() for p in entries)
    else:
        error_line(lambda: read_prompts(path))


@fuzz
@given(spec=st.text())
@example(spec="~no-such-user")
@example(spec="x" * 300)
def test_any_prompt_set_name_gives_one_line(spec: str) -> None:
    succeeds_or_says_why(lambda: load_prompts(spec))


@pytest.mark.parametrize("spec", ["simple_animal", "not_there.txt", "/no/such/file.json", "."])
def test_a_missing_prompt_set_gives_one_line(spec: str) -> None:
    message = error_line(lambda: load_prompts(spec))
    assert spec in message
    if spec == "simple_animal":
        assert "did you mean simple_animals?" in message


@pytest.mark.parametrize("prompts", [(), ("",), ("a", " "), ("a", 3)])
def test_a_prompt_set_has_prompts(prompts: tuple) -> None:
    error_line(lambda: PromptSet(prompts))


def test_a_module_that_exits_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "cannot be imported" in error_line(lambda: find_method("leaving:METHOD"))
