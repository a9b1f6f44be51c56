"""Writes the tables of the lessons' experiments into the pages, and the page that lists them. Edit neither: measure anew.

    python docs/make_experiments.py

A page has a table between `<!-- begin experiment: NAME -->` and `<!-- end -->`. NAME is an experiment of
`benchmarks/course/experiments.py`. Nothing stands there before it has been measured (`python benchmarks/course NAME`).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.course.experiments import EXPERIMENTS, Column, Experiment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "course"
LIST = RESULTS / "README.md"
MARKED = re.compile(r"(<!-- begin experiment: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BEFORE = "before tuning"
NONE = "none"
"""The difference of two points of which each has a seed that is between the seeds of the other."""
HEAD = """# The experiments of the lessons

This page lists the small experiments of the lessons, with real models and real data. Use it to repeat an experiment, and to see
what the experiment shows and what it does not show.

```bash
make bench-course                                  # all that is not kept here: hours on one core
python benchmarks/course dirty --seeds 1           # one experiment, one seed
python docs/make_experiments.py                    # then write the tables into the pages
```

- **Models.** SmolLM2-135M-Instruct is trained on text, and all-MiniLM-L6-v2 (22.7 million parameters) on labels. Both come from
  pinned packages of the Python package index (`launch/demo/embedded.py`).
- **Data.** *Notes* are conversations of at most 128 tokens from MTS-Dialog, each with a section of the clinical note.
  *Questions* are from medical exams (MedMCQA), each with its specialty. `benchmarks/course/data.py` draws the rows.
- **Size.** A run takes seconds to a minute on one core. So the experiments are too small to predict the numbers of a larger
  run.
- **Seeds.** Every run of a table is repeated with three seeds. The seed sets the order of rows, the new weights, and the rows
  that are drawn.
- **Differences.** A cell has the mean, with the lowest and the highest seed in brackets. A difference is reported only if all
  seeds of one run are below all seeds of the other. Otherwise the table says *none*. Even if two runs are equally good, three
  seeds of each are separated by chance in 10 of 100 cases. So repeat with more seeds before you base a decision on a small
  difference.
- **Files.** Each experiment has a JSON file with the settings and numbers of every run. Most also have the result of `shardtune
  compare` over all runs. If each seed has its own rows, `compare` treats every run as a different job. Then its verdicts are
  about single runs, and only the tables on this page are about seeds.
"""


def record_of(name: str) -> dict[str, Any] | None:
    """What is kept of an experiment; None if one of its points has not been measured."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    is_complete = all(record["points"].get(point) for point in EXPERIMENTS[name].points)
    return record if is_complete else None


def values_of(runs: dict[str, dict[str, Any]], key: str) -> list[float]:
    """A number of every run of a point that has it, one for each seed."""
    return [run[key] for run in runs.values() if key in run]


def cell(values: list[float], digits: int) -> str:
    """Mean (lowest to highest) of the seeds."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    low = f"{min(values):,.{digits}f}"
    high = f"{max(values):,.{digits}f}"
    return f"{mean} ({low} to {high})" if low != high else mean


def difference(column: Column, values: list[float], others: list[float]) -> str:
    """How far the mean of `values` is from that of `others`, and whether that is better.

    `none` if their ranges meet, and `-` if a single seed has no range.
    """
    if len(values) < 2 or len(others) < 2:
        return "-"
    if max(values) >= min(others) and min(values) <= max(others):
        return NONE
    change = statistics.fmean(values) - statistics.fmean(others)
    verdict = "better" if (change > 0) == column.greater_is_better else "worse"
    return f"{change:+.{column.digits}f}, {verdict}"


def table(experiment: Experiment, record: dict[str, Any]) -> str:
    """The table of an experiment, with the line below it that says how it was made."""
    judged = experiment.columns[0]
    points: dict[str, dict[str, dict[str, Any]]] = record["points"]
    baseline = next(iter(experiment.points))
    baseline_values = values_of(points[baseline], judged.key)
    titles = [
        "run",
        judged.title,
        f"difference from *{baseline}*",
        *(column.title for column in experiment.columns[1:]),
    ]
    lines = [table_row(titles), table_row(["---"] * len(titles))]
    before = {column.key: values_before(points, column) for column in experiment.columns}
    if before[judged.key]:
        apart = difference(judged, before[judged.key], baseline_values)
        cells = [BEFORE, cell(before[judged.key], judged.digits), apart]
        cells += [cell(before[column.key], column.digits) for column in experiment.columns[1:]]
        lines.append(table_row(cells))
    for point in experiment.points:
        runs = points[point]
        values = values_of(runs, judged.key)
        apart = "-" if point == baseline else difference(judged, values, baseline_values)
        cells = [point, cell(values, judged.digits), apart]
        cells += [cell(values_of(runs, column.key), column.digits) for column in experiment.columns[1:]]
        lines.append(table_row(cells))
    return "\n".join([*lines, "", caption(experiment, points)])


def values_before(points: dict[str, dict[str, dict[str, Any]]], column: Column) -> list[float]:
    """A number before the first step, of every run that measured it."""
    values = []
    for runs in points.values():
        values += values_of(runs, f"before/{column.key}")
    return values


def caption(experiment: Experiment, points: dict[str, dict[str, dict[str, Any]]]) -> str:
    """How the table was made: seeds, time, failures, and where the numbers are."""
    runs = []
    for of_point in points.values():
        runs += of_point.values()
    failed = sum("failed" in run for run in runs)
    seconds = [run["cpu_s"] for run in runs if "cpu_s" in run]
    text = f"**Setup:** {experiment.setting} {spread_words(points)}"
    if failed:
        text += f" Failed runs: {failed}."
    if seconds:
        text += f" A run took {min(seconds):.0f} to {max(seconds):.0f} CPU seconds."
    return text


def spread_words(points: dict[str, dict[str, dict[str, Any]]]) -> str:
    """How many seeds there are, and how the table shows them."""
    fewest = min(len(runs) for runs in points.values())
    most = max(len(runs) for runs in points.values())
    if most == 1:
        return "Each run has one seed."
    many = f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
    return (
        f"Each cell is the mean of {many} (lowest to highest). *{NONE}* means that the ranges of the two runs overlap, so no "
        "difference is shown."
    )


def table_row(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def measured_table(name: str) -> str:
    """The table of an experiment with a line's end; empty if it has not been measured. Raises SystemExit for an unknown name."""
    if name not in EXPERIMENTS:
        raise SystemExit(f"experiment {name}: is not in benchmarks/course/experiments.py")
    record = record_of(name)
    if record is None:
        return ""
    return table(EXPERIMENTS[name], record) + "\n"


def page(text: str) -> str:
    """A page with the tables of its experiments made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{measured_table(match[2])}{match[3]}", text)


def pages() -> list[Path]:
    """Every page that has a table of an experiment."""
    candidates = sorted((ROOT / "docs").rglob("*.md"))
    return [path for path in candidates if MARKED.search(path.read_text(encoding="utf-8"))]


def list_page() -> str:
    """`benchmarks/results/course/README.md`: every measured experiment with its table."""
    parts = [HEAD]
    for experiment in EXPERIMENTS.values():
        record = record_of(experiment.name)
        if record is None:
            continue
        versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
        files = f"[{experiment.name}.json]({experiment.name}.json)"
        if (RESULTS / experiment.name / "compare.md").is_file():
            files += f", [comparison]({experiment.name}/compare.md)"
        parts += [
            f"## {experiment.name}\n",
            f"{experiment.question}\n",
            f"{table(experiment, record)}\n",
            *([f"- **Shows:** {experiment.shows}"] if experiment.shows else []),
            f"- **Does not show:** {experiment.limits}",
            f"- **Command:** `python benchmarks/course {experiment.name}`",
            f"- **Machine:** {record['hardware']}. {versions}.",
            f"- **Files:** {files}\n",
        ]
    return "\n".join(parts)


def main() -> None:
    """Write all pages."""
    LIST.write_text(list_page(), encoding="utf-8")
    for path in pages():
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
