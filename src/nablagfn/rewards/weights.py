"""Where rewards and feature extractors find their weights: a folder (`reward.weights`), or pinned
files on the hub.

One folder serves them all: each `Part` has its own name in it. Digests are those that the hub
shows for the pinned commits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..runs.hub import HubFile, fetch, in_cache

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """A file or a folder that one of them needs. name: in the weights' folder. files: on the hub;
    the files of a folder lie side by side there, too."""

    name: str
    files: tuple[HubFile, ...]

    @property
    def source(self) -> str:
        """The hub repository that the part comes from."""
        return self.files[0].repo


def _folder(name: str, repo: str, revision: str, files: Mapping[str, str]) -> Part:
    return Part(name, tuple(HubFile(repo, revision, file, sha) for file, sha in files.items()))


_CLIP_L = ("clip", "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
_WORDS = {"vocab.json": "", "merges.txt": ""}
CLIP_WORDS = _folder(*_CLIP_L, _WORDS)
CLIP_L = _folder(
    *_CLIP_L,
    {
        "config.json": "",
        "model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        **_WORDS,
    },
)
PICKSCORE = _folder(
    "pickscore",
    "yuvalkirstain/PickScore_v1",
    "a4e4367c6dfa7288a00c550414478f865b875800",
    {
        "config.json": "",
        "model.safetensors": "ef31ef6fc5ff4d9bb90dd232df4e145887ba62c5a03aa2841415f8c25f18d52e",
        **_WORDS,
    },
)
DINOV2 = _folder(  # its digest could not be had; the commit pins it
    "dinov2",
    "facebook/dinov2-base",
    "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
    {"config.json": "", "model.safetensors": ""},
)
BERT_WORDS = _folder(
    "bert",
    "google-bert/bert-base-uncased",
    "86b5e0934494bd15c9632b12f734a8a67f723594",
    {"vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"},
)
LAION_HEAD = Part(
    "sac+logos+ava1-l14-linearMSE.pth",
    (
        HubFile(
            "trl-lib/ddpo-aesthetic-predictor",
            "7f639699bec8126062148a47ecb1a4312d8e6688",
            "aesthetic-model.pth",
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        ),
    ),
)
HPS = Part(
    "HPS_v2.1_compressed.pt",
    (
        HubFile(
            "xswu/HPSv2",
            "697403c78157020a1ae59d23f111aa58ced35b0a",
            "HPS_v2.1_compressed.pt",
            "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        ),
    ),
)
IMAGEREWARD = Part(
    "ImageReward.pt",
    (
        HubFile(
            "THUDM/ImageReward",
            "7a9e21fc5c7873859f160173d502cc82f6709e33",
            "ImageReward.pt",
            "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
        ),
    ),
)


@dataclass(frozen=True)
class Finder:
    """Finds the parts of the reward `name`, or of the extractor. weights: `reward.weights`, empty
    for the hub. option: what named it."""

    name: str
    weights: str
    kind: str = "reward"
    option: str = "config.experiment.reward_fn"

    def find(self, *parts: Part) -> list[Path]:
        """Find where each part lies.

        Raises ConfigError, before anything is loaded, for what is missing or has another digest
        than the pinned one.
        """
        if self.weights:
            return self._in_folder(parts)
        found = []
        for part in parts:
            try:
                paths = [fetch(file) for file in part.files]
            except ConfigError as error:
                raise ConfigError(
                    f"{self.option}={self.name!r}: {error}; {self._help(parts)}"
                ) from None
            found.append(paths[0] if part.name.endswith((".pt", ".pth")) else paths[0].parent)
        return found

    def available(self, *parts: Part) -> bool:
        """Whether every part is there without a download."""
        if self.weights:
            root = Path(self.weights).expanduser()
            return all(_exists(root / part.name) for part in parts)
        return all(in_cache(file) is not None for part in parts for file in part.files)

    def _in_folder(self, parts: Sequence[Part]) -> list[Path]:
        root = Path(self.weights).expanduser()
        missing = [part for part in parts if not _exists(root / part.name)]
        if missing:
            raise ConfigError(
                f"config.reward.weights={self.weights!r}: the {self.kind} {self.name} needs "
                f"{self._names(missing)} in it"
            )
        return [root / part.name for part in parts]

    def _help(self, parts: Sequence[Part]) -> str:
        return f"or give --config.reward.weights=FOLDER with {self._names(parts)}"

    @staticmethod
    def _names(parts: Sequence[Part]) -> str:
        return ", ".join(f"{part.name} (hub: {part.source})" for part in parts)

    def read(self, path: Path) -> dict[str, Tensor]:
        """Tensors by name of a .safetensors, .pt or .pth file; pickled code is refused.

        Raises ConfigError.
        """
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and safetensors raise many kinds
            raise self.damaged(path, error) from None
        state = state.get("state_dict", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise self.damaged(path, "it is not a mapping of names to tensors")
        return state

    def config(self, kind: Any, name: str) -> Any:
        """`kind` from FOLDER/name, for an architecture of another size; None where there is none.

        Raises ConfigError.
        """
        path = Path(self.weights).expanduser() / name
        if not self.weights or not path.is_file():
            return None
        try:
            return kind.from_json_file(str(path))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self.damaged(path, error) from None

    def fill(self, module: M, state: Mapping[str, Tensor], path: Path) -> M:
        """Make all of `state` the float32 weights of `module`, which may be on the meta device.

        Raises ConfigError when they do not fit.
        """
        single = {name: value.float() for name, value in state.items()}
        try:
            module.load_state_dict(single, strict=True, assign=True)
        except (RuntimeError, ValueError) as error:
            raise self.damaged(path, error) from None
        return module.requires_grad_(False)

    def pretrained(self, kind: Any, folder: Path) -> Any:
        """`kind.from_pretrained(folder)`: safetensors only, and every weight of it.

        Raises ConfigError; transformers would draw what is missing at random.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model, info = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # safetensors and transformers raise many kinds
            raise self.damaged(folder, error) from None
        finally:
            logging.enable_progress_bar()
        if info["missing_keys"]:
            raise self.damaged(folder, f"it lacks {sorted(info['missing_keys'])[0]}")
        return model

    def words(self, kind: Any, folder: Path, size: int, **options: Any) -> Any:
        """`kind.from_pretrained(folder)`, a tokenizer of `size` entries.

        Raises ConfigError: transformers makes a tokenizer of a few entries out of missing files.
        """
        try:
            words = kind.from_pretrained(str(folder), local_files_only=True, **options)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise self.damaged(folder, error) from None
        if len(words) != size:
            raise self.damaged(
                folder, f"its tokenizer has {len(words)} entries, the model {size} embeddings"
            )
        return words

    def damaged(self, path: Path, error: object) -> ConfigError:
        """One line about a file that cannot be used."""
        text = str(error).strip()
        first = " ".join(text.splitlines()[:2]) if text else type(error).__name__
        return ConfigError(
            f"config.reward.weights: the {self.kind} {self.name} cannot use {path} ({first[:300]})"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # names that no file system takes
        return False
