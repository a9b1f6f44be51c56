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
class HubAsset:
    """A model, tokenizer or data set of the hub that a run takes."""

    key: str
    """The setting that names it, such as `model.path`."""
    kind: str
    """`model` (also of a tokenizer) or `dataset`, as the hub calls them."""
    hub_id: str
    """Such as `org/name`."""
    revision: str | None
    """The branch, tag or commit that was typed."""
    subset: str | None = None
    split: str | None = None
    commit: str = ""
    """The commit to which the revision points; empty before `with_commit_and_size`."""
    total_bytes: int = 0
    """Size of what a run takes of it; 0 if the hub does not say before it is fetched."""
    missing_bytes: int = 0
    """Bytes of it that are not in the cache."""

    def manifest_entry(self) -> dict[str, Any]:
        """The entry of this asset in the manifest, without its files: which setting names it, and which commit was taken."""
        return {
            "key": self.key,
            "kind": self.kind,
            "name": self.hub_id,
            "asked": self.revision,
            "commit": self.commit,
        }

    def pinned_settings(self) -> list[tuple[tuple[str, ...], Any]]:
        """The settings with which a run takes this very commit, as (key split at its dots, value).

        Such as (("model", "revision"), "1a2b3c"). A data set named by `data.path` becomes a source of its own,
        `data.sources.<name>`, because only a source can have a revision.
        """
        if self.kind == "model":
            return [(tuple(self.key.split(".")), self.hub_id), (("model", "revision"), self.commit)]
        if ".sources." in self.key:
            source_key = tuple(self.key.split(".")[:-1])  # data.sources.NAME, without `.path`
        else:
            source_key = ("data", "sources", _source_name(self.hub_id))
        values = {"path": f"hub:{self.hub_id}", "subset": self.subset, "split": self.split, "revision": self.commit}
        return [((*source_key, name), value) for name, value in values.items() if value is not None]


@dataclass(frozen=True, slots=True)
class FetchedAsset:
    """A model or data set of the hub that is in the cache now."""

    asset: HubAsset
    directory: Path
    files: list[dict[str, Any]]
    """Entries of the manifest: `path` in the directory, `bytes` and `sha256` of each file."""


def hub_assets(config: RunConfig) -> list[HubAsset]:
    """Find the models and data sets that a run would take from the hub, by the hub ids in its configuration.

    They are not resolved to commits yet. Raises ConfigError if there are none, or if one cannot be pinned to a commit.
    """
    assets = [*_model_assets(config), *_training_data_assets(config)]
    problems = _pinning_problems(config, assets)
    if not assets and not problems:
        problems.append(
            "nothing here is named by a hub id: give model.path=<organisation>/<name> or data.path=hub:<name>; "
            "files and directories are taken where they lie"
        )
    if problems:
        raise ConfigError(problems)
    return assets


def _pinning_problems(config: RunConfig, assets: list[HubAsset]) -> list[str]:
    """Say what cannot be pinned to a commit: evaluation and test data, and two repositories under one revision."""
    from trainer.data.read.paths import is_hub_path

    problems = []
    for split in ("eval_path", "test_path"):
        paths = getattr(config.data, split)
        for path in _as_paths([*paths.values()] if isinstance(paths, dict) else paths):
            if is_hub_path(path):
                problems.append(
                    f"data.{split}={path}: only training data can be pinned to a commit; hold a share out of it "
                    f"(data.{split.removesuffix('_path')}_share=0.05), or give files"
                )
    # model.revision is one setting: it cannot be the commit of two repositories.
    model_ids = {asset.hub_id for asset in assets if asset.kind == "model"}
    if config.model.tokenizer and len(model_ids) > 1 and config.model.revision:
        problems.append(
            f"model.revision={config.model.revision}: is asked of model.path and of model.tokenizer={config.model.tokenizer}; "
            "give the tokenizer as a directory"
        )
    return problems


def _model_assets(config: RunConfig) -> list[HubAsset]:
    """The model and the tokenizer, unless they are directories on this machine."""
    assets = []
    for key in ("path", "tokenizer"):
        name = getattr(config.model, key)
        if name and not Path(name).expanduser().exists():
            assets.append(HubAsset(f"model.{key}", kind="model", hub_id=name, revision=config.model.revision))
    return assets


def _training_data_assets(config: RunConfig) -> list[HubAsset]:
    """The hub data sets that are training data: those in `data.sources` and `data.path`.

    Raises ConfigError for a `hub:` without a name.
    """
    from trainer.data.read.paths import is_hub_path, parse_hub_name

    assets = []
    for source_name, source in config.data.sources.items():
        key = f"data.sources.{source_name}.path"
        for path in _as_paths(source.path):
            if is_hub_path(path):
                hub_id = parse_hub_name(path, key)
                assets.append(
                    HubAsset(
                        key,
                        kind="dataset",
                        hub_id=hub_id,
                        revision=source.revision,
                        subset=source.subset,
                        split=source.split,
                    )
                )
    for path in _as_paths(config.data.path):
        if is_hub_path(path):
            hub_id = parse_hub_name(path, "data.path")
            assets.append(HubAsset("data.path", kind="dataset", hub_id=hub_id, revision=None))
    return assets


def _as_paths(path_or_list: Any) -> list[str]:
    """The paths in a setting that takes one path or a list; empty for None."""
    paths = path_or_list if isinstance(path_or_list, list | tuple) else [path_or_list]
    return [str(path) for path in paths if path is not None]


def _source_name(dataset: str) -> str:
    """A data set's name as a key of `data.sources`: `org/My-Data` becomes `my_data`."""
    name = dataset.rpartition("/")[2]
    return "".join(character if character.isalnum() else "_" for character in name).strip("_").lower()


def with_commit_and_size(asset: HubAsset) -> HubAsset:
    """Ask the hub for the commit to which an asset's revision points now, and how large a model is; returns the asset with both.

    `total_bytes` is of all files, `missing_bytes` of those that the cache lacks. A data set gets no sizes, since its loader
    decides what is read. Raises ConfigError if the hub does not give the asset.
    """
    from huggingface_hub import HfApi, snapshot_download

    from trainer.model.loading import HUB_PATTERNS

    try:
        commit = HfApi().repo_info(asset.hub_id, repo_type=asset.kind, revision=asset.revision).sha
        if commit is None:
            raise ValueError("the hub names no commit")
        if asset.kind == "dataset":  # its loader decides which of its files are read
            return replace(asset, commit=commit)
        # Only lists the files, with their sizes and whether the cache lacks them.
        files = snapshot_download(asset.hub_id, revision=commit, allow_patterns=[*HUB_PATTERNS], dry_run=True)
    except Exception as error:  # the hub client has a dozen error types; all mean that it is not to be had
        raise _not_available_error(asset, error) from error
    total_bytes = sum(file.file_size or 0 for file in files)
    missing_bytes = sum(file.file_size or 0 for file in files if file.will_download)
    return replace(asset, commit=commit, total_bytes=total_bytes, missing_bytes=missing_bytes)


def _not_available_error(asset: HubAsset, error: Exception) -> ConfigError:
    """The error for an asset that the hub does not give, with the first line of the client's message and what to check."""
    revision = f" (revision {asset.revision})" if asset.revision else ""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return ConfigError(
        f"{asset.key}={asset.hub_id}{revision}: cannot be had from the hub ({reason[:200]}); check the name, whether "
        "this machine reaches it (HF_ENDPOINT, HF_HUB_OFFLINE), and for a gated or private one the token (HF_TOKEN)"
    )


def check_free_space(missing_bytes: int) -> None:
    """Raise StorageError if the disk of the hub's cache has no room for the `missing_bytes` that are to be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    directory = Path(HF_HUB_CACHE)
    while not directory.exists():  # before the first download: its disk is that of a parent directory
        directory = directory.parent
    free_bytes = shutil.disk_usage(directory).free
    if missing_bytes > free_bytes:
        raise StorageError(
            f"HF_HOME: {missing_bytes / GIB:.1f} GiB are to be fetched into {HF_HUB_CACHE}, where {free_bytes / GIB:.1f} GiB are "
            "free; set HF_HOME to a larger disk"
        )


def fetch_asset(asset: HubAsset) -> FetchedAsset:
    """Fetch a model or data set at its commit into the hub's cache; returns its files there with their sizes and hashes.

    Raises ConfigError, DataError.
    """
    from huggingface_hub import snapshot_download

    from trainer.model.loading import HUB_PATTERNS

    if asset.kind == "model":
        try:
            directory = Path(snapshot_download(asset.hub_id, revision=asset.commit, allow_patterns=[*HUB_PATTERNS]))
        except Exception as error:
            raise _not_available_error(asset, error) from error
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
    else:
        # Through the reader that training uses, so that the very files are fetched that a run will open.
        from trainer.data.read.origin import Origin

        # Loading the split downloads it.
        origin = Origin(asset.key, [Path(f"hub:{asset.hub_id}")], asset.subset, asset.split, asset.commit)
        cache_files = origin.load_hub_split(Path(f"hub:{asset.hub_id}")).cache_files
        paths = [Path(cache_file["filename"]) for cache_file in cache_files]
        directory = paths[0].parent if paths else Path()
    files: list[dict[str, Any]] = []
    for path in paths:
        relative_path = str(path.relative_to(directory))
        files.append({"path": relative_path, "bytes": path.stat().st_size, "sha256": _sha256(path)})
    return FetchedAsset(asset, directory, files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_damage(directory: Path, file: dict[str, Any]) -> str | None:
    """Compare a fetched file with its entry in the manifest, {"path": ..., "bytes": ..., "sha256": ...}, and say what is wrong.

    None if it is as it was fetched.
    """
    path = directory / file["path"]
    if not path.is_file():
        return f"{path}: is missing"
    size_bytes = path.stat().st_size
    if size_bytes != file["bytes"]:
        return f"{path}: has {size_bytes:,} bytes, not {file['bytes']:,}"
    if _sha256(path) != file["sha256"]:
        return f"{path}: its SHA-256 is not that of what was fetched"
    return None
