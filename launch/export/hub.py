"""`shardtune export runs/x to=hub:<owner>/<name>`: pushes an export to the hub, as a private repository by default.

The folder is first written into the run directory, exactly as it is pushed. `--dry-run` and HF_HUB_OFFLINE=1 stop
there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.export.words import ExportWords
from launch.output import Column, TableRow, table
from strategies.errors import ConfigError, ShardtuneError

PREFIX = "hub:"


@dataclass(frozen=True, slots=True)
class Target:
    """Where it is pushed to."""

    name: str
    private: bool
    folder: Path
    dry: bool
    exists: bool = False


def target(words: ExportWords) -> Target | None:
    """What `to=hub:` asks for, looked up at the hub unless it is a dry run; None for a directory. Raises ConfigError."""
    to = words.to or ""
    if not to.startswith(PREFIX):
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = to.removeprefix(PREFIX)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"to={to}: is no name of a repository ({str(error).splitlines()[0]})") from error
    if "/" not in name:
        raise ConfigError(f"to={to}: name the owner too, as to=hub:<owner>/{name}")
    folder = words.run / "hub" / name.replace("/", "--")
    if words.dry_run or _offline():
        return Target(name, words.hub_private, folder, True)
    return Target(name, words.hub_private, folder, False, _exists(name, words.hub_private))


def benchmarks_of(typed: str) -> dict[str, str]:
    """`{task: <owner>/<data set>[/<task there>]}`, what `benchmarks=` takes, by task. Raises ConfigError."""
    import yaml

    try:
        found = yaml.safe_load(typed)
        assert isinstance(found, dict) and all(str(value).count("/") in (1, 2) for value in found.values())
    except (yaml.YAMLError, AssertionError):
        raise ConfigError(
            f"benchmarks={typed}: must be data sets of the hub by task, as benchmarks='{{facts: owner/name}}' or owner/name/task"
        ) from None
    return {str(task): str(value) for task, value in found.items()}


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _exists(name: str, private: bool) -> bool:
    """Whether the repository is there. Raises before anything is written where it could not be pushed to."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise ConfigError(
            f"to=hub:{name}: the hub needs a token; set HF_TOKEN, or run `hf auth login`. --dry-run writes the folder without one"
        )
    api = HfApi()
    try:
        found = api.repo_info(name)
    except RepositoryNotFoundError:
        return False
    except Exception as error:  # the hub's client has errors of httpx beside its own
        raise _failed(name, api.endpoint, error) from error
    if private and found.private is False:
        raise ConfigError(
            f"to=hub:{name}: is there already, and public; say hub.private=false to push to it, or name another repository"
        )
    return True


def _failed(name: str, endpoint: str, error: Exception) -> ShardtuneError:
    from huggingface_hub.errors import HfHubHTTPError

    said = " ".join(str(error).split())[:200]
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return ConfigError(f"to=hub:{name}: the token may not write there ({said}); give one that may (HF_TOKEN)")
    return ShardtuneError(
        f"to=hub:{name}: {endpoint} cannot be used ({type(error).__name__}: {said}); try again, or with --dry-run, offline"
    )


def push(asked: Target) -> str | None:
    """List the folder, and push it unless it is a dry run; the commit's address. Raises ShardtuneError where the hub fails."""
    files = sorted(path for path in asked.folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(asked.folder).as_posix(): path.stat().st_size for path in files}
    rows = [TableRow((f"{size:,}", name)) for name, size in sizes.items()]
    print("\n".join(table((Column(is_number=True), Column()), rows, indent=2)))
    what = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
    kind = "private" if asked.private else "public"
    if asked.dry:
        again = "without --dry-run" if not _offline() else "with a network, without HF_HUB_OFFLINE"
        print(
            f"not pushed: {what} would go to the {kind} repository {asked.name}; the same command {again} pushes them"
        )
        return None
    print(f"pushing {what} to the {kind} repository {asked.name}", flush=True)
    address = str(_pushed(asked))
    print(f"pushed: {address}")
    return address


def _pushed(asked: Target) -> Any:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if not asked.exists:
            api.create_repo(asked.name, private=asked.private, exist_ok=False)
        return api.upload_folder(
            repo_id=asked.name, folder_path=asked.folder, commit_message="Export by shardtune"
        ).commit_url
    except Exception as error:  # the hub's client has errors of httpx beside its own
        raise _failed(asked.name, api.endpoint, error) from error
