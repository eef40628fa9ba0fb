"""The reward packages themselves, for parity tests only (`make parity` installs them).

Their environments no longer exist: image-reward imports names that transformers has removed, hpsv2
lacks its vocabulary file, and torchvision beside a CPU build of torch misses two operators. The
shims below stand in for these and touch nothing that computes a score.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import types
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_KEEP: list[Any] = []  # a torch.library.Library lives as long as its object


def _torchvision() -> None:
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _KEEP.append(library)
        import torchvision  # noqa: F401


def _old_transformers_names() -> None:
    """What med.py and blip.py import and, at these sizes, never call."""
    import transformers.modeling_utils as modelling
    import transformers.pytorch_utils as utilities

    def chunks(function: Any, size: int, dimension: int, *tensors: Any) -> Any:
        assert size == 0  # BLIP's configuration
        return function(*tensors)

    def unused(*args: Any, **options: Any) -> Any:
        raise AssertionError("pruning is not part of scoring")

    for name, stand_in in (
        ("apply_chunking_to_forward", chunks),
        ("find_pruneable_heads_and_indices", unused),
        ("prune_linear_layer", unused),
    ):
        if not hasattr(modelling, name):
            setattr(modelling, name, getattr(utilities, name, stand_in))
    if "transformers.file_utils" not in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("transformers.file_utils")
    if "transformers.file_utils" not in sys.modules:
        old = types.ModuleType("transformers.file_utils")
        from transformers.utils import ModelOutput

        old.ModelOutput = ModelOutput  # type: ignore[attr-defined]
        sys.modules["transformers.file_utils"] = old


def _package(name: str, folder: Path) -> types.ModuleType:
    """An empty package, so that submodules load without its __init__ (and all that pulls in)."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]  # type: ignore[attr-defined]
    sys.modules[name] = module
    return module


@lru_cache
def open_clip() -> Any:
    _torchvision()
    return importlib.import_module("open_clip")


@lru_cache
def openai_clip() -> Any:
    _torchvision()
    if importlib.util.find_spec("pkg_resources") is None:
        stub = types.ModuleType("pkg_resources")
        stub.packaging = importlib.import_module("packaging")  # type: ignore[attr-defined]
        importlib.import_module("packaging.version")
        sys.modules["pkg_resources"] = stub
    return importlib.import_module("clip")


@lru_cache
def hpsv2_open_clip() -> Any:
    """hpsv2's own copy of open_clip; its missing vocabulary is open_clip's."""
    _torchvision()
    spec = importlib.util.find_spec("hpsv2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    _package("hpsv2", folder)
    _package("hpsv2.src", folder / "src")
    vocabulary = folder / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        own = importlib.util.find_spec("open_clip")
        assert own is not None and own.origin is not None
        shutil.copy(Path(own.origin).parent / vocabulary.name, vocabulary)
    return importlib.import_module("hpsv2.src.open_clip")


@lru_cache
def blip() -> types.SimpleNamespace:
    """ImageReward's own modules: `vit`, `med`, `reward` (its ImageReward.py)."""
    _torchvision()
    _old_transformers_names()
    spec = importlib.util.find_spec("ImageReward")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    _package("ImageReward", folder)
    _package("ImageReward.models", folder / "models")
    _package("ImageReward.models.BLIP", folder / "models" / "BLIP")
    names = {
        "vit": "ImageReward.models.BLIP.vit",
        "med": "ImageReward.models.BLIP.med",
        "blip": "ImageReward.models.BLIP.blip",
        "pretrain": "ImageReward.models.BLIP.blip_pretrain",
        "reward": "ImageReward.ImageReward",
    }
    found = types.SimpleNamespace(
        **{key: importlib.import_module(name) for key, name in names.items()}
    )
    _old_model_methods(found.med.BertModel)
    return found


def _old_model_methods(model: type) -> None:
    """Methods of PreTrainedModel that med.py calls, as they were: masks, and no head masked."""

    def inverted(self: Any, mask: torch.Tensor) -> torch.Tensor:
        return (1.0 - mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min

    def heads(self: Any, mask: None, layers: int) -> list[None]:
        assert mask is None
        return [None] * layers

    model.init_weights = lambda self: None  # type: ignore[attr-defined]  # drawn afterwards
    model.invert_attention_mask = inverted  # type: ignore[attr-defined]
    model.get_head_mask = heads  # type: ignore[attr-defined]
