"""The errors a user can cause or meet, each with the exit code the command line gives it.

Everything that is the user's to mend derives from `ShardtuneError`; the command line prints its message without a
traceback. Anything else is a defect of ours and ends with exit code 70 and a traceback.
"""

import re

from strategies import exit_codes
from strategies.redaction import redact

_SETTING_KEY_REGEX = re.compile(r"[a-z][\w-]*(?:\.[\w-]+)*(?=[=:]| with )", re.ASCII)
"""The full key of a setting, as it begins a line about it: its value follows, the rule, or what it was combined with."""


class ShardtuneError(Exception):
    """Base of the errors that a user sees as a message: the value, the rule, the setting to change. Secrets in it are hidden."""

    exit_code = exit_codes.FAILED
    retry: str | None = None
    """The key of `launcher.retry` that starts a run again after this error. None: another start would meet the same error."""
    is_user_error = True
    """`user_error` in `failure.json`. False: neither a setting nor the data is the cause, such as a rank that was killed."""
    recorded_name: str | None = None
    """`error` in `failure.json`, for a class that has another name there; None: the name of the class."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(ShardtuneError):
    """One or more settings cannot be used. `problems` holds a line for each, and all are shown at once.

    A line about a setting begins with the setting's full key. What follows the key is for people: no code reads it.
    """

    exit_code = exit_codes.WRONG_SETTING

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [redact(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


def key_of_problem(problem: str) -> str:
    """The full key of the setting or group that a line of `ConfigError.problems` is about; empty if it begins with none."""
    match = _SETTING_KEY_REGEX.match(problem)
    return match[0] if match else ""


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust (tokenizers, safetensors) panicked: its exception derives from BaseException alone."""
    return type(error).__name__ == "PanicException"


def tokenizer_panic(error: BaseException, place: str) -> ConfigError:
    """What to raise for a panic of the tokenizers library. `place`: the directory or hub id of the tokenizer."""
    return ConfigError(
        f"{place}: its tokenizer.json makes the tokenizers library fail ({' '.join(str(error).split())[:160]}); download it "
        "again, or set model.tokenizer"
    )


class DataError(ShardtuneError):
    """The data cannot be read or would teach nothing; messages name file and line."""

    exit_code = exit_codes.WRONG_DATA


class DoesNotFit(ShardtuneError):
    """The run takes more memory than its devices have."""

    exit_code = exit_codes.CHECK_FAILED


class LimitExceeded(ShardtuneError):
    """A limit that the user set on what training may do to the model was exceeded; the state is saved."""

    exit_code = exit_codes.CHECK_FAILED


class LimitReached(ShardtuneError):
    """A budget that the user set does not suffice."""

    exit_code = exit_codes.CHECK_FAILED


class OutOfMemory(DoesNotFit):
    """A step ran out of memory amid a run, which may go on with fewer documents in each forward pass.

    `ran_out_with` names the choice that was on trial, by setting (`{"strategy": "ddp"}`), so that another start avoids it. It is
    empty outside such a trial.
    """

    retry = "out_of_memory"

    def __init__(self, message: str, *, ran_out_with: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.ran_out_with = ran_out_with or {}


class NodesUnfit(ShardtuneError):
    """The nodes of a job cannot run it, as its preflight found."""

    exit_code = exit_codes.CHECK_FAILED


class StorageError(ShardtuneError):
    """A write failed (full disk, no permission). Nothing half-written stays under a final name."""

    exit_code = exit_codes.STORAGE_FAILED


class NotRunOwner(ShardtuneError):
    """The run directory belongs to another attempt: nothing may be written there, no status and no failure either."""


class Preempted(ShardtuneError):
    """The run was asked to stop, has saved its state and can be resumed."""

    exit_code = exit_codes.PREEMPTED
    signal_name: str | None = None
    """Name of the signal that asked this process, where one did."""


class Interrupted(Exception):
    """An evaluation was broken off because the run was asked to stop; raised on all ranks alike.

    Not an error that ends a command: who runs the evaluation catches it, saves what there is, and raises Preempted.
    """


class ReplicasDiffer(ShardtuneError):
    """Ranks that should hold the same parameters do not: the hardware's fault, or hosts that differ."""

    exit_code = exit_codes.FAILED
    retry = "node_fail"


class Diverged(ShardtuneError):
    """Too many steps in a row had gradients that are not finite."""

    exit_code = exit_codes.FAILED
