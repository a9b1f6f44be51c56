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
from launch.config.prices import gpu_hour_price
from launch.config.verb_arguments import (
    VerbArguments,
    asks_for_help,
    flag,
    forwarded_settings,
    help_rows,
    option,
    positionals,
    read_arguments,
    setting_group_help_rows,
)
from launch.output import TableColumn, TableRow, format_table, wrap_sentences, wrap_text
from strategies import exit_codes
from strategies.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from launch.compare.comparison import Comparison
    from launch.compare.points import PointsPlan
    from launch.compare.settings import PointSource


@dataclass(kw_only=True)
class CompareArguments(VerbArguments):
    """What `shardtune compare` takes."""

    runs: list[str] = positionals()
    to: Path | None = option(
        "the directory for the runs and the answer; default: one below runs/, the same for the same points",
        example="<directory>",
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

With settings, compare runs every combination (point) and puts the results into one table. It takes the settings of
`train`. Several values with commas between them make an axis: strategy=ddp,fsdp2. If a value contains a comma, quote
it: "data.path='a,b.jsonl'".

All points use the same data, seed and global batch. They run one after another, or as one job array with
launcher=slurm. A point that fails or is refused stays in the table with its reason. After Ctrl-C, or with more
repeats, the same command continues: finished points are not run again, and failed ones are tried once more.

{help_rows(CompareArguments, setting_group_help_rows("compare", CompareConfig))}

With run directories, compare reads runs that exist and computes nothing anew. The first run is the baseline. A
directory that holds runs (from `train -m` or `compare`) stands for all of them. You can also name a run by W&B's own
directory (runs/a/wandb/offline-run-...), as wandb:<entity>/<project>/<run id>, or by the address of its page.

to= writes compare.md, compare.html, compare.csv and compare.json. With the extra `report` compare.html has plots, and
plots/*.png are written. The page of a single run is its report.html, also without to=.

The exit code is 64 if an argument cannot be used, 75 or 130 if compare was stopped, and a run's own code if no run
succeeded. docs/reference/comparisons.md explains each number."""


def main(argv: list[str]) -> int:
    """Run `shardtune compare` with the arguments behind it: start new runs if there are settings, else compare runs that exist.

    Returns the exit code. Raises ConfigError with all problems of the arguments, StorageError.
    """
    if asks_for_help(argv) or not argv:
        show_help(USAGE)
        return 0 if argv else exit_codes.WRONG_SETTING
    arguments, problems = read_arguments("compare", CompareArguments, argv)
    if arguments.to is not None and arguments.to.exists() and not arguments.to.is_dir():
        problems.append(f"to={arguments.to}: is a file; name a directory")
    # With settings the command starts new runs; with directories alone it reads runs that exist.
    if arguments.settings:
        for run in arguments.runs:
            problems.append(
                f"{run}: not of the form key=value; name runs that exist, or settings of new ones, not both"
            )
        if problems:
            raise ConfigError(problems)
        return _compare_new_points(arguments)

    if arguments.dry_run:
        problems.append("--dry-run: lists points of new runs; name an axis, as in strategy=ddp,fsdp2, or leave it out")
    sources, run_problems = point_sources_from_arguments(arguments.runs)
    problems += run_problems
    if problems:
        raise ConfigError(problems)
    if arguments.follow:
        # The page of a comparison that was run by `compare` belongs into its directory.
        follow_runs(sources, arguments.to or _only_comparison_dir(arguments.runs), as_json=arguments.as_json)
    else:
        print_and_write_comparison(sources, arguments.to, as_json=arguments.as_json)
    return 0


def follow_runs(sources: list[PointSource], output_dir: Path | None, *, as_json: bool) -> None:
    """Show a comparison while its runs train (`--follow`): rewrite the HTML page, and write all files when they have ended.

    `sources`: where the runs of each point are. `output_dir`: where `compare.html` goes. None for a single run, whose page
    is `report.html` in its own directory.

    Raises ConfigError for runs of W&B, and for several runs without `output_dir`; StorageError; KeyboardInterrupt after
    Ctrl-C.
    """
    from launch.compare.follow import PAGE_INTERVAL_S, rewrite_page_while_runs_train

    run_dirs: list[Path] = []
    for source in sources:
        run_dirs += source.directories
    _refuse_wandb_runs(run_dirs)
    page_path = _page_path(sources, output_dir)
    if page_path is None:
        raise ConfigError("--follow: name a directory for the page that is written again; to=reports/now")

    # On stderr: with --json, stdout holds nothing but the JSON of the comparison.
    print(
        f"{page_path}: written every {PAGE_INTERVAL_S:.0f} s until all runs have ended; Ctrl-C ends it",
        file=sys.stderr,
        flush=True,
    )
    rewrite_page_while_runs_train(run_dirs, lambda reload_after_s: _write_page(sources, page_path, reload_after_s))
    # Now that all have ended, the files that are not the page, too.
    print_and_write_comparison(sources, output_dir, as_json=as_json)


def _refuse_wandb_runs(run_dirs: list[Path]) -> None:
    """Raise ConfigError if a run that `--follow` should watch is read from W&B's files or server.

    Reading such a run starts a process of wandb, or asks a server: too much for every few seconds.
    """
    from launch.compare.wandb_files import is_wandb_address, is_wandb_directory

    for run_dir in run_dirs:
        if is_wandb_directory(run_dir) or is_wandb_address(run_dir):
            raise ConfigError(f"--follow: {run_dir} is of W&B, which is not asked again and again; name its run.dir")


def _page_path(sources: list[PointSource], output_dir: Path | None) -> Path | None:
    """Where the HTML page of the command goes, or None if it writes none. The first case that applies:

    - With `output_dir`: `compare.html` in it.
    - For several points or repeats: None.
    - For a run of W&B: None.
    - For a single run: `report.html` in its directory.
    """
    from launch.compare.run_report import REPORT_FILE
    from launch.compare.wandb_files import is_wandb_address, is_wandb_directory

    if output_dir is not None:
        return output_dir / "compare.html"
    if len(sources) != 1 or len(sources[0].directories) != 1:
        return None
    (run_dir,) = sources[0].directories
    # No page into W&B's own directory: wandb would upload it with the run.
    if is_wandb_directory(run_dir) or is_wandb_address(run_dir):
        return None
    return run_dir / REPORT_FILE


def _write_page(sources: list[PointSource], page_path: Path, reload_after_s: float | None) -> None:
    """Read the runs as they are now, and write their HTML page.

    A browser reloads the page after `reload_after_s` seconds; None for a page that will not change any more.
    """
    from launch.compare.answer import comparison_html
    from launch.compare.comparison import compare_points
    from trainer.reporting.status import write_text_atomic

    comparison = compare_points(sources, gpu_hour_price)
    write_text_atomic(page_path, comparison_html(comparison, reload_after_s=reload_after_s))


def _only_comparison_dir(named_runs: list[str]) -> Path | None:
    """The directory of an earlier comparison (it has a `comparison.json`), if that is the only argument; else None."""
    from trainer.reporting.shared_choice import COMPARISON_FILE

    if len(named_runs) != 1:
        return None
    directory = Path(named_runs[0]).expanduser()
    return directory if (directory / COMPARISON_FILE).is_file() else None


def _compare_new_points(arguments: CompareArguments) -> int:
    """Run every point (combination of settings) of the command line, then print and write the comparison.

    With `--dry-run`, only list the points. With `--follow`, the page is also rewritten while the runs train. Returns the
    exit code of the runs; 0 for a list.
    """
    from launch.compare.follow import PeriodicPage
    from launch.compare.points import plan_points, run_planned_points
    from trainer.stopping.signals import block_signals, unblock_signals

    if not arguments.dry_run:
        block_signals()  # keep a signal that comes before the first run for that run, so that Ctrl-C stops it as it stops `train`
    plan = plan_points(arguments.settings)
    output_dir = arguments.to or Path("runs") / plan.name
    # Else the files of the comparison would lie among those of a run.
    if (output_dir / "config.yaml").exists():
        raise ConfigError(f"to={output_dir}: is the directory of a run; name another one")
    if arguments.dry_run:
        print(points_listing(plan, output_dir))
        return 0
    print(points_listing(plan, output_dir), file=sys.stderr, flush=True)
    sources = plan.point_sources(output_dir)
    periodic_page = None
    if arguments.follow:
        page_path = output_dir / "compare.html"
        periodic_page = PeriodicPage(lambda reload_after_s: _write_page(sources, page_path, reload_after_s))
    exit_code = run_planned_points(plan, output_dir, periodic_page)
    unblock_signals()  # from here on, a signal ends this command at once
    if exit_code in exit_codes.STOPPED_CODES:
        print("stopped; the same command continues", file=sys.stderr, flush=True)

    if arguments.follow and exit_code == 0:  # SLURM may still be running the points
        follow_runs(sources, output_dir, as_json=arguments.as_json)
    else:
        print_and_write_comparison(sources, output_dir, as_json=arguments.as_json)
    return exit_code


def points_listing(plan: PointsPlan, output_dir: Path) -> str:
    """List the planned points for the terminal: name and axis values of each, and why a refused one cannot run.

    Below them stand lines on settings that only some points have, and how many points the conditions leave out.
    """
    settings = plan.settings
    heading = f"{len(plan.points)} points in {output_dir}"
    if settings.repeats > 1:
        heading += f", each {settings.repeats} times in alternating order"
    rows = []
    for point in plan.points:
        remark = plan.learning_rate_remark(point)
        arguments = " ".join(filter(None, [*point.arguments, remark]))
        refusal_lines = wrap_sentences([f"refused: {refusal}" for refusal in point.refusals], indent=4)
        rows.append(TableRow((point.name, arguments), refusal_lines))
    lines = [heading, *format_table((TableColumn(), TableColumn()), rows, indent=2), *plan.lines_on_partial_settings]
    if plan.num_left_out:
        lines.append(f"left out by compare.skip and compare.where: {plan.num_left_out}")
    return "\n".join(lines)


def print_and_write_comparison(sources: list[PointSource], output_dir: Path | None, *, as_json: bool) -> None:
    """Compare runs and deliver the result: print the tables (or JSON), write the files, and print which ones were written.

    `sources`: where the runs of each point are. `output_dir`: where all files go. Without it only a single run gets files,
    in its own directory: the page `report.html` and the script that shows it in W&B.

    Raises ConfigError if a run cannot be read, StorageError if a file of `output_dir` cannot be written.
    """
    from launch.compare.answer import comparison_text
    from launch.compare.answer_records import comparison_as_dict
    from launch.compare.comparison import compare_points

    comparison = compare_points(sources, gpu_hour_price)
    comparison_json = comparison_as_dict(comparison)
    written_files: list[str] = []
    run_page_path = None
    if output_dir is None:
        run_page_path = _page_path(sources, output_dir=None)
    else:
        written_files = _write_comparison_files(comparison, comparison_json, output_dir)

    if as_json:
        print(json.dumps(comparison_json, indent=1, allow_nan=False), flush=True)
    else:
        print(comparison_text(comparison), flush=True)
    # The page comes after the tables: writing into somebody else's directory may fail, and then the tables are there already.
    if run_page_path is not None:
        written_files = _write_run_files(comparison, run_page_path)
    if as_json or (output_dir is None and run_page_path is None):
        return
    page_name = "compare.html" if run_page_path is None else run_page_path.name
    _print_written_files(comparison, written_files, page_name, explain_missing_workspace=output_dir is not None)


def _print_written_files(
    comparison: Comparison, written_files: list[str], page_name: str, *, explain_missing_workspace: bool
) -> None:
    """Print the last lines of the command: which files were written, and why there are no plots or no W&B script.

    `page_name`: of the HTML page, which lacks the plots if their packages are not installed. `explain_missing_workspace`:
    whether to say why there is no W&B script; a single run without `to=` gets no explanation.
    """
    from launch.compare.page import missing_packages_message
    from launch.compare.workspace import no_workspace_reason

    lines = []
    if written_files:
        lines.append(f"written: {', '.join(written_files)}")
    no_plots_reason = missing_packages_message(f"{page_name} with plots")
    if no_plots_reason:
        lines.append(no_plots_reason)
    workspace_problem = no_workspace_reason(comparison.points)
    if workspace_problem and explain_missing_workspace:
        lines += wrap_text(workspace_problem, 0)
    print("\n" + "\n".join(lines), flush=True)


def _write_comparison_files(comparison: Comparison, comparison_json: dict[str, Any], output_dir: Path) -> list[str]:
    """Write every file of the comparison into `output_dir`; returns their names for the line `written: ...`.

    Without the packages of the extra `report`, no plots are written, and the page has none.
    """
    from launch.compare.answer import comparison_html, comparison_markdown
    from launch.compare.answer_records import comparison_csv
    from launch.compare.page import missing_packages_message, write_plot_images
    from launch.compare.workspace import write_workspace_script
    from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY
    from trainer.reporting.status import write_text_atomic

    # The plots first: the Markdown page shows their pictures.
    can_plot = missing_packages_message() is None
    plot_images = write_plot_images(comparison, output_dir) if can_plot else []
    versioned_json = {VERSION_KEY: FILE_VERSION, **comparison_json}
    write_text_atomic(output_dir / "compare.md", comparison_markdown(comparison, plot_images))
    write_text_atomic(output_dir / "compare.csv", comparison_csv(comparison))
    write_text_atomic(output_dir / "compare.json", json.dumps(versioned_json, indent=1, allow_nan=False) + "\n")
    write_text_atomic(output_dir / "compare.html", comparison_html(comparison))

    # Only the first name has the directory: all files are in the same one.
    written_files = [str(output_dir / "compare.md"), "compare.html", "compare.csv", "compare.json"]
    if plot_images:
        written_files.append(f"plots/*.png ({len(plot_images)})")
    workspace_file = write_workspace_script(comparison, output_dir)
    if workspace_file is not None:
        written_files.append(f"{workspace_file} (for W&B)")
    return written_files


def _write_run_files(comparison: Comparison, page_path: Path) -> list[str]:
    """Write the page of a single run and the script that shows the run in W&B into its run directory; returns the written files.

    `page_path`: `report.html` in that directory. If writing fails, that is printed and no error: the comparison itself has
    succeeded, and the directory may be somebody else's.
    """
    from launch.compare.run_report import write_run_report
    from launch.compare.workspace import write_workspace_script

    run_dir = page_path.parent
    written_files = []
    try:
        written_files.append(str(write_run_report(run_dir, comparison)))
        workspace_file = write_workspace_script(comparison, run_dir)
    except StorageError as error:
        print(f"{error}; to=<directory> writes elsewhere", file=sys.stderr, flush=True)
        return written_files
    if workspace_file is not None:
        written_files.append(f"{workspace_file} (for W&B)")  # in the same directory as the page
    return written_files


def point_sources_from_arguments(arguments: list[str]) -> tuple[list[PointSource], list[str]]:
    """Find the runs that the arguments of `shardtune compare` name. Returns (where the runs of each point are, error messages).

    An argument is a run directory, a directory of runs, or a run of W&B. It is an error to name no run, or one twice.
    """
    problems: list[str] = []
    sources: list[PointSource] = []
    for argument in arguments:
        try:
            sources += _point_sources_of_argument(argument)
        except ConfigError as error:
            problems += error.problems

    run_dirs: list[Path] = []
    for source in sources:
        run_dirs += source.directories
    # Resolved, so that a link and its target count as one run.
    counts = Counter(run_dir.resolve() for run_dir in run_dirs)
    repeated_run_dirs = {run_dir for run_dir in run_dirs if counts[run_dir.resolve()] > 1}
    problems += [f"{run_dir}: named twice; name each run once" for run_dir in sorted(repeated_run_dirs)]
    if not sources and not problems:
        problems.append("no run directory is named; shardtune compare runs/a runs/b")
    return sources, problems


def _point_sources_of_argument(argument: str) -> list[PointSource]:
    """Find the runs that one argument of the command names: a source for each point, at least one. The first case that applies:

    - a run on W&B's server, a run directory, or W&B's own directory of a run: one point
    - a directory with a `comparison.json`: the points of that comparison
    - a directory of run directories: a point for each

    Raises ConfigError if it is none of these.
    """
    from launch.compare.run_files import is_run_directory
    from launch.compare.settings import PointSource, read_comparison_file
    from launch.compare.wandb_files import is_wandb_directory, wandb_address
    from launch.runs.status import number_aware_order

    address = wandb_address(argument)
    if address is not None:
        return [PointSource((Path(address),))]
    path = Path(argument).expanduser()
    if is_run_directory(path) or is_wandb_directory(path):
        return [PointSource((path,))]
    if sources_of_comparison := read_comparison_file(path):
        return sources_of_comparison
    children = sorted(path.glob("*"), key=lambda child: number_aware_order(child.name))
    if child_run_dirs := [child for child in children if is_run_directory(child)]:
        return [PointSource((run_dir,)) for run_dir in child_run_dirs]

    if not path.exists():
        raise ConfigError(f"{argument}: there is no such directory; name run directories")
    # Somebody who names the directory `wandb/` of a run means one of W&B's directories in it.
    wandb_dirs = [child for child in sorted(path.glob("*run-*")) if is_wandb_directory(child)]
    hint = f"; name a run of W&B in it, such as {wandb_dirs[0]}" if wandb_dirs else ""
    raise ConfigError(f"{argument}: not a run directory (there is no config.yaml in it, and no runs below it){hint}")
