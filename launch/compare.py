"""`shardtune compare`: runs that exist side by side, out of their directories."""

from __future__ import annotations

import json
from pathlib import Path

from strategies.errors import ConfigError

USAGE = """usage: shardtune compare <run directory> ... [to=<directory>] [--json]

  shardtune compare runs/ddp runs/fsdp2 runs/fsdp2-lora
  shardtune compare runs/sweep to=reports/sweep

The first run is what the others are compared with. A directory that holds runs, as `train -m` leaves, stands for all of
them. Failed, preempted and unfinished runs stay rows, with their reason. Nothing is computed anew, and nothing is
written unless you ask for it.

  to=<directory>     write compare.md, compare.csv and compare.json there
  --json             print JSON in place of tables

Ends with 64 where a word is no run directory. docs/comparing.md says what each number is."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Errors: ConfigError, StorageError."""
    if {"-h", "--help"} & set(argv) or not argv:
        print(USAGE)
        return 0 if argv else 64
    directories, to = read_words([word for word in argv if word != "--json"])
    from launch.compare_answer import as_csv, as_dict, as_markdown, text
    from trainer.comparison.compare import compare
    from trainer.records.status import write_text_atomic

    found = compare(directories)
    as_json = json.dumps(as_dict(found), indent=1, allow_nan=False)
    if to is not None:
        write_text_atomic(to / "compare.md", as_markdown(found))
        write_text_atomic(to / "compare.csv", as_csv(found))
        write_text_atomic(to / "compare.json", as_json + "\n")
    print(as_json if "--json" in argv else text(found), flush=True)
    if to is not None and "--json" not in argv:
        print(f"\nwritten: {to / 'compare.md'}, compare.csv, compare.json")
    return 0


def read_words(words: list[str]) -> tuple[list[Path], Path | None]:
    """(the run directories, where to write). Raises ConfigError with every problem."""
    from trainer.comparison.reading import is_run

    problems: list[str] = []
    found: list[Path] = []
    to: Path | None = None
    for word in words:
        key, assigned, value = word.partition("=")
        path = Path(word).expanduser()
        if key == "to" and assigned:
            twice = to is not None
            to = Path(value).expanduser()
            if twice:
                problems.append(f"{word}: to is given twice; name one directory")
            elif not value:
                problems.append("to=: names no directory; write to=reports/sweep, or leave it out")
            elif to.exists() and not to.is_dir():
                problems.append(f"{word}: is a file; name a directory")
        elif is_run(path):
            found.append(path)
        elif inner := [child for child in sorted(path.glob("*"), key=_in_order) if is_run(child)]:
            found += inner
        elif word.startswith("-"):
            problems.append(f"{word}: there is no such flag; compare takes --json and --help")
        elif assigned and not path.exists():
            problems.append(
                f"{word}: compare reads runs that exist; run the points first, with `shardtune train -m ... "
                "run.dir=runs/sweep`, then `shardtune compare runs/sweep`"
            )
        elif path.exists():
            problems.append(f"{word}: not a run directory (there is no config.yaml in it, and no runs below it)")
        else:
            problems.append(f"{word}: there is no such directory; name run directories")
    doubled = {path for path in found if sum(path.resolve() == other.resolve() for other in found) > 1}
    problems += [f"{path}: named twice; name each run once" for path in sorted(doubled)]
    if not found and not problems:
        problems.append("no run directory is named; shardtune compare runs/a runs/b")
    if problems:
        raise ConfigError(problems)
    return found, to


def _in_order(path: Path) -> tuple[int, str]:
    """Points of `train -m` are called 0, 1, ... 10."""
    return (int(path.name) if path.name.isdecimal() else -1, path.name)
