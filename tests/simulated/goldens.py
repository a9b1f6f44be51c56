"""What simulated steps take with the versions that are named: `python -m tests.simulated.goldens` writes the table anew.

A change of the code that moves a number writes the table and says so in its commit. With other versions the invariants of
`test_invariants.py` count alone.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.helpers.building import model_dir
from tests.simulated.cases import Case, chosen_cases, simulated
from trainer.planning.depth import whole
from trainer.planning.simulate import Simulated

TABLE = Path(__file__).parent / "goldens.json"
PACKAGES = ("torch", "transformers", "peft", "deepspeed")


def versions() -> dict[str, str]:
    return {package: version(package).partition("+")[0] for package in PACKAGES}


def name_of(case: Case, world: int) -> str:
    parts = [case.strategy, case.tuning, case.precision, f"recompute {case.checkpointing}"]
    return ", ".join([*parts, *(["offload"] if case.offload else []), f"x {case.accumulation}", f"{world} ranks"])


def summary(found: Simulated) -> dict[str, Any]:
    """One rank's step in a few numbers, as JSON values."""
    step = whole(found, 0)
    return {
        "peak": str(step.peak),
        "bytes": step.total,
        "kinds": {str(kind): size for kind, size in sorted(step.kinds.items())},
        "exchanged": {f"{name} over {ranks} in {dtype}": list(n) for (name, ranks, dtype), n in step.exchanged.items()},
        "host_reads": step.host_reads,
        "host_bytes": step.host,
    }


def golden(case: Case, world: int) -> dict[str, Any] | None:
    """The row of a case; None where there is none, or where it was written with other versions."""
    table = json.loads(TABLE.read_text())
    return table["steps"].get(name_of(case, world)) if table["versions"] == versions() else None


def main() -> None:
    """Write the rows of the covering choice, on its first rank."""
    with tempfile.TemporaryDirectory() as place:
        model = model_dir(Path(place))
        steps = {name_of(case, world): summary(simulated(case, model, world)) for case, world in chosen_cases()}
    TABLE.write_text(json.dumps({"versions": versions(), "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
