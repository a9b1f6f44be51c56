"""`shardtune export runs/x to=hub:<owner>/<name>`: pushes an export to the hub, as a private repository by default.

The folder is first written into the run directory, exactly as it is pushed. `--dry-run` and HF_HUB_OFFLINE=1 stop
there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.export.arguments import ExportArguments
from launch.output import TableColumn, TableRow, format_table
from strategies.errors import ConfigError, ShardtuneError

HUB_PREFIX = "hub:"


@dataclass(frozen=True, slots=True)
class HubTarget:
    """The repository that an export is pushed to, and the folder that is pushed."""

    name: str
    """`<owner>/<name>`."""
    private: bool
    """Whether the repository is created private."""
    folder: Path
    """The directory that is pushed, in the run directory."""
    is_dry_run: bool
    """Whether the folder is written but not pushed: with `--dry-run` or HF_HUB_OFFLINE."""
    existed_when_looked_up: bool = False
    """Whether the repository existed when the export began; False for a dry run, which does not look it up."""


def hub_target(arguments: ExportArguments) -> HubTarget | None:
    """Read which repository of the hub `to=hub:<owner>/<name>` names, and check it; None if `to` is a directory.

    Asks the hub whether the repository exists, unless offline or a dry run. Errors: ConfigError for a bad name, or a
    repository that could not be pushed to.
    """
    to = arguments.to or ""
    if not to.startswith(HUB_PREFIX):
        return None
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = to.removeprefix(HUB_PREFIX)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"to={to}: is no name of a repository ({str(error).splitlines()[0]})") from error
    if "/" not in name:
        raise ConfigError(f"to={to}: name the owner too, as to=hub:<owner>/{name}")
    folder = arguments.run / "hub" / name.replace("/", "--")
    is_private = arguments.hub_private
    if arguments.dry_run or _is_offline():  # then the hub is not asked anything
        return HubTarget(name, private=is_private, folder=folder, is_dry_run=True)
    existed = _check_repository(name, is_private)
    return HubTarget(name, private=is_private, folder=folder, is_dry_run=False, existed_when_looked_up=existed)


def parse_benchmark_data_sets(text: str) -> dict[str, str]:
    """Read which data sets of the hub stand behind evaluation tasks, for the model card.

    `text`: the value of `benchmarks=`, as YAML: "{facts: owner/name}" -> {"facts": "owner/name"}. Raises ConfigError for any
    other form.
    """
    import yaml

    try:
        data_set_by_task = yaml.safe_load(text)
    except yaml.YAMLError:
        data_set_by_task = None
    if not isinstance(data_set_by_task, dict) or not all(map(_is_benchmark_name, data_set_by_task.values())):
        raise ConfigError(
            f"benchmarks={text}: must be data sets of the hub by task, as benchmarks='{{facts: owner/name}}' or owner/name/task"
        )
    return {str(task): str(data_set) for task, data_set in data_set_by_task.items()}


def _is_benchmark_name(value: Any) -> bool:
    """Whether a value has the form of a data set of the hub, or of one of its tasks: owner/name, or owner/name/task."""
    return str(value).count("/") in (1, 2)


def _is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to use the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _check_repository(name: str, private: bool) -> bool:
    """Ask the hub, before anything is written, whether a repository could be pushed to; returns whether it exists.

    `private`: it must not be public. Raises ConfigError without a token, for a token that the hub refuses (`_hub_error`), or
    for a public repository if `private` is set; ShardtuneError if the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise ConfigError(
            f"to=hub:{name}: the hub needs a token; set HF_TOKEN, or run `hf auth login`. --dry-run writes the folder without one"
        )
    api = HfApi()
    try:
        repository = api.repo_info(name)
    except RepositoryNotFoundError:
        return False
    except Exception as error:  # the hub's client has errors of httpx beside its own
        raise _hub_error(name, api.endpoint, error) from error
    if private and repository.private is False:
        raise ConfigError(
            f"to=hub:{name}: is there already, and public; say hub.private=false to push to it, or name another repository"
        )
    return True


def _hub_error(name: str, endpoint: str, error: Exception) -> ShardtuneError:
    """Turn an error of the hub's client into one for the user: ConfigError if the token may not write, else ShardtuneError."""
    from huggingface_hub.errors import HfHubHTTPError

    reason = " ".join(str(error).split())[:200]
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return ConfigError(f"to=hub:{name}: the token may not write there ({reason}); give one that may (HF_TOKEN)")
    return ShardtuneError(
        f"to=hub:{name}: {endpoint} cannot be used ({type(error).__name__}: {reason}); try again, or with --dry-run, offline"
    )


def push_export_folder(target: HubTarget) -> str | None:
    """List the files of an export's folder, and push them to the hub unless it is a dry run (`--dry-run`, or HF_HUB_OFFLINE).

    Returns the address of the commit; None for a dry run. Raises ShardtuneError if the push fails, ConfigError if the token
    may not write.
    """
    files = sorted(path for path in target.folder.rglob("*") if path.is_file())
    bytes_by_name = {path.relative_to(target.folder).as_posix(): path.stat().st_size for path in files}
    # Shown before the push: what leaves this machine.
    rows = [TableRow((f"{num_bytes:,}", name)) for name, num_bytes in bytes_by_name.items()]
    print("\n".join(format_table((TableColumn(is_number=True), TableColumn()), rows, indent=2)))
    amount = f"{len(files)} files, {sum(bytes_by_name.values()):,} bytes"
    visibility = "private" if target.private else "public"
    if target.is_dry_run:
        change = "without --dry-run" if not _is_offline() else "with a network, without HF_HUB_OFFLINE"
        print(
            f"not pushed: {amount} would go to the {visibility} repository {target.name}; the same command {change} pushes them"
        )
        return None
    print(f"pushing {amount} to the {visibility} repository {target.name}", flush=True)
    commit_url = str(_push_folder(target))
    print(f"pushed: {commit_url}")
    return commit_url


def _push_folder(target: HubTarget) -> Any:
    """Create the repository if it does not exist, and upload the folder; returns the commit's address. Errors: ShardtuneError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if not target.existed_when_looked_up:
            # exist_ok=False: one that somebody has created since it was looked up may be public.
            api.create_repo(target.name, private=target.private, exist_ok=False)
        return api.upload_folder(
            repo_id=target.name, folder_path=target.folder, commit_message="Export by shardtune"
        ).commit_url
    except Exception as error:  # the hub's client has errors of httpx beside its own
        raise _hub_error(target.name, api.endpoint, error) from error
