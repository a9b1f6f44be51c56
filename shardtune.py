"""shardtune in Python: the words of the command line as a function call, and runs as objects.

    import shardtune

    run = shardtune.train(model_path="models/smollm2", data_path="train.jsonl", tuning="lora", **{"batch.global": 64})
    run.status["state"], run.metrics(), run.model()

Training takes place in processes of its own, started by the same launcher as the command's, so that a notebook stays as it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from launch.config.frozen import Composed

__all__ = ["Run", "RunFailed", "compose", "main", "train"]
ROOT = Path(__file__).resolve().parent
PACKAGES = ("launch", "trainer", "strategies", "conf")


class RunFailed(Exception):
    """A command that did not end well."""

    def __init__(self, message: str, code: int, run: Run) -> None:
        super().__init__(message)
        self.code = code
        """The exit code of the command line."""
        self.run = run
        """The run, with whatever the command left in its directory."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory. The run may be training, have ended, or belong to another process. `dir` may be given as text."""

    dir: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir", Path(self.dir).expanduser())

    @property
    def status(self) -> dict[str, Any]:
        """`status.json`: `state` (running, done, preempted or failed), `reason`, `step`, ...; empty before there is one."""
        return self._json("status.json")

    @property
    def record(self) -> dict[str, Any]:
        """`run.json`: versions, data, sharding, substitutions, and the outcome once there is one; empty before the first step."""
        return self._json("run.json")

    def metrics(self) -> pd.DataFrame:
        """One row for each step and each evaluation, as in `metrics.jsonl`; empty if the run has none yet."""
        import pandas as pd

        _refuse_other_packages()
        from trainer.reporting.metric_rows import METRICS, read_rows

        metrics = read_rows(self.dir / METRICS)
        if metrics.unreadable:
            warnings.warn(f"{self.dir / METRICS}: left out: {', '.join(map(str, metrics.unreadable))}", stacklevel=2)
        return pd.DataFrame(metrics.rows)

    def export(self, to: str | Path | None = None, **settings: Any) -> Path:
        """Write a checkpoint as a model for others, as `shardtune export` does; returns its directory.

        `settings` are the words of that verb: `checkpoint="best"`, `merge=True`, `dtype="bfloat16"`. Errors: RunFailed.
        """
        words = [str(self.dir)]
        words += [f"{key}={_text(value)}" for key, value in settings.items()]
        if to is not None:
            words.append(f"to={to}")
        _run("export", words, self)
        return self.dir / "export" if to is None else Path(to).expanduser()

    def model(self) -> Any:
        """The exported model (an adapter on its base), by transformers and peft, in evaluation mode and float32.

        Raises FileNotFoundError if the run has exported none.
        """
        _refuse_other_packages()
        from trainer.export.load import load_export

        if not (self.dir / "export").is_dir():
            raise FileNotFoundError(
                f"{self.dir / 'export'}: the run has exported no model yet; Run.export() writes one"
            )
        return load_export(self.dir / "export", self.record.get("base_model")).eval()

    def tokenizer(self) -> Any:
        """The tokenizer beside the exported model."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.dir / "export")

    def _json(self, name: str) -> dict[str, Any]:
        """A JSON object of the run directory; empty if it is missing or unreadable."""
        try:
            content = json.loads((self.dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def compose(*words: str, check: bool = True, **settings: Any) -> Composed:
    """The configuration that these words make: `.config` (typed), `.yaml`, `.sha256`. Nothing is started.

    `words` are as typed (`"optim.lr=2e-4"`, `"my.yaml"`). A keyword names a setting with `_` for its dots (`model_path`), or as
    it is typed, in a dictionary: `**{"batch.global": 64}`. Raises strategies.errors.ConfigError with everything that is wrong.
    """
    _refuse_other_packages()
    from launch.config.compose import compose as composed

    return composed(_words(words, settings), check=check)


def train(*words: str, **settings: Any) -> Run:
    """Train to the end, or resume the run of that directory. Its output is printed as it comes.

    Takes what `compose` takes. Raises ConfigError before anything starts, RunFailed if the run ends otherwise than done. An
    interrupt (Ctrl-C, or the notebook's stop) is passed on, so that the run saves, and raised again.
    """
    composed = compose(*words, **settings)
    from launch.train import run_dir_of

    run = Run(run_dir_of(composed).absolute())
    _run("train", [*composed.overrides, f"run.dir={_text(str(run.dir))}"], run)
    return run


def main() -> int:
    """The command `shardtune`; returns the exit code."""
    try:
        _refuse_other_packages()
    except ImportError as error:
        print(f"shardtune: {error}", file=sys.stderr)
        return 70
    from launch.main import main as command

    return command()


def _run(verb: str, words: list[str], run: Run) -> None:
    """Run a verb in a process of its own, its output printed here. Raises RunFailed."""
    search_path = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        search_path.append(os.environ["PYTHONPATH"])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    command = [sys.executable, "-P", "-u", "-m", "launch.main", verb, *words]
    # In a session of its own, so that an interrupt reaches it once: from us, and not from the terminal as well.
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        last_lines: list[str] = []
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                last_lines = [*last_lines[-9:], line.rstrip()]
            code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.stdout.close()
            process.wait()
            raise
    if code:
        reason = run.status.get("reason") if verb == "train" else None
        raise RunFailed(f"shardtune {verb} ended with {code}: {reason or ' '.join(last_lines[-2:])}", code, run)


def _refuse_other_packages() -> None:
    """Raise ImportError if another package has the name of one of ours and comes before it."""
    for name in PACKAGES:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else find_spec(name)
        locations = spec.submodule_search_locations if spec is not None else None
        directories = [Path(location).resolve() for location in locations or []]
        if directories[:1] == [ROOT / name]:
            continue
        if directories:
            other: Path | str | None = directories[0]
        else:
            other = spec.origin if spec is not None else "nothing"
        raise ImportError(
            f"another package {name} hides shardtune's: {other} comes before {ROOT / name}; give shardtune a virtual "
            f"environment of its own (python -m venv), or uninstall the other one ({name})"
        )


def _words(words: tuple[str, ...], settings: dict[str, Any]) -> list[str]:
    """The words of the command line for words and keywords."""
    command_words = list(words)
    if not settings:
        return command_words
    from launch.config.choices import choices_by_group
    from launch.config.overrides import find_setting
    from launch.config.overrides import settings as all_settings

    settings_by_key = all_settings()
    key_by_name = {key.replace(".", "_").rstrip("_"): key.rstrip("_") for key in settings_by_key}
    for name, value in settings.items():
        key = name
        if name not in choices_by_group() and find_setting(settings_by_key, name) is None:
            key = key_by_name.get(name.rstrip("_"), name)
        command_words.append(f"{key}={_text(value)}")
    return command_words


def _text(value: Any) -> str:
    """A value as it is typed. Text that the command line would read as something else is quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(_quoted(entry) for entry in value)}]"
    if isinstance(value, dict):
        pairs = [f"{key}: {_quoted(entry)}" for key, entry in value.items()]
        return "{" + ",".join(pairs) + "}"
    text = str(value)
    is_syntax = text == "null" or text.startswith(("[", "{", "'", '"'))
    return _quote(text) if is_syntax else text


def _quoted(value: Any) -> str:
    """An entry of a list or table: text in quotes."""
    return _quote(str(value)) if isinstance(value, str | Path) else _text(value)


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


if __name__ == "__main__":
    sys.exit(main())
