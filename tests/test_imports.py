"""What importing a module loads, seen by `sys.modules` of a process of its own."""

import subprocess
import sys

ROOMS = ("launch", "trainer", "strategies")


def loaded_by(statement: str) -> set[str]:
    """Names of all modules that are loaded once a fresh interpreter has run `statement`."""
    program = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] in ROOMS}


def test_the_loop_loads_neither_a_model_nor_a_task_nor_a_tracker():
    modules = loaded_by("import trainer.loop")
    assert "trainer.loop_types" in modules
    assert len(ours(modules)) <= 60, sorted(ours(modules))
    rooms_of_others = ("trainer.evaluation.tasks", "trainer.data.batches", "trainer.checkpoints", "trainer.monitors")
    heavy = [
        name for name in modules if name.startswith((*rooms_of_others, "trainer.reporting.trackers", "transformers"))
    ]
    assert not heavy
