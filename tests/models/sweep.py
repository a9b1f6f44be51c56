"""Every causal architecture through the trainer's own path, into a table: `python -m tests.models.sweep [type ...]`.

Each is a tiny random model of its own configuration. `single`, whole and with LoRA: loss and gradients of the first step against
plain transformers in eager mode on each document apart, a second step, the export reloaded. Then two ranks against `single`.
`table.json` holds what came of it, and `docs/make_models.py` makes docs/models.md of that. Half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.ranks import Ranks
from tests.models import tiny
from tests.models.own import EXCLUDED, VARIANTS

TABLE = Path(__file__).with_name("table.json")
JOB = "tests.models.job"
TUNINGS = ("full", "lora")
TOGETHER = (("fsdp2", "full"), ("zero3", "full"))
IN_TURNS = (("fsdp2", "lora"), ("zero2", "full"), ("zero3", "lora"))
"""What is tried on two ranks: of each architecture the former, and one of the latter."""
LIMIT_S = 60
"""Seconds that one case may take on the machine that `tests/helpers/speed.py` measures by."""
SAID = ("outcome", "reason", "layout", "attention")
"""What of an answer is kept: not the digits, which belong to one machine."""
TRAINS = ("padding-free", "padded")


def read() -> dict[str, Any]:
    """The table as it was written last."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def write(path: Path, rows: dict[str, Any]) -> None:
    """Write the table, with the versions that it is of."""
    versions = {name: version(name) for name in ("transformers", "torch", "peft", "deepspeed")}
    table = {"versions": versions, "types": dict(sorted(rows.items()))}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def together(model_type: str) -> tuple[tuple[str, str], ...]:
    """(strategy, tuning) of the cases on two ranks."""
    return (*TOGETHER, IN_TURNS[crc32(model_type.encode()) % len(IN_TURNS)])


def row(ranks: dict[int, Ranks], model_type: str, *, alone: bool = False) -> dict[str, Any]:
    """What came of an architecture, by case: `full`, `lora`, and unless `alone` `<strategy> <tuning>` on two ranks."""
    found = ask(ranks[1], "single", model_type)
    if found["outcome"] == "made" and not alone:
        for strategy, tuning in together(model_type):
            if found[tuning]["outcome"] in TRAINS:
                found[f"{strategy} {tuning}"] = ask(ranks[2], "ranks", model_type, strategy, tuning)
    if model_type not in VARIANTS:
        return {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], **found}
    base_type = VARIANTS[model_type][0]
    return {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base_type], "variant_of": base_type, **found}


def excluded(model_type: str) -> dict[str, Any]:
    """The row of an architecture that is not tried; it counts as one that does not train."""
    return {
        "class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
        "outcome": "not tried",
        "reason": EXCLUDED[model_type],
    }


def ask(ranks: Ranks, *question: str) -> dict[str, Any]:
    """A rank's answer, or what became of the ranks."""
    try:
        return ranks.ask(*question, limit_s=LIMIT_S)
    except pytest.fail.Exception as error:
        said = " ".join(str(error).split())
        if "no answer within" in said:
            return {"outcome": "hangs", "reason": "the ranks wait for each other"}
        return {"outcome": "traceback", "reason": said[-400:], "frame": "a process ended"}


def kept(found: dict[str, Any]) -> dict[str, Any]:
    """A row without what changes from run to run."""
    return {
        name: {key: value[key] for key in SAID if key in value} if isinstance(value, dict) else value
        for name, value in found.items()
        if name != "frame"
    }


def lines(model_type: str, found: dict[str, Any]) -> list[str]:
    """What is not well with an architecture, a line for each case."""
    if model_type in EXCLUDED:
        return []
    if found["outcome"] != "made":
        return [f"{model_type} | {found['outcome']} | {found.get('reason', '')} | {found.get('frame', '')}"]
    return [
        f"{model_type}, {case} | {answer['outcome']} | {answer.get('reason', '')} | {answer.get('frame', '')}"
        for case, answer in found.items()
        if isinstance(answer, dict) and answer["outcome"] not in TRAINS
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="architectures, or names of VARIANTS; default: all")
    parser.add_argument("--table", type=Path, default=TABLE, help="where the table is; rows of other types stay")
    parser.add_argument("--problems", type=Path, help="a file for one line a case that is not well")
    parser.add_argument("--alone", action="store_true", help="without the cases on two ranks")
    asked = parser.parse_args()
    rows = json.loads(asked.table.read_text())["types"] if asked.table.exists() and asked.types else {}
    rows |= {model_type: excluded(model_type) for model_type in EXCLUDED}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        ranks = {world: Ranks(JOB, world, Path(made, str(world))) for world in (1, 2)}
        for world in ranks:
            Path(made, str(world)).mkdir()
        try:
            for model_type in asked.types or [*tiny.causal_types(), *VARIANTS]:
                found = row(ranks, model_type, alone=asked.alone)
                rows[model_type] = kept(found)
                wrong += lines(model_type, found)
                cases = {case: answer["outcome"] for case, answer in found.items() if isinstance(answer, dict)}
                print(model_type, cases or found["outcome"], flush=True)
                write(asked.table, rows)
                if asked.problems:
                    asked.problems.write_text("\n".join(wrong) + "\n")
        finally:
            for each in ranks.values():
                each.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
