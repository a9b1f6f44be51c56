"""`shardtune compare`: new points over axes, run and set side by side, or runs that exist, out of their directories."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from launch.points import Plan
    from trainer.comparison.asked import Row

USAGE = """usage: shardtune compare <axes and settings> [compare.<key>=...] [to=<directory>] [--dry-run] [--json]
       shardtune compare <run directory> ... [to=<directory>] [--json]

  shardtune compare strategy=ddp,fsdp2,zero2 tuning=full,lora model.path=<dir> data.path=train.jsonl \\
      launcher.processes=2 compare.steps=50 compare.repeats=3 to=runs/strategies
  shardtune compare runs/strategies
  shardtune compare runs/ddp runs/fsdp2 runs/fsdp2-lora

With settings: takes the words of `train`, and a comma makes an axis of any of them (a literal comma is quoted:
"data.path='a,b.jsonl'"). Every point runs on the same data with the same seed and global batch, one after another, or as
one job array with launcher=slurm. A point that fails or is refused stays a row with its reason. After Ctrl-C, or with
more repeats, the same command goes on: what is done is not run again, what failed is tried once more.

  to=<directory>             the runs and the answer; default: a directory below runs/, the same for the same points
  compare.steps=N            optimizer steps of each point (or a budget.* word)
  compare.repeats=1          runs of each point, in alternating order: the table shows how far they differ
  compare.warmup=1           first steps left out of speeds, with the rest of their logging interval
  compare.skip=[strategy=zero1+tuning=full,...]           leaves out points that have all the words of a condition
  compare.where=[tuning=full+optim.lr=2e-5,tuning=lora+optim.lr=2e-4]    where a point has the first, it has the others
  compare.price_per_hour=2.5 US dollars for the device of a rank; default: that of its card in conf/hardware
  --dry-run                  list the points and what would be refused, and stop

With run directories: the first one is what the others are compared with. A directory that holds runs, as `train -m` and
`compare` leave it, stands for all of them. Nothing is computed anew; to= writes compare.md, compare.html (with the extra
`report`), compare.csv and compare.json.

  --json                     print JSON in place of tables

Ends with 64 where a word cannot be used, 75 or 130 where it was stopped, and with a run's own code where none succeeded.
docs/comparing.md says what each number is."""
SETTING = re.compile(r"[+~]{0,2}[\w./@]+=.*", re.DOTALL)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, StorageError."""
    if {"-h", "--help"} & set(argv) or not argv:
        print(USAGE)
        return 0 if argv else 64
    words = [word for word in argv if word != "--json"]
    as_json = "--json" in argv
    if any(_is_setting(word) for word in words):
        return _points(words, as_json)
    rows, to = read_words(words)
    answer(rows, to, as_json)
    return 0


def _is_setting(word: str) -> bool:
    key, assigned, _ = word.partition("=")
    return bool(assigned) and key != "to" and SETTING.fullmatch(word) is not None and not Path(word).exists()


def _points(argv: list[str], as_json: bool) -> int:
    from launch.points import STOPPED, plan_points, run_points
    from trainer.stopping.signals import hold, release

    dry_run = "--dry-run" in argv
    words = [word for word in argv if word != "--dry-run" and not word.startswith("to=")]
    problems: list[str] = []
    given: Path | None = None
    for word in argv:
        given = _read_to(word, given, problems) if word.startswith("to=") else given
    problems += [
        f"{word}: there is no such flag; compare takes --dry-run, --json and --help"
        if word.startswith("-")
        else f"{word}: not of the form key=value; name runs that exist, or settings of new ones, not both"
        for word in words
        if not _is_setting(word)
    ]
    if problems:
        raise ConfigError(problems)
    if not dry_run:
        hold()
    plan = plan_points(words)
    to = given or Path("runs") / plan.name
    if (to / "config.yaml").exists():
        raise ConfigError(f"to={to}: is the directory of a run; name another one")
    if dry_run:
        print(listing(plan, to))
        return 0
    print(listing(plan, to), file=sys.stderr, flush=True)
    code = run_points(plan, to)
    release()
    if code in STOPPED:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
    answer(plan.rows(to), to, as_json)
    return code


def _read_to(word: str, before: Path | None, problems: list[str]) -> Path:
    value = word.partition("=")[2]
    to = Path(value).expanduser()
    if before is not None:
        problems.append(f"{word}: to is given twice; name one directory")
    elif not value:
        problems.append("to=: names no directory; write to=reports/sweep, or leave it out")
    elif to.exists() and not to.is_dir():
        problems.append(f"{word}: is a file; name a directory")
    return to


def listing(plan: Plan, to: Path) -> str:
    """The points, and which of them cannot be run."""
    settings, width = plan.settings, max(len(point.name) for point in plan.points)
    times = f", each {settings.repeats} times in alternating order" if settings.repeats > 1 else ""
    lines = [f"{len(plan.points)} points in {to}{times}"]
    for point in plan.points:
        lines.append(f"  {point.name:<{width}}  {' '.join(point.words)}")
        lines += [f"  {'':<{width}}  refused: {problem}" for problem in point.refused]
    if plan.left_out:
        lines.append(f"left out by compare.skip and compare.where: {plan.left_out}")
    return "\n".join(lines)


def answer(rows: list[Row], to: Path | None, as_json: bool) -> None:
    """Print what the rows say, and write it into `to`. Errors: ConfigError, StorageError."""
    from launch.compare_answer import as_csv, as_dict, as_html, as_markdown, text
    from trainer.comparison.compare import compare
    from trainer.comparison.page import missing
    from trainer.comparison.workspace import script as workspace_script
    from trainer.records.status import write_text_atomic

    found = compare(rows, price_of)
    script = None if to is None else workspace_script(found, to)
    said = json.dumps(as_dict(found), indent=1, allow_nan=False)
    lacks = missing()
    if to is not None:
        write_text_atomic(to / "compare.md", as_markdown(found))
        write_text_atomic(to / "compare.csv", as_csv(found))
        write_text_atomic(to / "compare.json", said + "\n")
        if lacks is None:
            write_text_atomic(to / "compare.html", as_html(found))
        if script is not None:
            write_text_atomic(to / "workspace.py", script)
    print(said if as_json else text(found), flush=True)
    if to is not None and not as_json:
        page = "compare.html, " if lacks is None else ""
        more = ", workspace.py (for W&B)" if script is not None else ""
        print(
            f"\nwritten: {to / 'compare.md'}, {page}compare.csv, compare.json{more}" + (f"\n{lacks}" if lacks else "")
        )


def price_of(device: str) -> float | None:
    """US dollars an hour for a card, by its driver's name; None where conf/hardware does not say."""
    import yaml

    from launch.choices import CONF_DIR, OF_PLANS

    for file in sorted((CONF_DIR / OF_PLANS).glob("*.yaml")):
        card = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if card.get("name") == device:
            return card.get("price_per_hour")  # type: ignore[no-any-return]
    return None


def read_words(words: list[str]) -> tuple[list[Row], Path | None]:
    """(rows of runs that exist, where to write). Raises ConfigError with every problem."""
    from trainer.comparison.asked import Row, read_rows
    from trainer.comparison.reading import is_run

    problems: list[str] = []
    found: list[Row] = []
    to: Path | None = None
    for word in words:
        path = Path(word).expanduser()
        if word.startswith("to="):
            to = _read_to(word, to, problems)
        elif is_run(path):
            found.append(Row((path,)))
        elif rows := read_rows(path):
            found += rows
        elif inner := [child for child in sorted(path.glob("*"), key=_in_order) if is_run(child)]:
            found += [Row((child,)) for child in inner]
        elif word.startswith("-"):
            problems.append(f"{word}: there is no such flag; compare takes --json and --help")
        elif path.exists():
            problems.append(f"{word}: not a run directory (there is no config.yaml in it, and no runs below it)")
        else:
            problems.append(f"{word}: there is no such directory; name run directories")
    paths = [path for row in found for path in row.directories]
    doubled = {path for path in paths if sum(path.resolve() == other.resolve() for other in paths) > 1}
    problems += [f"{path}: named twice; name each run once" for path in sorted(doubled)]
    if not found and not problems:
        problems.append("no run directory is named; shardtune compare runs/a runs/b")
    if problems:
        raise ConfigError(problems)
    return found, to


def _in_order(path: Path) -> tuple[int, str]:
    """Points of `train -m` are called 0, 1, ... 10."""
    return (int(path.name) if path.name.isdecimal() else -1, path.name)
