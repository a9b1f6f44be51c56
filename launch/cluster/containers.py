"""Commands of ranks that run in an image: srun's options for pyxis, or a prefix for apptainer. Needs no torch.

The job script itself stays on the host: it asks SLURM and requeues the job. Directories that a run reads or writes
are mounted under the same paths.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.config import trusted_values
from strategies.errors import ConfigError

INSIDE = "SHARDTUNE_INSIDE"
"""Set for what runs in a container: `launcher.setup` is for it, and the site's environment for the host."""
MAGIC = set("*?[")
PATIENCE_S = 10.0


def way_of(launcher: Mapping[str, Any]) -> str | None:
    """`pyxis` or `apptainer`; None without a container."""
    image = launcher.get("container")
    if not image:
        return None
    chosen = str(launcher.get("container_by", "auto"))
    if chosen != "auto":
        return chosen
    local = str(image).endswith((".sif", ".img")) or Path(image).expanduser().is_dir()
    return "apptainer" if local or "://" in str(image) else "pyxis"


def words(tree: Mapping[str, Any], places: list[Path]) -> tuple[list[str], list[str]]:
    """(options of srun, what stands before the command) of a run whose configuration, as plain values, is `tree`.

    `places` are mounted beside what the run reads. Raises ConfigError for paths that the options cannot carry.
    """
    launcher = tree["launcher"]
    way, image = way_of(launcher), str(launcher.get("container"))
    if way is None:
        return [], []
    mounts = mounts_of(tree, places)
    workdir = launcher.get("container_workdir") or str(Path.cwd())
    if way == "pyxis":
        options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, f"--container-workdir={workdir}", "--no-container-mount-home"], []
    binds = [part for mount in mounts for part in ("--bind", mount)]
    return [], ["apptainer", "exec", "--nv", *binds, "--pwd", workdir, os.path.expanduser(image)]  # noqa: PTH111


def mounts_of(tree: Mapping[str, Any], places: list[Path]) -> list[str]:
    """`source:target[:options]` of everything that the run needs, what lies in another one left out."""
    own = [str(mount) for mount in tree["launcher"].get("container_mounts") or ()]
    wanted = sorted(
        {path.expanduser().absolute() for path in [*places, *_named(tree)]}, key=lambda path: len(path.parts)
    )
    found: list[Path] = []
    for path in wanted:
        if not any(path.is_relative_to(other) for other in found):
            found.append(path)
    if odd := [str(path) for path in found if set(str(path)) & set(",:")]:
        raise ConfigError(
            f"launcher.container: {odd[0]}: mounts cannot carry `,` and `:` in a path; name it without, or through a link"
        )
    return [*(f"{path}:{path}" for path in found), *own]


def _named(tree: Mapping[str, Any]) -> Iterator[Path]:
    """What the settings name on this host's disks."""
    yield Path.cwd()
    yield Path(tree["data"]["cache_dir"])
    typed = trusted_values.directory()
    if (
        typed is not None and typed.is_dir()
    ):  # else the run's verbs would ask in the container for what was typed outside
        yield typed
    sources = [source.get("path") for source in (tree["data"].get("sources") or {}).values()]
    given = [tree["model"]["path"], tree["model"].get("tokenizer"), tree["data"].get("eval_path"), tree["data"]["path"]]
    for value in [*given, *sources]:
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str):
                continue
            path = Path(each).expanduser()
            while MAGIC & set(path.name):
                path = path.parent
            if path.exists():
                yield path if path.is_dir() else path.parent


def refuse_missing(launcher: Mapping[str, Any]) -> None:
    """Raise ConfigError where this host cannot start the container: no pyxis in its srun, no apptainer, no image."""
    way, image = way_of(launcher), str(launcher.get("container"))
    if way == "pyxis":
        try:
            known = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=PATIENCE_S).stdout
        except (OSError, subprocess.SubprocessError):
            return  # srun itself is missing, which its own error says
        if "--container-image" not in known:
            raise ConfigError(
                f"launcher.container={image}: srun here has no --container-image: the plugin pyxis is missing; ask the site, or "
                "use apptainer: launcher.container_by=apptainer"
            )
    elif way == "apptainer":
        host = os.uname().nodename
        if shutil.which("apptainer") is None:
            raise ConfigError(
                f"launcher.container={image}: no apptainer on {host}; load it in slurm/env.sh (module load apptainer), or use "
                "pyxis: launcher.container_by=pyxis"
            )
        if "://" not in image and not Path(image).expanduser().exists():
            raise ConfigError(f"launcher.container={image}: {host} does not see it; name an image on a shared disk")
