"""The embedded flow model: what it shares, what its training rests on, what it draws."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0

from nablagfn.families import find_family
from nablagfn.models.latent import LatentPolicy
from nablagfn.models.latent_model import PipelineCall
from nablagfn.models.load import policy_of
from nablagfn.models.locate import EMBEDDED, critics_of
from nablagfn.models.sd3 import StableDiffusion3
from nablagfn.recipes.options import load_config
from tests.test_tiny_animals import check_gate, judged

FOLDER = EMBEDDED["tiny-animals-flow"]
TOOLS = Path(__file__).parent.parent / "tools" / "tiny_animals"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The script as a module; others of its neighbours' names stay apart."""
    names = {path.stem for path in TOOLS.glob("*.py")}
    others = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    monkeypatch.syspath_prepend(str(TOOLS))
    import data  # type: ignore[import-not-found]
    import train_flow  # type: ignore[import-not-found]

    yield SimpleNamespace(flow=train_flow, data=data)
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(others)


def shipped(length: int = 1) -> LatentPolicy:
    call = PipelineCall(max_sequence_length=length)
    return policy_of(StableDiffusion3, "tiny-animals-flow", call, device="cpu")


# ---------------------------------------------------------------------------- the folder


def test_it_takes_six_megabytes_and_shares_the_rest() -> None:
    own = [path for path in FOLDER.rglob("*") if path.is_file() and not path.is_symlink()]
    inside = [path for path in own if FOLDER.resolve() in path.resolve().parents]
    assert sum(path.stat().st_size for path in inside) <= 6e6
    for part in ("vae/diffusion_pytorch_model.safetensors", "tokenizer", "tokenizer_2"):
        assert EMBEDDED["tiny-animals"].resolve() in (FOLDER / part).resolve().parents
    assert critics_of("tiny-animals-flow") == critics_of("tiny-animals")


def test_it_is_a_pipeline_of_the_family_sd3() -> None:
    config = load_config("warmth_flow")
    assert find_family(config).name == "sd3"
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    assert pipe.scheduler.config.shift == 3.0 and pipe.transformer.config.qk_norm == "rms_norm"


# ---------------------------------------------------------------------------- its training


def test_one_counted_token_is_as_many_zeros(tools: SimpleNamespace) -> None:
    """Exactly what the pipeline computes with 256 of them, to rounding."""
    torch.manual_seed(0)
    network, counted = tools.flow.build_transformer().eval(), tools.flow.Counted()
    x, time = torch.randn(2, 16, 8, 8), torch.tensor([900.0, 100.0])
    hidden = F.pad(torch.randn(2, 16, 256), (0, 0, 0, 1))
    pooled = torch.randn(2, 256)
    counted.count = torch.tensor([256.0, 256.0])

    def run(states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(x, states, pooled, time, return_dict=False)[0]

    network.set_attn_processor(JointAttnProcessor2_0())
    known, one = run(F.pad(hidden, (0, 0, 0, 255))), run(hidden)
    network.set_attn_processor(counted)
    torch.testing.assert_close(run(hidden), known, rtol=1e-4, atol=1e-5)
    assert (one - known).abs().max() > 1e-3


def test_captions_are_encoded_as_the_pipeline_does(tools: SimpleNamespace) -> None:
    captions, policy = tools.flow.Captions(torch.device("cpu")), shipped()
    texts = ["", "a cat", "a glossy fox on a blue background"]
    row = captions(texts)
    known = policy.condition(texts).tensors
    torch.testing.assert_close(captions.hidden[row], known["prompt_embeds"], rtol=0, atol=2e-2)
    torch.testing.assert_close(captions.pooled[row], known["pooled_projections"], rtol=0, atol=2e-2)


def test_the_lesson_is_the_velocity_towards_the_posterior_mean(tools: SimpleNamespace) -> None:
    """A network that gives it has no loss; with one picture it is ε − x."""
    captions = tools.flow.Captions(torch.device("cpu"))
    z0 = torch.randn(1, 16, 8, 8)
    lessons = tools.flow.FlowLessons(z0, np.zeros((1, 3), dtype=np.int16), captions)

    def right(x, timestep, **given):
        return ((x - z0) / (timestep / 1000)[:, None, None, None],)

    def wrong(x, timestep, **given):
        return (torch.zeros_like(x),)

    counted = tools.flow.Counted()
    assert lessons.loss(right, counted, 0, 0, 8) < 1e-6
    assert set(counted.count.tolist()) <= set(tools.flow.EMPTY)
    assert lessons.loss(wrong, counted, 0, 0, 8) > 1


# ---------------------------------------------------------------------------- what it draws


def test_most_of_90_samples_are_recognised() -> None:
    """Two of each animal; the whole gate is behind the marker `proof`."""
    seen = judged(shipped(), 20, each=2)
    right = sum(a == b for a, b in zip(seen["asked"], seen["animal"], strict=True))
    assert right >= 0.8 * 90, right


@pytest.mark.proof
def test_450_samples_at_20_steps_pass_the_quality_gate() -> None:
    check_gate(judged(shipped(), 20))


def test_it_draws_the_same_whether_t5_is_missing_once_or_256_times() -> None:
    """Trained for both: the velocities are near each other."""
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.9, 0.7, 0.5, 0.3])
    texts = ["a cat", "a fox", "a bee", "a lion"]
    found = []
    for length in (1, 256):
        policy = shipped(length)
        with torch.no_grad():
            found.append(policy.output(x, time, policy.condition(texts)))
    gap = (found[0] - found[1]).square().mean().sqrt()
    assert gap < 0.1 * found[0].square().mean().sqrt()
