"""What both ways of `shardtune export` read alike: words of the form key=value, where the result goes, the run's own record."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError

ACCEPT = "accept"
"""The word that goes on with another base than the run was trained on."""


def parse(argv: list[str], keys: tuple[str, ...], *, beside: str = "") -> tuple[dict[str, str], list[str]]:
    """The words by key, and a line about each word that cannot be used; `--verify` is `verify=true`, a bare word the run.

    `beside` is added to the line about a key that is not known.
    """
    words: dict[str, str] = {}
    problems = []
    for word in argv:
        key, equals, value = ("verify", "=", "true") if word == "--verify" else word.partition("=")
        if "run.dir" in keys and not equals and key not in keys and not key.startswith("-"):
            key, equals, value = "run.dir", "=", word
        if key in words:
            problems.append(f"{word}: {key} is given twice, as {words[key]} and {value}; give one")
            continue
        if key in keys and equals and value:
            words[key] = value
            continue
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; one of {', '.join(keys)}"
        problems.append(
            f"{word}: {key} needs a value ({key}=...)" if key in keys else f"{word}: no such key{beside}{hint}"
        )
    return words, problems


def flag_of(words: dict[str, str], key: str, default: bool, problems: list[str]) -> bool:
    """Whether a word is on, in any spelling that a setting of `train` takes; another value becomes a problem."""
    value = words.get(key)
    if value is None:
        return default
    if value.lower() in ("true", "yes", "on", "1"):
        return True
    if value.lower() not in ("false", "no", "off", "0"):
        problems.append(f"{key}={value}: must be true or false")
    return False


def gates_of(argv: list[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """(the other words, the gates that are typed, a line about each that is none)."""
    from trainer.export.gates.bounds import problems, read_word

    rest, gates, found = [], dict[str, Any](), []
    for word in argv:
        if word.partition("=")[0].split(".")[0] != "gates":
            rest.append(word)
            continue
        typed, problem = read_word(word)
        found += [problem] if typed is None else problems(typed)
        gates |= typed or {}
    return rest, gates, found


def run_named(words: dict[str, str]) -> Path:
    """The run that is exported. Errors: ConfigError where none is named, or there is none."""
    if "run.dir" not in words:
        raise ConfigError("run.dir: not set; name the directory of a run, as in shardtune export runs/x")
    run = Path(words["run.dir"]).expanduser()
    if not (run / "config.yaml").is_file():
        what = "not a run directory (it has no config.yaml)" if run.exists() else "there is no such directory"
        raise ConfigError(f"{run}: {what}; name a run, as in shardtune export runs/x")
    return run


def destination(run_dir: Path, to: str | None, *, holds_it: bool = False) -> Path:
    """Where the export goes. Errors: ConfigError for a directory that holds something else; `holds_it`: it holds this export."""
    if to is None:
        return run_dir / "export"
    path = Path(to).expanduser()
    if path.exists() and not holds_it and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"to={path}: exists and is not empty; name a new directory")
    return path


def unfinished(run_dir: Path, checkpoint: Path | None) -> str:
    """What is said of an export beside its places where the run is not done, or went on behind the checkpoint; else empty."""
    from trainer.reporting.status import State, read_status

    status = read_status(run_dir)
    if status.get("state") != State.done:
        return f"; the run is not done: {status.get('reason') or status.get('state')}"
    last = status.get("step")
    behind = checkpoint is not None and isinstance(last, int) and last > int(checkpoint.name.rpartition("-")[2])
    return f"; the run ended at step {last}" if behind else ""


def record_of(run_dir: Path) -> dict[str, Any]:
    """The run's `run.json`. Errors: ConfigError where it cannot be read."""
    try:
        found = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        return found
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{run_dir / 'run.json'}: cannot be read ({error}), and the precision and the card of an export come from it; "
            "bring it back"
        ) from None


def accepted_kinds(words: dict[str, str], *, reads_rows: bool = True) -> list[str]:
    """What `accept=[base,data]` names: kinds in which the files of today may differ from those of training.

    `reads_rows`: whether the verb may read the run's own rows; without them there is no data to accept. Errors: ConfigError.
    """
    from trainer.session.base_files import BASE
    from trainer.session.run_data import DATA

    typed = words.get(ACCEPT, "")
    kinds = [kind.strip() for kind in typed.removeprefix("[").removesuffix("]").split(",") if kind.strip()]
    known = [BASE, DATA] if reads_rows else [BASE]
    if typed and (not kinds or not set(kinds) <= set(known)):
        raise ConfigError(
            f"{ACCEPT}={typed}: must be [{','.join(known)}] or a part of it, of what may have changed since the training"
        )
    return kinds
