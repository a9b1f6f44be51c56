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

INSIDE_CONTAINER = "SHARDTUNE_INSIDE"
"""Set for what runs in a container: `launcher.setup` is for it, and the site's environment for the host."""
GLOB_CHARACTERS = set("*?[")
SRUN_TIMEOUT_S = 10.0


def runtime_of(launcher: Mapping[str, Any]) -> str | None:
    """What starts the container of `launcher.*` settings: `pyxis` or `apptainer`; None without a container.

    It is `launcher.container_by` if that is set. Else the image decides: a file "image.sif", a directory or "docker://ubuntu" is
    apptainer's, and "ubuntu", an image of a registry, is pyxis'.
    """
    image = launcher.get("container")
    if not image:
        return None
    requested = str(launcher.get("container_by", "auto"))
    if requested != "auto":
        return requested
    is_local = str(image).endswith((".sif", ".img")) or Path(image).expanduser().is_dir()
    return "apptainer" if is_local or "://" in str(image) else "pyxis"


def srun_options_and_prefix(tree: Mapping[str, Any], directories: list[Path]) -> tuple[list[str], list[str]]:
    """How ranks start in the container of a run: (options of srun, beginning of the command line before the rank's command).

    - pyxis: (["--container-image=...", ...], []);
    - apptainer: ([], ["apptainer", "exec", ..., image]);
    - no container: ([], []).
    `tree`: the run's configuration as nested dictionaries. `directories`: mounted beside what the run reads.
    Errors: ConfigError for paths that the options cannot carry.
    """
    launcher = tree["launcher"]
    runtime = runtime_of(launcher)
    if runtime is None:
        return [], []
    image = str(launcher.get("container"))
    mounts = mount_options(tree, directories)
    workdir = launcher.get("container_workdir") or str(Path.cwd())
    if runtime == "pyxis":
        srun_options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        srun_options += [f"--container-workdir={workdir}", "--no-container-mount-home"]
        return srun_options, []
    bind_options = []
    for mount in mounts:
        bind_options += ["--bind", mount]
    image = os.path.expanduser(image)  # noqa: PTH111 - a Path would change `docker://`
    return [], ["apptainer", "exec", "--nv", *bind_options, "--pwd", workdir, image]


def mount_options(tree: Mapping[str, Any], directories: list[Path]) -> list[str]:
    """The mounts of every directory that a run needs in its container, at the same path inside: "/data:/data".

    Those of `launcher.container_mounts` follow as they are: `source:target[:options]`. Parameters and errors as for
    `srun_options_and_prefix`.
    """
    paths = {path.expanduser().absolute() for path in [*directories, *_paths_of_settings(tree)]}
    # Outer directories first: one below another needs no mount of its own.
    mounted: list[Path] = []
    for path in sorted(paths, key=lambda path: len(path.parts)):
        if not any(path.is_relative_to(outer) for outer in mounted):
            mounted.append(path)
    for path in mounted:
        if set(str(path)) & set(",:"):
            raise ConfigError(
                f"launcher.container: {path}: mounts cannot carry `,` and `:` in a path; name it without, or through a link"
            )
    extra_mounts = [str(mount) for mount in tree["launcher"].get("container_mounts") or ()]
    return [*(f"{path}:{path}" for path in mounted), *extra_mounts]


def _paths_of_settings(tree: Mapping[str, Any]) -> Iterator[Path]:
    """The directories on this host that a run's settings name, or that hold a file they name; some may not exist.

    "data/a.jsonl" and "data/*.jsonl" -> data. A hub id or a URL yields none, since there is no such path here.
    """
    yield Path.cwd()
    data = tree["data"]
    yield Path(data["cache_dir"])
    # Without it the run's verbs would ask in the container about settings that were trusted outside.
    trusted_directory = trusted_values.state_directory()
    if trusted_directory is not None and trusted_directory.is_dir():
        yield trusted_directory
    settings = [tree["model"]["path"], tree["model"].get("tokenizer"), data.get("eval_path"), data["path"]]
    settings += [source.get("path") for source in (data.get("sources") or {}).values()]
    for setting in settings:
        entries = setting if isinstance(setting, list) else [setting]
        for entry in entries:
            if not isinstance(entry, str):
                continue
            path = Path(entry).expanduser()
            # Upwards from a pattern to the directory that holds what it matches.
            while GLOB_CHARACTERS & set(path.name):
                path = path.parent
            if path.exists():
                yield path if path.is_dir() else path.parent


def refuse_missing(launcher: Mapping[str, Any]) -> None:
    """Refuse a container that this host cannot start: no pyxis in its srun, no apptainer, or no image. Errors: ConfigError."""
    runtime = runtime_of(launcher)
    image = str(launcher.get("container"))
    if runtime == "pyxis":
        try:
            srun_help = subprocess.run(
                ["srun", "--help"], capture_output=True, text=True, timeout=SRUN_TIMEOUT_S
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return  # srun itself is missing, which its own error says
        if "--container-image" not in srun_help:
            raise ConfigError(
                f"launcher.container={image}: srun here has no --container-image: the plugin pyxis is missing; ask the site, or "
                "use apptainer: launcher.container_by=apptainer"
            )
    elif runtime == "apptainer":
        host = os.uname().nodename
        if shutil.which("apptainer") is None:
            raise ConfigError(
                f"launcher.container={image}: no apptainer on {host}; load it in slurm/env.sh (module load apptainer), or use "
                "pyxis: launcher.container_by=pyxis"
            )
        if "://" not in image and not Path(image).expanduser().exists():
            raise ConfigError(f"launcher.container={image}: {host} does not see it; name an image on a shared disk")
