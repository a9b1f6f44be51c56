"""shardtune in Python: the arguments of the command line as a function call, and runs as objects.

    import shardtune

    run = shardtune.train(model_path="models/smollm2", data_path="train.jsonl", tuning="lora", **{"batch.global": 64})
    run.status["state"], run.metrics(), run.model()
    shardtune.evaluate(run, against="base").metrics()

Training takes place in processes of its own, started by the same launcher as the command's, so that a notebook stays as it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from launch.config.frozen import ComposedConfig
    from launch.notebook.results import ComparisonResult, EvaluationResult, PlanResult

__all__ = ["Run", "RunFailed", "compare", "compose", "evaluate", "main", "plan", "train"]
ROOT = Path(__file__).resolve().parent
OUR_PACKAGES = ("launch", "trainer", "strategies", "conf")
VERB_GROUPS = ("compare", "plan", "hardware")
"""Groups of words that are of a verb and not of a run, such as `compare.steps`."""
UNMET_EXIT_CODE = 69
"""Exit code of a command that worked, and whose answer is bad: nothing fits, or a metric fell."""


class RunFailed(Exception):
    """A command that did not end well."""

    def __init__(self, message: str, code: int, run: Run | None) -> None:
        super().__init__(message)
        self.code = code
        """The exit code of the command line."""
        self.run = run
        """The run, with whatever the command left in its directory; None for a command that is not of one run."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory. The run may be training, have ended, or belong to another process. `dir` may be given as text."""

    dir: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir", Path(self.dir).expanduser())

    @property
    def status(self) -> dict[str, Any]:
        """`status.json`: `state` (running, done, preempted or failed), `reason`, `step`, ...; empty before there is one."""
        return self._read_json_object("status.json")

    @property
    def record(self) -> dict[str, Any]:
        """`run.json`: versions, data, sharding, substitutions, and the outcome once there is one; empty before the first step."""
        return self._read_json_object("run.json")

    def metrics(self) -> pd.DataFrame:
        """One row for each step and each evaluation, as in `metrics.jsonl`; empty if the run has none yet."""
        import pandas as pd

        _refuse_other_packages()
        from trainer.reporting.metric_rows import METRICS_FILE, read_rows

        metrics = read_rows(self.dir / METRICS_FILE)
        if metrics.unreadable:
            warnings.warn(
                f"{self.dir / METRICS_FILE}: left out: {', '.join(map(str, metrics.unreadable))}", stacklevel=2
            )
        return pd.DataFrame(metrics.rows)

    def export(self, to: str | Path | None = None, **settings: Any) -> Path:
        """Write a checkpoint as a model for others, as `shardtune export` does; returns its directory.

        `settings` are the arguments of that verb: `checkpoint="best"`, `merge=True`, `dtype="bfloat16"`. Errors: RunFailed.
        """
        arguments = [str(self.dir)]
        arguments += [f"{key}={_setting_text(value)}" for key, value in settings.items()]
        if to is not None:
            arguments.append(f"to={to}")
        _run_verb("export", arguments, self)
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

    def _repr_html_(self) -> str:
        """For a notebook: how the run went, what a reader should know about it, and its losses."""
        _refuse_other_packages()
        from launch.notebook.run_view import run_notebook_html

        return run_notebook_html(self.dir)

    def _read_json_object(self, name: str) -> dict[str, Any]:
        """A JSON object of the run directory; empty if it is missing or unreadable."""
        try:
            content = json.loads((self.dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def compose(*arguments: str, check: bool = True, **settings: Any) -> ComposedConfig:
    """The configuration that these arguments make: `.config` (typed), `.yaml`, `.sha256`. Nothing is started.

    `arguments` are as typed (`"optim.lr=2e-4"`, `"my.yaml"`). A keyword names a setting with `_` for its dots (`model_path`),
    or as it is typed, in a dictionary: `**{"batch.global": 64}`. Raises strategies.errors.ConfigError with everything that is
    wrong.
    """
    _refuse_other_packages()
    from launch.config.compose import compose_config

    return compose_config(_command_arguments(arguments, settings), check=check)


def train(*arguments: str, **settings: Any) -> Run:
    """Train to the end, or resume the run of that directory. Its output is printed as it comes.

    Takes what `compose` takes. Raises ConfigError before anything starts, RunFailed if the run ends otherwise than done. An
    interrupt (Ctrl-C, or the notebook's stop) is passed on, so that the run saves, and raised again.
    """
    composed = compose(*arguments, **settings)
    from launch.train import run_dir_of_config

    run = Run(run_dir_of_config(composed).absolute())
    _run_verb("train", [*composed.overrides, f"run.dir={_setting_text(str(run.dir))}"], run)
    return run


def evaluate(run: Run | str | Path | None = None, *arguments: str, **settings: Any) -> EvaluationResult:
    """Measure a run or a model, as `shardtune evaluate` does; what it prints is printed as it comes.

    `run`: the run; None with `model_path=<directory>`. Further arguments are keywords, too: `against="base"`,
    `checkpoint="best"`, `to="reports/first"`, `evaluation_tasks=["loss"]`. A metric that fell against an evaluation.json
    is no error: `regressions` names it. Raises ConfigError or DataError before anything starts, RunFailed.
    """
    all_arguments = [*_run_arguments(run), *_command_arguments(arguments, settings)]
    _refuse_other_packages()
    from launch.evaluate.arguments import parse_evaluate_arguments
    from launch.evaluate.plan import plan_evaluation
    from launch.notebook.results import EvaluationResult

    directory = Path(plan_evaluation(parse_evaluate_arguments(all_arguments)).job.report_dir).absolute()
    result = EvaluationResult(directory)
    evaluated = run if isinstance(run, Run) else Run(directory)
    _run_verb("evaluate", all_arguments, evaluated, accepted_exit_codes=(0, UNMET_EXIT_CODE))
    return result


def compare(*runs: Run | str | Path, to: str | Path | None = None, **settings: Any) -> ComparisonResult:
    """Compare runs that exist, or train every point of some axes and compare those, as `shardtune compare` does.

    `runs`: runs, or directories that hold them, all compared with the first. With settings, new points are trained:
    `strategy=["ddp", "fsdp2"]` is an axis, `compare_steps=20` is of the comparison. `to`: where the runs of new points go,
    and the files of the answer. Raises ConfigError before anything starts, RunFailed if no point succeeds.
    """
    arguments: list[str] = []
    for run in runs:
        arguments += _run_arguments(run)
    is_new = bool(settings) or any("=" in argument for argument in arguments)
    _refuse_other_packages()
    from launch.compare.command import point_sources_from_arguments
    from launch.compare.comparison import compare_points
    from launch.config.prices import gpu_hour_price
    from launch.notebook.results import ComparisonResult
    from strategies.errors import ConfigError

    if is_new:
        from launch.compare.points import plan_points

        arguments += _command_arguments((), settings, axes=True)
        # Planned in this process too, so that what is wrong is an error before anything starts.
        default_directory = Path("runs") / plan_points(arguments).name
        to = default_directory if to is None else Path(to).expanduser()
        _run_verb("compare", [*arguments, f"to={to}"], Run(to))
        arguments = [str(to)]
    point_sources, problems = point_sources_from_arguments(arguments)
    if problems:
        raise ConfigError(problems)
    if to is not None and not is_new:
        to = Path(to).expanduser()
        _run_verb("compare", [*arguments, f"to={to}"], Run(to))
    return ComparisonResult(compare_points(point_sources, gpu_hour_price))


def plan(*arguments: str, **settings: Any) -> PlanResult:
    """What a run will need and how fast it will be on a card, as `shardtune plan` estimates it; nothing is trained.

    Takes what `compose` takes, and `hardware="h100_80g"`, `plan_offload=True`, `from_="runs/first"`. That nothing fits is no
    error: `fits` says so. Raises RunFailed, with the message of the command.
    """
    all_arguments = _command_arguments(arguments, settings)
    _refuse_other_packages()
    from launch.notebook.results import PlanResult

    # Its own stdout is the JSON alone: a line of a library between would break it.
    with tempfile.TemporaryFile() as stdout_file:
        _run_verb(
            "plan", ["--json", *all_arguments], None, accepted_exit_codes=(0, UNMET_EXIT_CODE), stdout_file=stdout_file
        )
        stdout_file.seek(0)
        return PlanResult(json.loads(stdout_file.read()))


def main() -> int:
    """The command `shardtune`; returns the exit code."""
    try:
        _refuse_other_packages()
    except ImportError as error:
        print(f"shardtune: {error}", file=sys.stderr)
        return 70
    from launch.main import main as command

    return command()


def _run_verb(
    verb: str,
    arguments: list[str],
    run: Run | None,
    *,
    accepted_exit_codes: tuple[int, ...] = (0,),
    stdout_file: IO[bytes] | None = None,
) -> None:
    """Run a verb in a process of its own, its output printed here. Raises RunFailed for a code that is not `accepted_exit_codes`.

    `stdout_file`: a file for its stdout. Then only its messages are printed.
    """
    search_path = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        search_path.append(os.environ["PYTHONPATH"])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    command = [sys.executable, "-P", "-u", "-m", "launch.main", verb, *arguments]
    stdout = subprocess.PIPE if stdout_file is None else stdout_file
    stderr = subprocess.STDOUT if stdout_file is None else subprocess.PIPE
    # In a session of its own, so that an interrupt reaches it once: from us, and not from the terminal as well.
    with subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr, text=True, start_new_session=True) as process:
        output = process.stdout if stdout_file is None else process.stderr
        assert output is not None
        last_lines: list[str] = []
        try:
            for line in output:
                print(line, end="", flush=True)
                last_lines = [*last_lines[-9:], line.rstrip()]
            exit_code = process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            output.close()
            process.wait()
            raise
    if exit_code not in accepted_exit_codes:
        reason = run.status.get("reason") if verb == "train" and run is not None else None
        raise RunFailed(
            f"shardtune {verb} ended with {exit_code}: {reason or ' '.join(last_lines[-2:])}", exit_code, run
        )


def _refuse_other_packages() -> None:
    """Raise ImportError if another package has the name of one of ours and comes before it."""
    for name in OUR_PACKAGES:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else find_spec(name)
        locations = spec.submodule_search_locations if spec is not None else None
        directories = [Path(location).resolve() for location in locations or []]
        if directories[:1] == [ROOT / name]:
            continue
        if directories:
            found_location: Path | str | None = directories[0]
        else:
            found_location = spec.origin if spec is not None else "nothing"
        raise ImportError(
            f"another package {name} hides shardtune's: {found_location} comes before {ROOT / name}; give shardtune a virtual "
            f"environment of its own (python -m venv), or uninstall the other one ({name})"
        )


def _run_arguments(run: Run | str | Path | None) -> list[str]:
    """A run, or an argument, as it is typed; none for None."""
    if run is None:
        return []
    return [str(run.dir) if isinstance(run, Run) else str(run)]


def _command_arguments(arguments: tuple[str, ...], settings: dict[str, Any], *, axes: bool = False) -> list[str]:
    """The arguments of the command line for arguments and keywords. With `axes`, a list may stand for several values."""
    command_arguments = list(arguments)
    if not settings:
        return command_arguments
    from launch.config.choices import choices_by_group
    from launch.config.known_settings import all_settings, find_setting

    settings_by_key = all_settings()
    # `evaluation.tasks` stands for `evaluation.tasks.*.kind` and its like: a table, or a list of choices.
    keys = [*settings_by_key, *(key.partition(".*")[0] for key in settings_by_key)]
    key_by_name = {key.replace(".", "_").rstrip("_"): key.rstrip("_") for key in keys}
    for name, value in settings.items():
        key = name
        if name not in choices_by_group() and find_setting(name) is None:
            key = key_by_name.get(name.rstrip("_"), _verb_argument_key(name))
        setting = find_setting(key)
        takes_list = setting is None or setting.type is Any or "list" in str(setting.type)
        if key in choices_by_group():
            takes_list = False
        if axes and isinstance(value, list | tuple) and (not takes_list or _holds_lists(value)):
            text = ",".join(map(_axis_value_text, value))
        else:
            text = _setting_text(value)
        command_arguments.append(f"{key}={text}")
    return command_arguments


def _verb_argument_key(name: str) -> str:
    """The argument of a verb that a keyword names: `compare_steps` is `compare.steps`, `from_` is `from`."""
    group, _, rest = name.partition("_")
    if group in VERB_GROUPS and rest:
        return f"{group}.{rest}"
    return name.rstrip("_")


def _holds_lists(values: list[Any] | tuple[Any, ...]) -> bool:
    return any(isinstance(entry, list | tuple) for entry in values)


def _axis_value_text(value: Any) -> str:
    """One of several values. Text with a comma is quoted, since a comma would begin the next value."""
    text = _setting_text(value)
    return _in_quotes(text) if isinstance(value, str | Path) and "," in text else text


def _setting_text(value: Any) -> str:
    """A value as it is typed. Text that the command line would read as something else is quoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return f"[{','.join(_entry_text(entry) for entry in value)}]"
    if isinstance(value, dict):
        pairs = [f"{key}: {_entry_text(entry)}" for key, entry in value.items()]
        return "{" + ",".join(pairs) + "}"
    text = str(value)
    is_syntax = text == "null" or text.startswith(("[", "{", "'", '"'))
    return _in_quotes(text) if is_syntax else text


def _entry_text(value: Any) -> str:
    """An entry of a list or table: text in quotes."""
    return _in_quotes(str(value)) if isinstance(value, str | Path) else _setting_text(value)


def _in_quotes(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


if __name__ == "__main__":
    sys.exit(main())
