"""`shardtune compare`: runs new points over axes and compares them, or compares runs that exist."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.compare.settings import CompareConfig
from launch.config.help_text import show_help
from launch.config.prices import price_of
from launch.config.verb_words import (
    VerbWords,
    asks_for_help,
    bare_words,
    flag,
    group_rows,
    help_rows,
    read_words,
    setting_words,
    word,
)
from launch.output import Column, TableRow, fold_all, table
from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from launch.compare.comparison import Comparison
    from launch.compare.points import PointsPlan
    from launch.compare.settings import ComparisonRow


@dataclass(kw_only=True)
class CompareWords(VerbWords):
    """What `shardtune compare` takes."""

    runs: list[str] = bare_words()
    to: Path | None = word(
        "the directory for the runs and the answer; default: one below runs/, the same for the same points",
        like="<directory>",
    )
    settings: list[str] = setting_words()
    dry_run: bool = flag("list the points, and those that would be refused, and stop")
    follow: bool = flag("rewrite the page while the runs train, until all have ended")
    as_json: bool = flag("print JSON instead of tables", key="--json")


USAGE = f"""usage: shardtune compare <axes and settings> [compare.<key>=...] [to=<directory>] [--dry-run] [--follow] [--json]
       shardtune compare <run directory> ... [to=<directory>] [--follow] [--json]

  shardtune compare strategy=ddp,fsdp2,zero2 tuning=full,lora model.path=<dir> data.path=train.jsonl \\
      launcher.processes=2 compare.steps=50 compare.repeats=3 to=runs/strategies
  shardtune compare runs/strategies
  shardtune compare runs/ddp runs/fsdp2 runs/fsdp2-lora
  shardtune compare runs/ddp wandb:team/llama/6dd78326c350
  shardtune compare runs/first --follow

With settings, compare runs every combination (point) and puts the results into one table. It takes the words of
`train`. Several values with commas between them make an axis: strategy=ddp,fsdp2. If a value contains a comma, quote
it: "data.path='a,b.jsonl'".

All points use the same data, seed and global batch. They run one after another, or as one job array with
launcher=slurm. A point that fails or is refused stays in the table with its reason. After Ctrl-C, or with more
repeats, the same command continues: finished points are not run again, and failed ones are tried once more.

{help_rows(CompareWords, group_rows("compare", CompareConfig))}

With run directories, compare reads runs that exist and computes nothing anew. The first run is the baseline. A
directory that holds runs (from `train -m` or `compare`) stands for all of them. You can also name a run by W&B's own
directory (runs/a/wandb/offline-run-...), as wandb:<entity>/<project>/<run id>, or by the address of its page.

to= writes compare.md, compare.csv and compare.json. With the extra `report` it also writes compare.html and
plots/*.png. The page of a single run is its report.html, also without to=.

The exit code is 64 if a word cannot be used, 75 or 130 if compare was stopped, and a run's own code if no run
succeeded. docs/comparing.md explains each number."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, StorageError."""
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    words, problems = read_words("compare", CompareWords, argv)
    if words.to is not None and words.to.exists() and not words.to.is_dir():
        problems.append(f"to={words.to}: is a file; name a directory")
    rows: list[ComparisonRow] = []
    if words.settings:
        for run in words.runs:
            problems.append(
                f"{run}: not of the form key=value; name runs that exist, or settings of new ones, not both"
            )
    else:
        if words.dry_run:
            problems.append(
                "--dry-run: lists points of new runs; name an axis, as in strategy=ddp,fsdp2, or leave it out"
            )
        rows, unusable = rows_of(words.runs)
        problems += unusable
    if problems:
        raise ConfigError(problems)
    if words.settings:
        return _compare_new_points(words)
    if words.follow:
        follow_runs(rows, words.to or _comparison_directory(words.runs), words.as_json)
    else:
        write_answer(rows, words.to, words.as_json)
    return 0


def follow_runs(rows: list[ComparisonRow], to: Path | None, as_json: bool) -> None:
    """Rewrite the page while the runs train, then answer. Errors: ConfigError, StorageError, KeyboardInterrupt."""
    from launch.compare.follow import PAGE_INTERVAL_S, follow
    from launch.compare.page import missing_packages
    from launch.compare.wandb_files import is_server, is_wandb

    directories: list[Path] = []
    for row in rows:
        directories += row.directories
    for directory in directories:
        # Reading a run of W&B starts a process of wandb, or asks a server: too much for every few seconds.
        if is_wandb(directory) or is_server(directory):
            raise ConfigError(f"--follow: {directory} is of W&B, which is not asked again and again; name its run.dir")
    page = _page_path(rows, to)
    if page is None:
        raise ConfigError("--follow: name a directory for the page that is written again; to=reports/now")
    missing = missing_packages(page.name)
    if missing is not None:
        raise ConfigError(f"--follow: {missing}")
    print(
        f"{page}: written every {PAGE_INTERVAL_S:.0f} s until all runs have ended; Ctrl-C ends it",
        file=sys.stderr,
        flush=True,
    )
    follow(directories, lambda again_s: _write_page(rows, page, again_s))
    write_answer(rows, to, as_json)


def _page_path(rows: list[ComparisonRow], to: Path | None) -> Path | None:
    """Where the page is written: `to`, or the directory of the only run."""
    from launch.compare.run_report import REPORT
    from launch.compare.wandb_files import is_server, is_wandb

    if to is not None:
        return to / "compare.html"
    if len(rows) != 1 or len(rows[0].directories) != 1:
        return None
    (directory,) = rows[0].directories
    # What W&B keeps is left as it is: it would be uploaded.
    if is_wandb(directory) or is_server(directory):
        return None
    return directory / REPORT


def _write_page(rows: list[ComparisonRow], page: Path, again_s: float | None) -> None:
    from launch.compare.answer import as_html
    from launch.compare.comparison import compare
    from trainer.reporting.status import write_text_atomic

    write_text_atomic(page, as_html(compare(rows, price_of), again_s=again_s))


def _comparison_directory(words: list[str]) -> Path | None:
    """The directory of the comparison that is the only word; None for runs."""
    from launch.compare.settings import RECORD

    if len(words) != 1:
        return None
    directory = Path(words[0]).expanduser()
    return directory if (directory / RECORD).is_file() else None


def _compare_new_points(words: CompareWords) -> int:
    """Run new points, and say how they compare; returns the exit code."""
    from launch.compare.follow import PeriodicPage
    from launch.compare.page import missing_packages
    from launch.compare.points import STOPPED, plan_points, run_points
    from trainer.stopping.signals import hold, release

    if not words.dry_run:
        hold()  # a signal before the first run is kept for it: Ctrl-C then stops it as `train` would
    plan = plan_points(words.settings)
    to = words.to or Path("runs") / plan.name
    if (to / "config.yaml").exists():
        raise ConfigError(f"to={to}: is the directory of a run; name another one")
    if words.dry_run:
        print(listing(plan, to))
        return 0
    missing = missing_packages() if words.follow else None
    if missing is not None:
        raise ConfigError(f"--follow: {missing}")
    print(listing(plan, to), file=sys.stderr, flush=True)
    rows = plan.rows(to)
    pages = PeriodicPage(lambda again_s: _write_page(rows, to / "compare.html", again_s)) if words.follow else None
    code = run_points(plan, to, pages)
    release()
    if code in STOPPED:
        print("stopped; the same command continues", file=sys.stderr, flush=True)
    if words.follow and not code:  # SLURM may still be running the points
        follow_runs(rows, to, words.as_json)
    else:
        write_answer(rows, to, words.as_json)
    return code


def listing(plan: PointsPlan, to: Path) -> str:
    """The points, and which of them cannot be run."""
    settings = plan.settings
    times = f", each {settings.repeats} times in alternating order" if settings.repeats > 1 else ""
    lines = [f"{len(plan.points)} points in {to}{times}"]
    rows = []
    for point in plan.points:
        refusals = fold_all([f"refused: {problem}" for problem in point.refusals], indent=4)
        rows.append(TableRow((point.name, " ".join(point.words)), refusals))
    lines += table((Column(), Column()), rows, indent=2)
    lines += plan.partial_settings
    if plan.left_out:
        lines.append(f"left out by compare.skip and compare.where: {plan.left_out}")
    return "\n".join(lines)


def write_answer(rows: list[ComparisonRow], to: Path | None, as_json: bool) -> None:
    """Print what the rows say, and write it: into `to`, else the page of a single run. Errors: ConfigError, StorageError."""
    from launch.compare.answer import as_dict, as_text
    from launch.compare.comparison import compare
    from launch.compare.page import missing_packages

    comparison = compare(rows, price_of)
    answer_json = as_dict(comparison)
    written: list[str] = []
    run_page = None
    if to is None:
        run_page = _page_path(rows, None)
    else:
        written = _write_all(comparison, answer_json, to)
    missing = missing_packages(run_page.name if run_page else "compare.html")
    print(json.dumps(answer_json, indent=1, allow_nan=False) if as_json else as_text(comparison), flush=True)
    if run_page is not None and missing is None:
        written = _write_run_page(comparison, run_page)
    if as_json or not (written or run_page is not None):
        return
    lines = [f"written: {', '.join(written)}" if written else None, missing]
    print("\n" + "\n".join(filter(None, lines)), flush=True)


def _write_all(comparison: Comparison, answer_json: dict[str, Any], to: Path) -> list[str]:
    """Every file of the answer into `to`; what was written, for people."""
    from launch.compare.answer import as_csv, as_html, as_markdown
    from launch.compare.page import missing_packages, write_plot_images
    from launch.compare.workspace import workspace_script
    from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY
    from trainer.reporting.status import write_text_atomic

    has_packages = missing_packages() is None
    script = workspace_script(comparison, to)
    pictures = write_plot_images(comparison, to) if has_packages else []
    versioned = {VERSION_KEY: FILE_VERSION, **answer_json}
    write_text_atomic(to / "compare.md", as_markdown(comparison, pictures))
    write_text_atomic(to / "compare.csv", as_csv(comparison))
    write_text_atomic(to / "compare.json", json.dumps(versioned, indent=1, allow_nan=False) + "\n")
    written = [str(to / "compare.md")]
    if has_packages:
        write_text_atomic(to / "compare.html", as_html(comparison))
        written.append("compare.html")
    written += ["compare.csv", "compare.json"]
    if pictures:
        written.append(f"plots/*.png ({len(pictures)})")
    if script is not None:
        write_text_atomic(to / "workspace.py", script)
        written.append("workspace.py (for W&B)")
    return written


def _write_run_page(comparison: Comparison, page: Path) -> list[str]:
    """The page of a single run into its directory, which may be somebody else's."""
    from launch.compare.run_report import write

    try:
        return [str(write(page.parent, comparison))]
    except StorageError as error:
        print(f"{error}; to=<directory> writes elsewhere", file=sys.stderr, flush=True)
        return []


def rows_of(words: list[str]) -> tuple[list[ComparisonRow], list[str]]:
    """(rows of runs that exist, a line about each word that names none)."""
    problems: list[str] = []
    rows: list[ComparisonRow] = []
    for typed in words:
        try:
            rows += _rows_named_by(typed)
        except ConfigError as error:
            problems += error.problems
    directories: list[Path] = []
    for row in rows:
        directories += row.directories
    times = Counter(directory.resolve() for directory in directories)
    doubled = {directory for directory in directories if times[directory.resolve()] > 1}
    problems += [f"{directory}: named twice; name each run once" for directory in sorted(doubled)]
    if not rows and not problems:
        problems.append("no run directory is named; shardtune compare runs/a runs/b")
    return rows, problems


def _rows_named_by(typed: str) -> list[ComparisonRow]:
    """Rows of a run, of a comparison that was run, of runs below a directory. Errors: ConfigError if there are none."""
    from launch.compare.run_files import is_run
    from launch.compare.settings import ComparisonRow, read_rows
    from launch.compare.wandb_files import is_wandb, server_name

    server = server_name(typed)
    if server is not None:
        return [ComparisonRow((Path(server),))]
    path = Path(typed).expanduser()
    if is_run(path) or is_wandb(path):
        return [ComparisonRow((path,))]
    if kept_rows := read_rows(path):
        return kept_rows
    run_directories = [child for child in sorted(path.glob("*"), key=_in_order) if is_run(child)]
    if run_directories:
        return [ComparisonRow((directory,)) for directory in run_directories]
    if not path.exists():
        raise ConfigError(f"{typed}: there is no such directory; name run directories")
    parts = [part.name for part in sorted(path.glob("*run-*")) if is_wandb(part)]
    more = f"; name a run of W&B in it, such as {path / parts[0]}" if parts else ""
    raise ConfigError(f"{typed}: not a run directory (there is no config.yaml in it, and no runs below it){more}")


def _in_order(path: Path) -> tuple[int, str]:
    """Points of `train -m` are called 0, 1, ... 10."""
    return (int(path.name) if path.name.isdecimal() else -1, path.name)
