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
from typing import TYPE_CHECKING, Any

from strategies.atomic_io import error_summary
from strategies.errors import ConfigError, StorageError
from trainer.objectives.reward_functions import split_function, use_stand_ins

if TYPE_CHECKING:
    from trainer.objectives.rollouts import RewardEntry

DIRECTORY = "rewards"
MANIFEST = "rewards.json"


def reward_files(rewards: Mapping[str, RewardEntry]) -> dict[Path, list[Path]]:
    """The files that reward functions need, by the directory that they are imported from, in the order of the rewards' names.

    {Path("/home/me/rewards"): [Path("/home/me/rewards/maths.py"), Path("/home/me/rewards/units.py")]}: units.py is imported.

    Raises ConfigError for a file that cannot be read.
    """
    by_directory: dict[Path, list[Path]] = {}
    for name in sorted(rewards):
        setting = rewards[name].function
        if setting is None:
            continue
        file = split_function(setting)[0].resolve()
        if not file.is_file():
            raise ConfigError(f"objective.rewards.{name}.function={setting}: there is no such file")
        files = by_directory.setdefault(file.parent, [])
        for needed in imported_files(file):
            if needed not in files:
                files.append(needed)
    return by_directory


def imported_files(file: Path) -> list[Path]:
    """A Python file and those beside it that it imports, directly or through others; of a package all its Python files."""
    found: list[Path] = []
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.append(current)
        for module in _imported_modules(current):
            waiting += _files_of_module(file.parent, module)
    return sorted(found)


def _imported_modules(file: Path) -> Iterator[str]:
    """The top-level names of the modules that a Python file imports, found by parsing it; relative imports are left out."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError):  # the reward file itself is refused elsewhere
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def _files_of_module(directory: Path, module: str) -> list[Path]:
    """The files of a module that lies in a directory; none if it does not."""
    if (directory / f"{module}.py").is_file():
        return [directory / f"{module}.py"]
    if (directory / module).is_dir():
        return sorted((directory / module).rglob("*.py"))
    return []


def digests_of(rewards: Mapping[str, RewardEntry]) -> dict[str, str]:
    """SHA-256 of each file that reward functions need, by its path in the copy: {"0/maths.py": "9f86d0..."}.

    The number is that of the directory in `reward_files`. Raises ConfigError, OSError.
    """
    digests = {}
    for number, (directory, files) in enumerate(reward_files(rewards).items()):
        for file in files:
            digests[f"{number}/{file.relative_to(directory)}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digests


def code_digest(file: Path) -> str:
    """SHA-256 of a reward file and of what it imports from beside, names included. Raises OSError."""
    digest = hashlib.sha256()
    for needed in imported_files(file):
        content = hashlib.sha256(needed.read_bytes()).hexdigest()
        digest.update(f"{needed.relative_to(file.parent)} {content}\n".encode())
    return digest.hexdigest()


def copy_rewards(rewards: Mapping[str, RewardEntry], run_dir: Path) -> None:
    """Copy the files of reward functions into a run directory, in place of earlier copies. Raises ConfigError, StorageError."""
    target = run_dir / DIRECTORY
    by_directory = reward_files(rewards)
    if not by_directory:
        return
    _refuse_to_replace(target, by_directory)
    try:
        _replace_copies(rewards, by_directory, target)
    except OSError as error:
        raise StorageError(
            f"{target}: reward files cannot be copied there ({error_summary(error)}); make room, or choose another run.dir"
        ) from error


def _replace_copies(rewards: Mapping[str, RewardEntry], by_directory: dict[Path, list[Path]], target: Path) -> None:
    """Copy files (`reward_files`) into `target`, which appears whole or not at all. Raises OSError."""
    draft = target.with_name(f"{DIRECTORY}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    # Each source directory becomes a numbered one: /home/me/rewards/maths.py -> rewards/0/maths.py.
    numbers = {directory: number for number, directory in enumerate(by_directory)}
    for directory, files in by_directory.items():
        for file in files:
            copy = draft / str(numbers[directory]) / file.relative_to(directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    # The manifest: where each reward's function is in the copy, and the digests of all files.
    functions = {}
    for name, reward in rewards.items():
        if reward.function is not None:
            file, function = split_function(reward.function)
            file = file.resolve()
            functions[name] = {"file": f"{numbers[file.parent]}/{file.name}", "function": function}
    manifest = {"functions": functions, "sha256": digests_of(rewards)}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)


def _refuse_to_replace(target: Path, sources: Iterable[Path]) -> None:
    """Raise ConfigError if what lies where copies go is not a run's copies, or is what is to be copied (`sources`)."""
    for directory in sources:
        if directory.is_relative_to(target.resolve()):
            raise ConfigError(
                f"objective.rewards: {directory} lies where the run keeps its copies of reward files, which are replaced; move "
                "the file to another directory, or choose another run.dir"
            )
    if target.exists() and read_manifest(target.parent) is None:
        raise ConfigError(
            f"{target}: is there, and has no {MANIFEST} of an earlier run; the run would replace it by its copies of reward "
            "files: move it away, or choose another run.dir"
        )


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """What `copy_rewards` wrote; None if the run has no copies, or a file that says something else."""
    try:
        manifest = json.loads((run_dir / DIRECTORY / MANIFEST).read_text(encoding="utf-8"))
        functions = {}
        for name, copy in manifest["functions"].items():
            functions[name] = {"file": str(copy["file"]), "function": str(copy["function"])}
        return {"functions": functions, "sha256": dict(manifest["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def copied_functions(rewards: Mapping[str, RewardEntry], run_dir: Path | None) -> dict[str, tuple[Path, str]]:
    """(file, function) of each reward that is a function: the run's copy if there is one, else the file itself."""
    manifest = None if run_dir is None else read_manifest(run_dir)
    functions = {}
    for name, reward in rewards.items():
        if reward.function is None:
            continue
        copied = None if manifest is None else manifest["functions"].get(name)
        if copied is not None and run_dir is not None:
            functions[name] = (run_dir.resolve() / DIRECTORY / copied["file"], copied["function"])
        else:
            file, function = split_function(reward.function)
            functions[name] = (file.resolve(), function)
    return functions


def stand_ins(run_dir: Path, files: Iterable[Path]) -> dict[Path, Path]:
    """The run's copies of reward files that don't exist any more: {file: copy}. Files that exist or have no copy are left out.

    A file is found by its name alone. If a run has copies of two files with that name, neither is taken.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        return {}
    copies_by_name: dict[str, set[Path]] = {}
    for copy in manifest["functions"].values():
        path = run_dir.resolve() / DIRECTORY / copy["file"]
        copies_by_name.setdefault(path.name, set()).add(path)
    found = {}
    for file in files:
        copies = copies_by_name.get(file.name, set())
        if not file.exists() and len(copies) == 1:
            (copy_path,) = copies
            if copy_path.is_file():
                found[file] = copy_path
    return found


def use_copies_of_run(rewards: Mapping[str, RewardEntry], run_dir: Path) -> None:
    """Let the run's own copies stand in for reward files that are gone, in this process."""
    files = [split_function(reward.function)[0] for reward in rewards.values() if reward.function is not None]
    use_stand_ins(stand_ins(run_dir, files))


def recorded_digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of each copied file as it is now, by its path; empty if the run has no copies."""
    target = run_dir / DIRECTORY
    manifest = read_manifest(run_dir)
    if manifest is None:
        return {}
    digests = {}
    for name in sorted(manifest["sha256"]):
        file = target / name
        digests[name] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "missing"
    return digests


def renew_copies(rewards: Mapping[str, RewardEntry], run_dir: Path, *, has_progress: bool, accept: list[str]) -> None:
    """Copy the reward files of a run that is about to start into its directory, unless it must keep the copies that it has.

    - No reward is a function: nothing is done.
    - A file is gone of which there is a copy, and `run.accept` does not name rewards: the copies are kept.
    - There are no copies, the run has made no step, or `run.accept` names rewards: the files are copied.
    - A file cannot be read now: the copies are kept.
    - A file differs from its copy: ConfigError, since the same run would be scored by two functions.
    - All are as they were: they are copied again.

    `has_progress`: whether the run has made steps. `accept`: what `run.accept` names. Raises StorageError too.
    """
    files = [split_function(reward.function)[0] for reward in rewards.values() if reward.function is not None]
    if not files:
        return
    manifest = read_manifest(run_dir)
    if manifest is not None and DIRECTORY not in accept and stand_ins(run_dir, files):
        return
    if manifest is None or not has_progress or DIRECTORY in accept:
        copy_rewards(rewards, run_dir)
        return
    try:
        current = digests_of(rewards)
    except (ConfigError, OSError):
        return
    recorded = recorded_digests(run_dir)
    changed = [name for name in sorted(recorded.keys() | current.keys()) if recorded.get(name) != current.get(name)]
    if changed:
        changed_files = ", ".join(name.partition("/")[2] for name in changed)
        raise ConfigError(
            f"objective.rewards: {changed_files} differs from the copy in {run_dir / DIRECTORY} that scored this run until now; "
            "add run.accept=[rewards] to go on with the new one, or put the old one back"
        )
    # Copied again, though they are the same: only this replaces other files that somebody may have put there, which would be run.
    copy_rewards(rewards, run_dir)
