"""`shardtune download`: fetches what a run takes from the hub, pinned to commits, for nodes that are offline."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.help_text import show_help
from launch.config.user_files import YAML_SUFFIXES
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    read_arguments,
)
from strategies import exit_codes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.download.pieces import FetchedAsset, HubAsset


@dataclass(kw_only=True)
class DownloadArguments(VerbArguments):
    """What `shardtune download` takes."""

    to: Path = option(
        "a settings file with those commits, which every verb takes; pinned.json beside it lists each fetched file with its "
        "size and SHA-256",
        default=Path("pinned.yaml"),
    )
    settings: list[str] = forwarded_settings()
    dry_run: bool = flag("show what would be fetched, and how much of it is here already")
    verify: bool = flag(
        "read all files again, offline, and compare them with the list; exit code 69 if one is missing or differs"
    )
    as_json: bool = flag("print the answer as JSON, for a script", key="--json")


USAGE = f"""usage: shardtune download <settings of a run> [to=pinned.yaml] [--dry-run] [--json]
       shardtune download --verify <pinned.yaml> [--json]

  shardtune download model.path=HuggingFaceTB/SmolLM2-135M data.path=hub:org/questions to=smollm2.yaml
  shardtune train smollm2.yaml tuning=lora budget.epochs=3          on a node without a network

download fetches the model, the tokenizer and the data sets (hub:<name>) of a run into the hub's own cache (HF_HOME).
Each is pinned to the commit that its branch or tag points to now (model.revision, data.sources.<name>.revision). A run
itself does not contact the hub. It takes what is in the cache.

{help_rows(DownloadArguments)}"""


def main(argv: list[str]) -> int:
    """Run `shardtune download` with the arguments typed after it; returns the exit code.

    Errors: ConfigError, DataError, StorageError.
    """
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else exit_codes.WRONG_SETTING
    arguments, problems = read_arguments("download", DownloadArguments, argv)
    if arguments.to.suffix not in YAML_SUFFIXES:
        problems.append(f"to={arguments.to}: is a file of settings; give it a name that ends in .yaml")
    if problems:
        raise ConfigError(problems)
    if arguments.verify:
        return _verify(arguments.settings, arguments.as_json)
    return _download(arguments.settings, arguments.to, dry_run=arguments.dry_run, as_json=arguments.as_json)


def _download(arguments: list[str], settings_path: Path, *, dry_run: bool, as_json: bool) -> int:
    """Fetch what a run with these settings takes from the hub, pinned to commits, so that it can train without a network.

    Writes the settings file `settings_path`, which names the commits, and beside it a manifest of the fetched files. An
    asset is a model or data set of the hub. With `dry_run`, only prints what would be fetched. Returns the exit code.
    """
    from launch.config.compose import compose_config
    from launch.download.pieces import check_free_space, fetch_asset, hub_assets, with_commit_and_size

    config = compose_config(arguments, check=False).config
    assets = [with_commit_and_size(asset) for asset in hub_assets(config)]
    if dry_run:
        _print_plan(assets, as_json=as_json)
        return 0
    # Checked first, because a disk that fills up after an hour would leave half a model.
    check_free_space(sum(asset.missing_bytes for asset in assets))
    fetched_assets = []
    for asset in assets:
        print(_asset_line(asset), file=sys.stderr, flush=True)
        fetched_assets.append(fetch_asset(asset))
    manifest_path = _write_pinned_files(settings_path, fetched_assets)
    _print_fetched(fetched_assets, settings_path, manifest_path, as_json=as_json)
    return 0


def _print_plan(assets: list[HubAsset], *, as_json: bool) -> None:
    """Print the models and data sets that would be fetched, and how many bytes are missing on this disk (`--dry-run`)."""
    missing_bytes = sum(asset.missing_bytes for asset in assets)
    if as_json:
        entries = [asset.manifest_entry() for asset in assets]
        print(json.dumps({"pieces": entries, "lacking_bytes": missing_bytes}))
    else:
        print("\n".join([*map(_asset_line, assets), f"to fetch: {_size_text(missing_bytes)}"]))


def _print_fetched(
    fetched_assets: list[FetchedAsset], settings_path: Path, manifest_path: Path, *, as_json: bool
) -> None:
    """Print what was fetched, and where the settings file with the pinned commits and the manifest are."""
    if as_json:
        paths = {"settings": str(settings_path), "manifest": str(manifest_path)}
        print(json.dumps({**paths, **_manifest_contents(fetched_assets)}))
        return
    for fetched in fetched_assets:
        total_bytes = sum(file["bytes"] for file in fetched.files)
        print(f"{fetched.asset.key}: {len(fetched.files)} files, {_size_text(total_bytes)}, in {fetched.directory}")
    print(f"settings: {settings_path}  (shardtune train {settings_path} ...)\nmanifest: {manifest_path}")


def _asset_line(asset: HubAsset) -> str:
    """A line about a model or data set: its commit, its size, and how much of it is not in the cache yet."""
    size = _size_text(asset.total_bytes) if asset.total_bytes else "a size that the server does not give"
    to_fetch = f"{_size_text(asset.missing_bytes)} to fetch" if asset.missing_bytes else "all of it is here"
    return f"{asset.key}: {asset.kind} {asset.hub_id} at {asset.commit[:12]}: {size}, {to_fetch}"


def _size_text(size_bytes: int) -> str:
    """A size with its unit, such as `1.07 GiB`."""
    for unit, unit_bytes in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.3g} {unit}"
    return f"{size_bytes} bytes"


def _manifest_contents(fetched_assets: list[FetchedAsset]) -> dict[str, Any]:
    """The contents of the manifest: each fetched model and data set, its directory, and its files with sizes and hashes."""
    entries = []
    for fetched in fetched_assets:
        entries.append({**fetched.asset.manifest_entry(), "directory": str(fetched.directory), "files": fetched.files})
    return {"pieces": entries}


def _write_pinned_files(settings_path: Path, fetched_assets: list[FetchedAsset]) -> Path:
    """Write the settings file that names the fetched commits, and the manifest of their files beside it.

    Returns the manifest's path. Raises StorageError if they cannot be written.
    """
    import yaml

    from strategies.errors import StorageError

    settings: dict[str, Any] = {}
    for fetched in fetched_assets:
        for key_path, value in fetched.asset.pinned_settings():  # such as ("model", "revision"), "1a2b3c"
            block = settings
            for name in key_path[:-1]:
                block = block.setdefault(name, {})
            block[key_path[-1]] = value
    manifest_path = settings_path.with_suffix(".json")
    head = f"# Pinned by `shardtune download`; {manifest_path.name} has the files. Every verb takes this file as an argument.\n"
    try:
        settings_path.parent.mkdir(parents=True, exist_ok=True)
        manifest_path.write_text(json.dumps(_manifest_contents(fetched_assets), indent=1) + "\n", encoding="utf-8")
        settings_path.write_text(head + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"to={settings_path}: cannot be written ({error.strerror}); the files were fetched"
        ) from error
    return manifest_path


def _verify(arguments: list[str], as_json: bool) -> int:
    """Check that all fetched files are still as they were fetched (`--verify`); returns the exit code, `CHECK_FAILED` if not.

    `arguments`: the path of one settings file that download wrote. The manifest, beside it with the suffix .json, is
    {"pieces": [{"key": ..., "directory": ..., "files": [{"path": ..., "bytes": ..., "sha256": ...}]}]}. Raises ConfigError.
    """
    from launch.download.pieces import file_damage

    if len(arguments) != 1:
        raise ConfigError(f"--verify: name one file, not {len(arguments)}: shardtune download --verify pinned.yaml")
    manifest_path = Path(arguments[0]).expanduser().with_suffix(".json")
    file_count = 0
    damaged = []
    try:
        for piece in json.loads(manifest_path.read_text(encoding="utf-8"))["pieces"]:
            for file in piece["files"]:
                file_count += 1
                damage = file_damage(Path(piece["directory"]), file)
                if damage:
                    damaged.append(f"{piece['key']}: {damage}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{manifest_path}: is no list that download wrote ({type(error).__name__}: {error})"
        ) from error
    if as_json:
        print(json.dumps({"files": file_count, "damaged": damaged}))
    else:
        verdict = f"{len(damaged)} missing or not as fetched" if damaged else "as fetched"
        print("\n".join([*damaged, f"{file_count} files: {verdict}"]))
    return exit_codes.CHECK_FAILED if damaged else 0
