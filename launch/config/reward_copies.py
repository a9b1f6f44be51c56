"""Reward files that are gone, while a run that the overrides name still has its copies of them."""

from pathlib import Path

from launch.config.outside_values import reward_code_identity
from launch.config.trusted_values import was_value_allowed_before
from trainer.objectives.reward_functions import parse_function_path, use_stand_ins
from trainer.rollout.rewards.copies import copies_of_missing_files


def use_copies_of_missing_reward_files(overrides: list[str]) -> None:
    """Let a run's own copies replace reward files that are gone, so that the command which started it still resumes it.

    For the rest of this process, the paths of the missing files mean the copies. Nothing happens unless `overrides` name a
    `run.dir` and a reward file that does not exist, as in `objective.rewards=[a.py,b.py:brief]` or
    `objective.rewards.x.function=a.py:x`. Only copies are used whose code this user has allowed before, because the directory may
    be somebody else's.
    """
    run_dir, reward_files = _run_dir_and_reward_files(overrides)
    if run_dir is None or all(file.exists() for file in reward_files):
        return
    trusted_copy_by_file = {}
    for file, copy in copies_of_missing_files(run_dir, reward_files).items():
        if was_value_allowed_before(reward_code_identity(copy)):
            trusted_copy_by_file[file] = copy
    use_stand_ins(trusted_copy_by_file)


def _run_dir_and_reward_files(overrides: list[str]) -> tuple[Path | None, list[Path]]:
    """Pick the run directory (None if not named) and the Python files of rewards out of command-line overrides.

    Read by hand, because composing the configuration would already refuse a missing reward file.
    """
    run_dir = None
    reward_files: list[Path] = []
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        if key == "run.dir":
            run_dir = Path(text).expanduser()
        elif key.startswith("objective.rewards"):
            for entry in text.strip("[]").split(","):
                # Built-in kinds of rewards, such as `maths`, have no file.
                if ".py" in entry:
                    file, _function = parse_function_path(entry.strip())
                    reward_files.append(file)
    return run_dir, reward_files
