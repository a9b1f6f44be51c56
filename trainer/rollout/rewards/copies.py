"""The reward files of a run, copied into its directory with what they import from beside, and run from there.

A run that is resumed next week must be scored by what scored it until then, whatever has become of the file. `rewards.json`
holds, for each reward, the copy that it is run from, and the digest of every copied file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from strategies.atomic_io import error_summary
from strategies.errors import ConfigError, StorageError
from trainer.objectives.reward_functions import parse_function_path, use_stand_ins

if TYPE_CHECKING:
    from trainer.objectives.rollouts import RewardEntry

COPIES_DIRECTORY = "rewards"
"""The directory with the copies below a run directory; also what `run.accept` calls changed reward files."""
MANIFEST_FILE = "rewards.json"


def reward_files(rewards: Mapping[str, RewardEntry]) -> dict[Path, list[Path]]:
    """Find the files that reward functions need, by the directory that they are imported from, in the order of the reward names.

    {Path("/home/me/rewards"): [Path("/home/me/rewards/maths.py"), Path("/home/me/rewards/units.py")]}: units.py is imported.

    Raises ConfigError for a file that cannot be read.
    """
    files_by_directory: dict[Path, list[Path]] = {}
    for name in sorted(rewards):
        setting = rewards[name].function
        if setting is None:
            continue
        file = parse_function_path(setting)[0].resolve()
        if not file.is_file():
            raise ConfigError(f"objective.rewards.{name}.function={setting}: there is no such file")
        files = files_by_directory.setdefault(file.parent, [])
        for needed in imported_files(file):  # the file itself among them
            if needed not in files:
                files.append(needed)
    return files_by_directory


def imported_files(file: Path) -> list[Path]:
    """Find a Python file and those beside it that it imports, directly or through others; of a package all its Python files."""
    visited: list[Path] = []
    to_visit = [file]
    while to_visit:
        current = to_visit.pop()
        if current in visited:
            continue
        visited.append(current)
        for module in _imported_modules(current):
            to_visit += _module_files(file.parent, module)
    return sorted(visited)


def _imported_modules(file: Path) -> Iterator[str]:
    """The top-level names of the modules that a Python file imports, found by parsing it; relative imports are left out."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError):  # the reward file itself is refused elsewhere
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _module_files(directory: Path, module: str) -> list[Path]:
    """The Python files of a module or package in a directory; [] if the directory does not have it."""
    if (directory / f"{module}.py").is_file():
        return [directory / f"{module}.py"]
    if (directory / module).is_dir():
        return sorted((directory / module).rglob("*.py"))
    return []


def reward_source_digests(rewards: Mapping[str, RewardEntry]) -> dict[str, str]:
    """Digest each file that reward functions need (SHA-256), by the path that its copy has: {"0/maths.py": "9f86d0..."}.

    So a run knows whether its rewards are still the same. Copies have numbers in place of directories, in the order in which the
    rewards name them. Raises ConfigError if a reward's file is missing, OSError if a file cannot be read.
    """
    digest_by_copy = {}
    for number, (directory, files) in enumerate(reward_files(rewards).items()):
        for file in files:
            digest_by_copy[f"{number}/{file.relative_to(directory)}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digest_by_copy


def code_digest(file: Path) -> str:
    """One SHA-256 of a reward file and of the files beside it that it imports, names included. Raises OSError."""
    digest = hashlib.sha256()
    for needed in imported_files(file):
        content = hashlib.sha256(needed.read_bytes()).hexdigest()
        digest.update(f"{needed.relative_to(file.parent)} {content}\n".encode())
    return digest.hexdigest()


def copy_rewards(rewards: Mapping[str, RewardEntry], run_dir: Path) -> None:
    """Copy the files of reward functions into a run directory, so that a resumed run is scored by what scored it before.

    Replaces earlier copies; does nothing without such functions. Raises ConfigError if something else would be replaced or a file
    is missing, StorageError if the copies cannot be written.
    """
    target = run_dir / COPIES_DIRECTORY
    files_by_directory = reward_files(rewards)
    if not files_by_directory:
        return
    _raise_if_copying_loses_files(target, files_by_directory.keys())
    try:
        _replace_copies(rewards, files_by_directory, target)
    except OSError as error:
        raise StorageError(
            f"{target}: reward files cannot be copied there ({error_summary(error)}); make room, or choose another run.dir"
        ) from error


def _replace_copies(
    rewards: Mapping[str, RewardEntry], files_by_directory: dict[Path, list[Path]], target: Path
) -> None:
    """Copy the files of `files_by_directory` (`reward_files`) into `target` and write its manifest. Raises OSError.

    `target` is replaced only once the new copies are complete. The order of the directories gives their numbers, here as in
    `reward_source_digests`.
    """
    draft = target.with_name(f"{COPIES_DIRECTORY}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    # Each source directory becomes a numbered one: /home/me/rewards/maths.py -> rewards/0/maths.py.
    number_by_directory = {directory: number for number, directory in enumerate(files_by_directory)}
    for directory, files in files_by_directory.items():
        for file in files:
            copy = draft / str(number_by_directory[directory]) / file.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    # The manifest: where each reward's function is in the copy, and the digests of all files.
    functions = {}
    for name, reward in rewards.items():
        if reward.function is not None:
            file, function = parse_function_path(reward.function)
            file = file.resolve()
            functions[name] = {"file": f"{number_by_directory[file.parent]}/{file.name}", "function": function}
    manifest = {"functions": functions, "sha256": reward_source_digests(rewards)}
    (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def _raise_if_copying_loses_files(copies_directory: Path, source_directories: Iterable[Path]) -> None:
    """Raise ConfigError if the copies would replace files that are not a run's copies.

    That is so if a source directory is below `copies_directory`, or if that exists without a manifest.
    """
    for directory in source_directories:
        if directory.is_relative_to(copies_directory.resolve()):
            raise ConfigError(
                f"objective.rewards: {directory} lies where the run keeps its copies of reward files, which are replaced; move "
                "the file to another directory, or choose another run.dir"
            )
    if copies_directory.exists() and read_manifest(copies_directory.parent) is None:
        raise ConfigError(
            f"{copies_directory}: is there, and has no {MANIFEST_FILE} of an earlier run; the run would replace it by its "
            "copies of reward files: move it away, or choose another run.dir"
        )


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """Read where a run's copies of reward functions are; None if it has none, or a manifest that cannot be read.

    {"functions": {"maths": {"file": "0/maths.py", "function": "score"}}, "sha256": {"0/maths.py": "9f86d0..."}}.
    """
    try:
        manifest = json.loads((run_dir / COPIES_DIRECTORY / MANIFEST_FILE).read_text(encoding="utf-8"))
        functions = {}
        for name, copy in manifest["functions"].items():
            functions[name] = {"file": str(copy["file"]), "function": str(copy["function"])}
        return {"functions": functions, "sha256": dict(manifest["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class FunctionLocation(NamedTuple):
    """Where a reward function is."""

    file: Path
    function: str
    """Its name in the file."""


def function_locations(rewards: Mapping[str, RewardEntry], run_dir: Path | None) -> dict[str, FunctionLocation]:
    """Find each reward function to run, by name of the reward: in the run's copy if there is one, else in the file itself.

    A run copies the files of its rewards into its directory when it starts, and says in a manifest which reward is where.
    """
    manifest = None if run_dir is None else read_manifest(run_dir)
    location_by_reward = {}
    for name, reward in rewards.items():
        if reward.function is None:
            continue
        copied_function = None if manifest is None else manifest["functions"].get(name)
        if copied_function is not None and run_dir is not None:
            copied_file = run_dir.resolve() / COPIES_DIRECTORY / copied_function["file"]
            location_by_reward[name] = FunctionLocation(copied_file, copied_function["function"])
        else:
            file, function = parse_function_path(reward.function)
            location_by_reward[name] = FunctionLocation(file.resolve(), function)
    return location_by_reward


def copies_of_missing_files(run_dir: Path, files: Iterable[Path]) -> dict[Path, Path]:
    """Find the run's copies of those reward files that do not exist any more: {file: copy}.

    A copy is found by the name of the file alone. Files that exist, that have no copy, or whose name two copies have are left
    out.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        return {}
    copies_by_name: dict[str, set[Path]] = {}
    for copy in manifest["functions"].values():
        path = run_dir.resolve() / COPIES_DIRECTORY / copy["file"]
        copies_by_name.setdefault(path.name, set()).add(path)
    copy_by_file = {}
    for file in files:
        copies = copies_by_name.get(file.name, set())
        if not file.exists() and len(copies) == 1:
            (copy_path,) = copies
            if copy_path.is_file():
                copy_by_file[file] = copy_path
    return copy_by_file


def use_copies_of_run(rewards: Mapping[str, RewardEntry], run_dir: Path) -> None:
    """From now on read the run's own copies in place of reward files that are missing, in this process (`use_stand_ins`)."""
    files = [parse_function_path(reward.function)[0] for reward in rewards.values() if reward.function is not None]
    use_stand_ins(copies_of_missing_files(run_dir, files))


def digests_of_reward_copies(run_dir: Path) -> dict[str, str]:
    """Digest the run's copies of reward files, by path: {"0/maths.py": "9f86d0..."}; {} without copies.

    Computed from the files (SHA-256), because copies may have been changed since the manifest was written: the copies are what is
    run. A missing copy has the digest "missing".
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        return {}
    digests = {}
    # Of the digests in the manifest only the names of the files are used.
    for name in sorted(manifest["sha256"]):
        file = run_dir / COPIES_DIRECTORY / name
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
    return digests


def renew_copies(rewards: Mapping[str, RewardEntry], run_dir: Path, *, has_progress: bool, accept: list[str]) -> None:
    """Copy the reward files of a run that is about to start into its directory, unless it must keep the copies that it has.

    - No reward is a function: nothing is done.
    - A file is missing of which there is a copy, and `run.accept` does not name rewards: the copies are kept.
    - There are no copies, the run has made no step, or `run.accept` names rewards: the files are copied.
    - A file cannot be read now: the copies are kept.
    - A file differs from its copy: ConfigError, since the same run would be scored by two functions.
    - No file differs: the files are copied again.

    `has_progress`: whether the run has made steps. `accept`: what `run.accept` names. Also raises StorageError if the copies
    cannot be written.
    """
    files = [parse_function_path(reward.function)[0] for reward in rewards.values() if reward.function is not None]
    if not files:
        return
    manifest = read_manifest(run_dir)
    accepts_new_rewards = COPIES_DIRECTORY in accept  # run.accept=[rewards]
    if manifest is not None and not accepts_new_rewards and copies_of_missing_files(run_dir, files):
        return
    if manifest is None or not has_progress or accepts_new_rewards:
        copy_rewards(rewards, run_dir)
        return
    try:
        current_digests = reward_source_digests(rewards)
    except (ConfigError, OSError):
        return
    digests_of_copies = digests_of_reward_copies(run_dir)
    changed_names = []
    for name in sorted(digests_of_copies.keys() | current_digests.keys()):
        if digests_of_copies.get(name) != current_digests.get(name):
            changed_names.append(name)
    if changed_names:
        changed_files = ", ".join(name.partition("/")[2] for name in changed_names)
        raise ConfigError(
            f"objective.rewards: {changed_files} differs from the copy in "
            f"{run_dir / COPIES_DIRECTORY} that scored this run until now; "
            "add run.accept=[rewards] to go on with the new one, or put the old one back"
        )
    # Copied again, though they are the same: only this replaces other files that somebody may have put there, which would be run.
    copy_rewards(rewards, run_dir)
