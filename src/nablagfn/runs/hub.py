"""Files on the Hugging Face hub: pinned revision, SHA-256, downloaded once per machine."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ..config import ConfigError

CHUNK = 1 << 24  # bytes read at a time


@dataclass(frozen=True)
class HubFile:
    """One file of a hub repository at a commit. sha256: of its bytes; empty: the commit alone pins.

    kind: "model" or "dataset".
    """

    repo: str
    revision: str
    name: str
    sha256: str = ""
    kind: str = "model"


def hub_answers() -> bool:
    """One short request, without the hub client's half-minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer, if not a kind one
    except OSError:
        return False
    return True


def in_cache(file: HubFile) -> Path | None:
    """Return where the hub's cache on this machine has the file, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        file.repo, file.name, revision=file.revision, repo_type=file.kind
    )
    return Path(found) if isinstance(found, str) else None


def fetch(file: HubFile) -> Path:
    """The file, from the cache or the hub. The first process of a machine downloads and checks it;
    the others wait for it.

    Raises ConfigError, one line without the key, when it cannot be had or its digest is wrong.
    """
    from huggingface_hub import constants

    locks = Path(constants.HF_HOME) / "nablagfn"
    stamp = locks / hashlib.sha256(repr(file).encode()).hexdigest()[:32]
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{stamp}.lock"):
            path = in_cache(file) or _download(file)
            _check(file, path, stamp)
    except OSError as error:
        raise ConfigError(f"{file.repo}/{file.name} cannot be stored or read ({error})") from None
    return path


def _download(file: HubFile) -> Path:
    if not hub_answers():
        raise ConfigError(
            f"{file.repo}/{file.name} is not on this machine and the hub cannot be reached"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(
            hf_hub_download(file.repo, file.name, revision=file.revision, repo_type=file.kind)
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{file.repo}/{file.name} cannot be downloaded ({first})") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check(file: HubFile, path: Path, stamp: Path) -> None:
    """Compare the digest, once: the stamp remembers the file that was found right."""
    if not file.sha256:
        return
    status = path.stat()
    seen = json.dumps([str(path), status.st_size, status.st_mtime_ns, file.sha256])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == seen:
        return
    found = sha256_of(path)
    if found != file.sha256:
        raise ConfigError(
            f"{file.repo}/{file.name} at {path} has SHA-256 {found[:12]}…, not "
            f"{file.sha256[:12]}…: delete it, and it is downloaded anew"
        )
    stamp.write_text(seen, encoding="utf-8")
