"""What simulated steps take with the versions that are named: `python -m tests.simulated.goldens` writes the table anew.

A change of the code that moves a number writes the table and says so in its commit. With other versions the invariants of
`test_invariants.py` count alone.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.simulated.cases import DEALT, Case, DealtExperts, chosen_cases, simulated
from tests.simulated.experiments import NAMES, simulated_experiment
from trainer.planner.depth_extrapolation import full_depth_step
from trainer.planner.simulate import SimulatedStep

TABLE = Path(__file__).parent / "goldens.json"
PACKAGES = ("torch", "transformers", "peft", "deepspeed")


def versions() -> dict[str, str]:
    return {package: version(package).partition("+")[0] for package in PACKAGES}


def name_of(case: Case, world: int) -> str:
    parts = [case.strategy, case.tuning, case.precision, f"recompute {case.checkpointing}"]
    if isinstance(case, DealtExperts):
        parts.append(f"over {case.experts}")
    return ", ".join([*parts, *(["offload"] if case.offload else []), f"x {case.accumulation}", f"{world} ranks"])


def summary(found: SimulatedStep) -> dict[str, Any]:
    """One rank's step in a few numbers, as JSON values."""
    step = full_depth_step(found, 0)
    return {
        "peak": str(step.peak_phase),
        "bytes": step.peak_bytes,
        "kinds": {str(kind): size for kind, size in sorted(step.peak_bytes_by_kind.items())},
        "exchanged": {
            f"{name} over {ranks} in {dtype}": list(n) for (name, ranks, dtype), n in step.collective_totals.items()
        },
        "host_reads": step.num_host_reads,
        "host_bytes": step.host_bytes,
    }


def has_versions_of_table() -> bool:
    """Whether the versions that are installed wrote the table, so that its numbers must be met."""
    return json.loads(TABLE.read_text())["versions"] == versions()


def golden(case: Case, world: int) -> dict[str, Any] | None:
    """The row of a case; None where there is none, or where it was written with other versions."""
    table = json.loads(TABLE.read_text())
    return table["steps"].get(name_of(case, world)) if table["versions"] == versions() else None


def golden_experiment(name: str) -> list[Any] | None:
    """Moment and bytes of the peak of an experiment file; None where it was written with other versions."""
    table = json.loads(TABLE.read_text())
    return table["experiments"].get(name) if table["versions"] == versions() else None


def main() -> None:
    """Write the rows of the covering choice, on its first rank, and of the experiments, on their last."""
    with tempfile.TemporaryDirectory() as place:
        steps = {
            name_of(case, world): summary(simulated(case, case.model_in(Path(place)), world))
            for case, world in [*chosen_cases(), *DEALT]
        }
        found = {name: simulated_experiment(name) for name in NAMES}
    experiments = {name: [str(step.peak_phase), step.peak_bytes] for name, step in found.items()}
    TABLE.write_text(json.dumps({"versions": versions(), "steps": steps, "experiments": experiments}, indent=1) + "\n")


if __name__ == "__main__":
    main()
