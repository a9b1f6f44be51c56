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
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    group_rows,
    help_rows,
    option,
    positionals,
    read_arguments,
)
from launch.output import Column, TableRow, fold, fold_all, table
from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from launch.compare.comparison import Comparison
    from launch.compare.points import PointsPlan
    from launch.compare.settings import ComparisonRow


@dataclass(kw_only=True)
class CompareArguments(VerbArguments):
    """What `shardtune compare` takes."""

    runs: list[str] = positionals()
    to: Path | None = option(
        "the directory for the runs and the answer; default: one below runs/, the same for the same points",
        like="<directory>",
    )
    settings: list[str] = forwarded_settings()
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

{help_rows(CompareArguments, group_rows("compare", CompareConfig))}

With run directories, compare reads runs that exist and computes nothing anew. The first run is the baseline. A
directory that holds runs (from `train -m` or `compare`) stands for all of them. You can also name a run by W&B's own
directory (runs/a/wandb/offline-run-...), as wandb:<entity>/<project>/<run id>, or by the address of its page.

to= writes compare.md, compare.html, compare.csv and compare.json. With the extra `report` compare.html has plots, and
plots/*.png are written. The page of a single run is its report.html, also without to=.

The exit code is 64 if a word cannot be used, 75 or 130 if compare was stopped, and a run's own code if no run
succeeded. docs/reference/comparisons.md explains each number."""


def main(argv: list[str]) -> int:
    """Run `shardtune compare` with the arguments behind it; returns the exit code. Errors: ConfigError, StorageError."""
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else 64
    arguments, problems = read_arguments("compare", CompareArguments, argv)
    if arguments.to is not None and arguments.to.exists() and not arguments.to.is_dir():
        problems.append(f"to={arguments.to}: is a file; name a directory")

    # With settings the command starts new runs; with directories alone it reads runs that exist.
    rows: list[ComparisonRow] = []
    if arguments.settings:
        for run in arguments.runs:
            problems.append(
                f"{run}: not of the form key=value; name runs that exist, or settings of new ones, not both"
            )
    else:
        if arguments.dry_run:
            problems.append(
                "--dry-run: lists points of new runs; name an axis, as in strategy=ddp,fsdp2, or leave it out"
            )
        rows, run_problems = rows_from_arguments(arguments.runs)
        problems += run_problems
    if problems:
        raise ConfigError(problems)

    if arguments.settings:
        return _compare_new_points(arguments)
    if arguments.follow:
        follow_runs(rows, arguments.to or _comparison_directory(arguments.runs), arguments.as_json)
    else:
        print_and_write_comparison(rows, arguments.to, arguments.as_json)
    return 0


def follow_runs(rows: list[ComparisonRow], to: Path | None, as_json: bool) -> None:
    """Rewrite the HTML page while the runs train; when all have ended, print and write the comparison once.

    Errors: ConfigError, StorageError, KeyboardInterrupt.
    """
    from launch.compare.follow import PAGE_INTERVAL_S, follow
    from launch.compare.wandb_files import is_wandb_address, is_wandb_directory

    run_dirs: list[Path] = []
    for row in rows:
        run_dirs += row.directories
    for run_dir in run_dirs:
        # Reading a run of W&B starts a process of wandb, or asks a server: too much for every few seconds.
        if is_wandb_directory(run_dir) or is_wandb_address(run_dir):
            raise ConfigError(f"--follow: {run_dir} is of W&B, which is not asked again and again; name its run.dir")
    page = _page_path(rows, to)
    if page is None:
        raise ConfigError("--follow: name a directory for the page that is written again; to=reports/now")

    # On stderr: with --json, stdout holds nothing but the JSON of the comparison.
    print(
        f"{page}: written every {PAGE_INTERVAL_S:.0f} s until all runs have ended; Ctrl-C ends it",
        file=sys.stderr,
        flush=True,
    )
    follow(run_dirs, lambda reload_after_s: _write_page(rows, page, reload_after_s))
    print_and_write_comparison(rows, to, as_json)


def _page_path(rows: list[ComparisonRow], to: Path | None) -> Path | None:
    """Path of the HTML page: `compare.html` in `to`, or without `to` the `report.html` of the only run; None for several."""
    from launch.compare.run_report import REPORT
    from launch.compare.wandb_files import is_wandb_address, is_wandb_directory

    if to is not None:
        return to / "compare.html"
    if len(rows) != 1 or len(rows[0].directories) != 1:
        return None
    (run_dir,) = rows[0].directories
    # No page into W&B's own directory: wandb would upload it with the run.
    if is_wandb_directory(run_dir) or is_wandb_address(run_dir):
        return None
    return run_dir / REPORT


def _write_page(rows: list[ComparisonRow], page: Path, reload_after_s: float | None) -> None:
    """Read the runs as they are now, and write their HTML page, which a browser reloads after `reload_after_s` seconds."""
    from launch.compare.answer import as_html
    from launch.compare.comparison import compare
    from trainer.reporting.status import write_text_atomic

    comparison = compare(rows, price_of)
    write_text_atomic(page, as_html(comparison, reload_after_s=reload_after_s))


def _comparison_directory(arguments: list[str]) -> Path | None:
    """The directory of an earlier comparison (it has a `comparison.json`), if that is the only argument; None for runs."""
    from launch.compare.settings import COMPARISON_FILE

    if len(arguments) != 1:
        return None
    directory = Path(arguments[0]).expanduser()
    return directory if (directory / COMPARISON_FILE).is_file() else None


def _compare_new_points(arguments: CompareArguments) -> int:
    """Run every point that the settings make, then print and write the comparison; returns the exit code.

    With `--dry-run`, only list the points.
    """
    from launch.compare.follow import PeriodicPage
    from launch.compare.points import STOP_EXIT_CODES, plan_points, run_points
    from trainer.stopping.signals import hold, release

    if not arguments.dry_run:
        hold()  # keep a signal that comes before the first run for that run, so that Ctrl-C stops it as it stops `train`
    plan = plan_points(arguments.settings)
    to = arguments.to or Path("runs") / plan.name
    if (to / "config.yaml").exists():
        raise ConfigError(f"to={to}: is the directory of a run; name another one")
    if arguments.dry_run:
        print(points_listing(plan, to))
        return 0
    print(points_listing(plan, to), file=sys.stderr, flush=True)
    rows = plan.rows(to)
    pages = None
    if arguments.follow:
        pages = PeriodicPage(lambda reload_after_s: _write_page(rows, to / "compare.html", reload_after_s))
    exit_code = run_points(plan, to, pages)
    release()
    if exit_code in STOP_EXIT_CODES:
        print("stopped; the same command continues", file=sys.stderr, flush=True)

    if arguments.follow and exit_code == 0:  # SLURM may still be running the points
        follow_runs(rows, to, arguments.as_json)
    else:
        print_and_write_comparison(rows, to, arguments.as_json)
    return exit_code


def points_listing(plan: PointsPlan, to: Path) -> str:
    """The planned points as lines for the terminal: name and axis values of each, and why a refused one cannot run."""
    settings = plan.settings
    heading = f"{len(plan.points)} points in {to}"
    if settings.repeats > 1:
        heading += f", each {settings.repeats} times in alternating order"
    rows = []
    for point in plan.points:
        refusals = fold_all([f"refused: {problem}" for problem in point.refusals], indent=4)
        rows.append(TableRow((point.name, " ".join([*point.arguments, *plan.rate_argument(point)])), refusals))
    lines = [heading, *table((Column(), Column()), rows, indent=2), *plan.partial_settings]
    if plan.left_out:
        lines.append(f"left out by compare.skip and compare.where: {plan.left_out}")
    return "\n".join(lines)


def print_and_write_comparison(rows: list[ComparisonRow], to: Path | None, as_json: bool) -> None:
    """Compare the rows, print the tables (or JSON), and write the files.

    With `to`, all files go there. Without it, only a single run gets a page: `report.html` in its own directory.
    Errors: ConfigError, StorageError.
    """
    from launch.compare.answer import as_dict, as_text
    from launch.compare.comparison import compare
    from launch.compare.page import missing_packages
    from launch.compare.workspace import why_no_workspace

    comparison = compare(rows, price_of)
    comparison_json = as_dict(comparison)
    written: list[str] = []
    run_page = None
    if to is None:
        run_page = _page_path(rows, None)
    else:
        written = _write_comparison_files(comparison, comparison_json, to)
    missing = missing_packages(f"{run_page.name} with plots" if run_page else "compare.html with plots")

    if as_json:
        print(json.dumps(comparison_json, indent=1, allow_nan=False), flush=True)
    else:
        print(as_text(comparison), flush=True)
    # The page comes after the tables: writing into somebody else's directory may fail, and then the tables are there already.
    if run_page is not None:
        written = _write_run_files(comparison, run_page)
    if as_json or not (written or run_page is not None):
        return
    last_lines = []
    if written:
        last_lines.append(f"written: {', '.join(written)}")
    if missing:
        last_lines.append(missing)
    not_in_wandb = why_no_workspace(comparison)
    if not_in_wandb and to is not None:
        last_lines += fold(not_in_wandb, 0)
    print("\n" + "\n".join(last_lines), flush=True)


def _write_comparison_files(comparison: Comparison, comparison_json: dict[str, Any], to: Path) -> list[str]:
    """Write every file of the comparison into `to`; returns their names, as the last line of the command shows them.

    Without the packages of the extra `report`, no plots are written, and the page has none.
    """
    from launch.compare.answer import as_csv, as_html, as_markdown
    from launch.compare.page import missing_packages, write_plot_images
    from launch.compare.workspace import write_workspace
    from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY
    from trainer.reporting.status import write_text_atomic

    # The plots first: the Markdown page links to them.
    plot_images = write_plot_images(comparison, to) if missing_packages() is None else []
    versioned_json = {VERSION_KEY: FILE_VERSION, **comparison_json}
    write_text_atomic(to / "compare.md", as_markdown(comparison, plot_images))
    write_text_atomic(to / "compare.csv", as_csv(comparison))
    write_text_atomic(to / "compare.json", json.dumps(versioned_json, indent=1, allow_nan=False) + "\n")

    write_text_atomic(to / "compare.html", as_html(comparison))

    written = [str(to / "compare.md"), "compare.html", "compare.csv", "compare.json"]
    if plot_images:
        written.append(f"plots/*.png ({len(plot_images)})")
    workspace = write_workspace(comparison, to)
    if workspace is not None:
        written.append(f"{workspace} (for W&B)")
    return written


def _write_run_files(comparison: Comparison, page: Path) -> list[str]:
    """Write the page of a single run into its run directory, and the script that shows the run in W&B.

    Returns the names of the written files, as the last line of the command shows them. A failure is only printed, because the
    comparison itself has succeeded and the directory may be somebody else's.
    """
    from launch.compare.run_report import write
    from launch.compare.workspace import write_workspace

    written = []
    try:
        written.append(str(write(page.parent, comparison)))
        workspace = write_workspace(comparison, page.parent)
    except StorageError as error:
        print(f"{error}; to=<directory> writes elsewhere", file=sys.stderr, flush=True)
        return written
    if workspace is not None:
        name = workspace if written else str(page.parent / workspace)
        written.append(f"{name} (for W&B)")
    return written


def rows_from_arguments(arguments: list[str]) -> tuple[list[ComparisonRow], list[str]]:
    """(rows of the runs that the arguments name, error messages for arguments that name no run or one twice)."""
    problems: list[str] = []
    rows: list[ComparisonRow] = []
    for argument in arguments:
        try:
            rows += _rows_from_argument(argument)
        except ConfigError as error:
            problems += error.problems

    run_dirs: list[Path] = []
    for row in rows:
        run_dirs += row.directories
    # Resolved, so that a link and its target count as one run.
    times_named = Counter(run_dir.resolve() for run_dir in run_dirs)
    named_twice = {run_dir for run_dir in run_dirs if times_named[run_dir.resolve()] > 1}
    problems += [f"{run_dir}: named twice; name each run once" for run_dir in sorted(named_twice)]
    if not rows and not problems:
        problems.append("no run directory is named; shardtune compare runs/a runs/b")
    return rows, problems


def _rows_from_argument(argument: str) -> list[ComparisonRow]:
    """The rows that one argument names. The first case that applies:

    - a run on W&B's server, a run directory, or W&B's own directory of a run: one row
    - a directory with a `comparison.json`: the points of that comparison
    - a directory of run directories: a row for each

    Raises ConfigError if it is none of these.
    """
    from launch.compare.run_files import is_run_directory
    from launch.compare.settings import ComparisonRow, read_comparison_file
    from launch.compare.wandb_files import is_wandb_directory, wandb_address

    address = wandb_address(argument)
    if address is not None:
        return [ComparisonRow((Path(address),))]
    path = Path(argument).expanduser()
    if is_run_directory(path) or is_wandb_directory(path):
        return [ComparisonRow((path,))]
    if rows := read_comparison_file(path):
        return rows
    children = sorted(path.glob("*"), key=_natural_order)
    run_dirs = [child for child in children if is_run_directory(child)]
    if run_dirs:
        return [ComparisonRow((run_dir,)) for run_dir in run_dirs]

    if not path.exists():
        raise ConfigError(f"{argument}: there is no such directory; name run directories")
    # Somebody who names the directory `wandb/` of a run means one of W&B's directories in it.
    wandb_dirs = [child for child in sorted(path.glob("*run-*")) if is_wandb_directory(child)]
    hint = f"; name a run of W&B in it, such as {wandb_dirs[0]}" if wandb_dirs else ""
    raise ConfigError(f"{argument}: not a run directory (there is no config.yaml in it, and no runs below it){hint}")


def _natural_order(path: Path) -> tuple[int, str]:
    """Sort key with 2 before 10: the points of `train -m` are called 0, 1, ... 10. Other names come first."""
    number = int(path.name) if path.name.isdecimal() else -1
    return (number, path.name)
