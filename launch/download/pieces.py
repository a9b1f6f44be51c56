"""The models and data sets that a run takes from the hub: their commits, and their files with sizes and hashes."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from trainer.config.run import RunConfig

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Piece:
    """One model, tokenizer or data set of the hub."""

    key: str
    """The setting that names it."""
    kind: str
    """`model` or `dataset`."""
    name: str
    asked: str | None
    """Branch, tag or commit."""
    subset: str | None = None
    split: str | None = None
    commit: str = ""
    total_bytes: int = 0
    """Of what a run takes; 0 where that is not known before."""
    lacking_bytes: int = 0

    def about(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"key": self.key, "kind": self.kind, "name": self.name, "asked": self.asked, "commit": self.commit}

    def settings(self) -> list[tuple[tuple[str, ...], Any]]:
        """What a run must be told to take this commit: (place in the settings, value)."""
        if self.kind == "model":
            found: list[tuple[tuple[str, ...], Any]] = [(tuple(self.key.split(".")), self.name)]
            return [*found, (("model", "revision"), self.commit)]
        base = tuple(self.key.split(".")[:-1]) if ".sources." in self.key else ("data", "sources", _plain(self.name))
        told = {"path": f"hub:{self.name}", "subset": self.subset, "split": self.split, "revision": self.commit}
        return [((*base, key), value) for key, value in told.items() if value is not None]


@dataclass(frozen=True, slots=True)
class FetchedPiece:
    """A piece that is in the cache."""

    piece: Piece
    directory: Path
    files: list[dict[str, Any]]
    """`path` in the directory, `bytes` and `sha256` of each."""


def pieces_of(config: RunConfig) -> list[Piece]:
    """What the configuration names by hub ids. Raises ConfigError where that is nothing, or cannot be pinned."""
    from trainer.data.read.paths import check_name, is_hub

    model, data, problems = config.model, config.data, list[str]()
    found = [
        Piece(f"model.{key}", "model", value, model.revision)
        for key, value in (("path", model.path), ("tokenizer", model.tokenizer))
        if value and not Path(value).expanduser().exists()
    ]
    for name, source in data.sources.items():
        key = f"data.sources.{name}.path"
        for path in _paths(source.path):
            if is_hub(path):
                found.append(Piece(key, "dataset", check_name(path, key), source.revision, source.subset, source.split))
    for path in _paths(data.path):
        if is_hub(path):
            found.append(Piece("data.path", "dataset", check_name(path, "data.path"), None))
    for split in ("eval_path", "test_path"):
        values = getattr(data, split)
        for path in _paths([*values.values()] if isinstance(values, dict) else values):
            if is_hub(path):
                problems.append(
                    f"data.{split}={path}: only training data can be pinned to a commit; hold a share out of it "
                    f"(data.{split.removesuffix('_path')}_share=0.05), or give files"
                )
    if config.model.tokenizer and len({piece.name for piece in found if piece.kind == "model"}) > 1 and model.revision:
        problems.append(
            f"model.revision={model.revision}: is asked of model.path and of model.tokenizer={model.tokenizer}; give the "
            "tokenizer as a directory"
        )
    if not found and not problems:
        problems.append(
            "nothing here is named by a hub id: give model.path=<organisation>/<name> or data.path=hub:<name>; "
            "files and directories are taken where they lie"
        )
    if problems:
        raise ConfigError(problems)
    return found


def _paths(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list | tuple) else [value]) if one is not None]


def _plain(name: str) -> str:
    """A data set's name as that of a source."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.rpartition("/")[2]).strip("_").lower()


def resolve(piece: Piece) -> Piece:
    """The piece with the commit that it means now, and how much of it the cache lacks. Raises ConfigError."""
    from huggingface_hub import HfApi, snapshot_download

    from trainer.model.loading import WANTED

    try:
        commit = HfApi().repo_info(piece.name, repo_type=piece.kind, revision=piece.asked).sha
        if commit is None:
            raise ValueError("the hub names no commit")
        if piece.kind == "dataset":  # what of its files is read, its loader decides
            return replace(piece, commit=commit)
        files = snapshot_download(piece.name, revision=commit, allow_patterns=[*WANTED], dry_run=True)
    except Exception as error:  # the hub client has a dozen error types; all mean that it is not to be had
        raise _not_to_be_had(piece, error) from error
    lacking = sum(file.file_size or 0 for file in files if file.will_download)
    return replace(piece, commit=commit, total_bytes=sum(file.file_size or 0 for file in files), lacking_bytes=lacking)


def _not_to_be_had(piece: Piece, error: Exception) -> ConfigError:
    asked = f" (revision {piece.asked})" if piece.asked else ""
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
    return ConfigError(
        f"{piece.key}={piece.name}{asked}: cannot be had from the hub ({said}); check the name, whether this machine reaches "
        "it (HF_ENDPOINT, HF_HUB_OFFLINE), and for a gated or private one the token (HF_TOKEN)"
    )


def check_room(lacking: int) -> None:
    """Raise StorageError where the cache's disk has less free than what is to be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if lacking > free:
        raise StorageError(
            f"HF_HOME: {lacking / GIB:.1f} GiB are to be fetched into {HF_HUB_CACHE}, where {free / GIB:.1f} GiB are free; set "
            "HF_HOME to a larger disk"
        )


def fetch(piece: Piece) -> FetchedPiece:
    """Bring the piece into the cache; returns its files as they are there. Raises ConfigError, DataError."""
    from huggingface_hub import snapshot_download

    from trainer.model.loading import WANTED

    if piece.kind == "model":
        try:
            directory = Path(snapshot_download(piece.name, revision=piece.commit, allow_patterns=[*WANTED]))
        except Exception as error:
            raise _not_to_be_had(piece, error) from error
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
    else:
        from trainer.data.read.origin import Origin

        origin = Origin(piece.key, [Path(f"hub:{piece.name}")], piece.subset, piece.split, piece.commit)
        paths = [Path(each["filename"]) for each in origin.dataset(Path(f"hub:{piece.name}")).cache_files]
        directory = paths[0].parent if paths else Path()
    return FetchedPiece(
        piece,
        directory,
        [
            {"path": str(path.relative_to(directory)), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in paths
        ],
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(directory: Path, file: dict[str, Any]) -> str | None:
    """What is wrong with a file of the manifest; None where it is as it was fetched."""
    path = directory / file["path"]
    if not path.is_file():
        return f"{path}: is missing"
    if (size := path.stat().st_size) != file["bytes"]:
        return f"{path}: has {size:,} bytes, not {file['bytes']:,}"
    return None if _sha256(path) == file["sha256"] else f"{path}: its SHA-256 is not that of what was fetched"
