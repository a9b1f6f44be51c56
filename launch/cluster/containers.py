"""Commands of ranks that run in an image: srun's options for pyxis, or a prefix for apptainer. Needs no torch.

The job script itself stays on the host: it asks SLURM and requeues the job. Directories that a run reads or writes
are mounted under the same paths.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launch.config import trusted_values
from strategies.errors import ConfigError

INSIDE_CONTAINER = "SHARDTUNE_INSIDE"
"""Set for what runs in a container: `launcher.setup` is for it, and the site's environment for the host."""
GLOB_CHARACTERS = set("*?[")
SRUN_TIMEOUT_S = 10.0


class ContainerCommand(NamedTuple):
    """How srun starts a command in the container of a run; both lists are empty for a run without one."""

    srun_options: list[str]
    """Options of srun for pyxis, such as "--container-image=ubuntu"; empty for apptainer."""
    prefix: list[str]
    """What stands before the command itself: ["apptainer", "exec", ..., image]; empty for pyxis."""


def container_runtime(launcher: Mapping[str, Any]) -> str | None:
    """The program that starts the container of a run: "pyxis" (a plugin of srun) or "apptainer"; None without a container.

    `launcher`: the section `launcher` of the run's configuration.

    - `launcher.container_by` decides if it is not `auto`.
    - A local image ("image.sif", "image.img" or a directory) and a URL ("docker://ubuntu") are started by apptainer.
    - Any other image ("ubuntu", from a registry) is started by pyxis.
    """
    image = launcher.get("container")
    if not image:
        return None
    runtime = str(launcher.get("container_by", "auto"))
    if runtime != "auto":
        return runtime
    is_local = str(image).endswith((".sif", ".img")) or Path(image).expanduser().is_dir()
    return "apptainer" if is_local or "://" in str(image) else "pyxis"


def container_command(settings: Mapping[str, Any], directories: list[Path]) -> ContainerCommand:
    """How srun starts ranks in the container of a run: options of srun, or a prefix of the command; both empty without one.

    `settings`: the run's configuration as nested dictionaries.
    `directories`: mounted beside the paths that the settings name.
    Raises ConfigError if a path that must be mounted has "," or ":" in it.
    """
    launcher = settings["launcher"]
    runtime = container_runtime(launcher)
    if runtime is None:
        return ContainerCommand(srun_options=[], prefix=[])
    image = str(launcher.get("container"))
    mounts = _container_mounts(settings, directories)
    workdir = launcher.get("container_workdir") or str(Path.cwd())
    if runtime == "pyxis":
        srun_options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        srun_options += [f"--container-workdir={workdir}", "--no-container-mount-home"]
        return ContainerCommand(srun_options, prefix=[])
    bind_options = []
    for mount in mounts:
        bind_options += ["--bind", mount]
    image = os.path.expanduser(image)  # noqa: PTH111 - a Path would change `docker://`
    prefix = ["apptainer", "exec", "--nv", *bind_options, "--pwd", workdir, image]
    return ContainerCommand(srun_options=[], prefix=prefix)


def _container_mounts(settings: Mapping[str, Any], directories: list[Path]) -> list[str]:
    """The mounts for every directory that a run needs in its container, each at the same path inside: "/data:/data".

    The user's own, in `launcher.container_mounts`, follow as they are: "source:target" or "source:target:options". `settings`:
    the run's configuration as nested dictionaries; the directories of its model, data and caches are mounted. `directories`:
    mounted too. Raises ConfigError if a path has "," or ":" in it, since these separate mounts and their parts.
    """
    paths = {path.expanduser().absolute() for path in [*directories, *_directories_of_settings(settings)]}
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
    user_mounts = [str(mount) for mount in settings["launcher"].get("container_mounts") or ()]
    return [*(f"{path}:{path}" for path in mounted), *user_mounts]


def _directories_of_settings(settings: Mapping[str, Any]) -> Iterator[Path]:
    """The directories on this host that a run needs in its container, by its settings; the first two may not exist.

    - the current directory, and the cache of prepared data;
    - the directory in which the user's trust in settings is recorded, if there is one;
    - of the model, the tokenizer and each data path, as far as they are on this host.
    """
    yield Path.cwd()
    data = settings["data"]
    yield Path(data["cache_dir"])
    # Without it the run's verbs would ask in the container about settings that were trusted outside.
    trusted_directory = trusted_values.trusted_values_directory()
    if trusted_directory is not None and trusted_directory.is_dir():
        yield trusted_directory
    path_settings = [settings["model"]["path"], settings["model"].get("tokenizer"), data.get("eval_path"), data["path"]]
    path_settings += [source.get("path") for source in (data.get("sources") or {}).values()]
    for path_setting in path_settings:
        path_texts = path_setting if isinstance(path_setting, list) else [path_setting]
        for path_text in path_texts:
            if isinstance(path_text, str):
                yield from _directory_to_mount(path_text)


def _directory_to_mount(path_text: str) -> Iterator[Path]:
    """The directory that a container needs to see a path of the settings: the path itself, or the directory of the file.

    "data/a.jsonl" and the pattern "data/*.jsonl" give "data". A hub id or a URL gives nothing, since there is no such path here.
    """
    path = Path(path_text).expanduser()
    # Upwards from a pattern to the directory that holds what it matches.
    while GLOB_CHARACTERS & set(path.name):
        path = path.parent
    if path.exists():
        yield path if path.is_dir() else path.parent


def refuse_unavailable_container(launcher: Mapping[str, Any]) -> None:
    """Raise ConfigError if this host cannot start the container of a run.

    `launcher`: the section `launcher` of the run's configuration.

    - pyxis: its srun has no option `--container-image`. If there is no srun at all, nothing is raised: its own error says so.
    - apptainer: there is no program `apptainer`, or no file or directory with the image.
    """
    runtime = container_runtime(launcher)
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
