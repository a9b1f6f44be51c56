"""Writes the tables of `docs/evidence/plans.md` from `planning.json` and `planning_no_fit.json` of `benchmarks/results`.

`python -m benchmarks.planning` makes these.

python docs/make_planning.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "evidence" / "plans.md"
MEASURED = ROOT / "benchmarks" / "results" / "planning.json"
NO_FIT = MEASURED.with_name("planning_no_fit.json")
BEGIN, END = "<!-- made by docs/make_planning.py from benchmarks/results/planning.json -->", "<!-- end -->"
SHOWN = 20
"""Rows of the second table; the file has all."""


def percent(value: float | None) -> str:
    """With its sign, `-` where there is none."""
    return "-" if value is None else f"{value + 0.0:+.1f} %"


def row(one: dict[str, Any], *predicted: str) -> str:
    """A line of a table; `predicted` are the keys of its predictions."""
    size = f"{one['micro_batch']} x {int(one['seq']):,}"
    speed = one["measured_tokens_per_s_per_gpu"]
    cells = [one["id"], one["model"], one["method"], size, f"{one['measured_gib']:.2f}"]
    cells += [f"{one[key]:.2f}" for key in predicted] + [percent(one["off_percent"])]
    cells += ["-" if speed is None else f"{speed:,.0f}", percent(one["speed_off_percent"])]
    return f"| {' | '.join(cells)} |"


def table(rows: list[dict[str, Any]], *predicted: tuple[str, str]) -> list[str]:
    """A table of these rows; `predicted` are (key, title)."""
    titles = [
        "row",
        "model",
        "tuning",
        "rows x tokens",
        "measured GiB",
        *(title for _, title in predicted),
        "error of GiB",
    ]
    titles += ["measured tokens/s", "error of tokens/s"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return lines + [row(one, *(key for key, _ in predicted)) for one in rows]


def said(rows: list[dict[str, Any]]) -> str:
    """How far these rows are off, in memory and speed."""
    off, speeds = [one["off_percent"] for one in rows], [one["speed_off_percent"] for one in rows]
    sizes, known = [abs(each) for each in off], [each for each in speeds if each is not None]
    text = f"{len(rows)} rows. The median error of the predicted memory is {statistics.median(sizes):.1f} % "
    text += f"({statistics.median(off):+.1f} % if errors above and below cancel each other). It is at most 10 % in "
    text += f"{sum(each <= 10 for each in sizes)} rows, and {max(sizes):.1f} % in the worst row."
    if known:
        text += f" The median error of the predicted tokens/s is {statistics.median(known):+.1f} %, "
        text += f"and the errors are between {min(known):+.1f} and {max(known):+.1f} %."
    return text


def section(found: dict[str, Any]) -> list[str]:
    """What stands between the marks."""
    one_gpu = [one for one in found["rows"] if one["strategy"] == "single"]
    own = [one for one in one_gpu if one["own_kind"]]
    others = [one for one in one_gpu if not one["own_kind"]]
    left = [one for one in found["left_out"] if one["why"] != NO_EQUAL]
    lines = [
        f"**Trainers that, like shardtune, store no logits:** {said(own)} The table begins with the largest error:",
        "",
    ]
    lines += table(own, ("predicted_gib", "predicted GiB"))
    lines += [
        "",
        f"**Other trainers on one GPU:** {said(others)} The table has the {min(SHOWN, len(others))} rows with the largest "
        "errors of memory; the JSON file has all rows:",
        "",
    ]
    lines += table(
        others[:SHOWN], ("predicted_gib", "GiB with shardtune"), ("as_theirs_gib", "GiB with the other trainer")
    )
    lines += ["", *died(json.loads(NO_FIT.read_text(encoding="utf-8"))["rows"])]
    if left:
        lines += ["", f"Left out: {'; '.join(one['id'] + ': ' + one['why'] for one in left)}."]
    return lines


def died(rows: list[dict[str, Any]]) -> list[str]:
    """Runs that ended without a result, and whether they are predicted to fit; the wrong ones first."""
    theirs, ours = (sum(one[key] for one in rows) for key in ("as_theirs_fits", "predicted_fits"))
    own = [one["as_theirs_fits"] for one in rows if not one["holds_logits"] and one["method"] != "full"]
    lines = [
        f"**Runs on one GPU that probably ran out of memory:** {len(rows)} runs. With a plan's allowances, {theirs} of them is "
        f"predicted to fit as the other trainer runs it, which is wrong. As shardtune would run them, {ours} are predicted to "
        f"fit. {len(own)} of the runs adapt a frozen base and store no logits, as shardtune does. Of these, {sum(own)} are "
        "predicted to fit. The table begins with the lowest prediction:",
        "",
        "| row | model | tuning | framework | rows x tokens | GiB of the GPU | GiB with shardtune | GiB with the other trainer "
        "| predicted to fit |",
        f"|{'---|' * 9}",
    ]
    for one in rows:
        size = f"{one['micro_batch']} x {int(one['seq']):,}"
        verdict = "yes, wrongly" if one["as_theirs_fits"] else "no"
        cells = [one["id"], one["model"], one["method"], one["framework_config"], size, f"{one['card_gib']:.2f}"]
        cells += [f"{one['predicted_gib']:.2f}", f"{one['as_theirs_gib']:.2f}", verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


NO_EQUAL = "no equal strategy or model"


def page() -> str:
    """The text of the whole page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return "\n".join([before + BEGIN, "", *section(json.loads(MEASURED.read_text(encoding="utf-8"))), "", END + after])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
