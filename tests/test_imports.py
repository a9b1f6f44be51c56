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


def test_composing_loads_neither_ssh_nor_a_model(tmp_path):
    model, rows = tmp_path / "llama", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    rows.write_text('{"text": "a b c"}\n', encoding="utf-8")
    words = [f"model.path={model}", f"data.path={rows}", "objective=pretrain", "tuning=lora", "run.device=cpu"]
    words.append("budget.steps=1")
    modules = loaded_by(f"from launch.config.compose import compose; compose({words!r})")
    assert "trainer.config.validate" in modules, "composed without its rules"

    other_hosts = {"launch.cluster.ssh", "launch.cluster.ssh_nodes", "launch.cluster.node", "launch.torchrun"}
    assert not modules & other_hosts
    # flex.py: the context in which an objective calls a model; it loads neither torch's kernel nor transformers.
    of_models = {"trainer.model", "trainer.model.config", "trainer.model.rules", "trainer.model.flex"}
    assert {name for name in modules if name.split(".")[:2] == ["trainer", "model"]} <= of_models
    # Of evaluations only what a task's own settings are checked by.
    evaluates = (
        "build",
        "gathering",
        "generation",
        "likelihood",
        "loss",
        "report",
        "served",
        "task_evaluator",
        "writing",
    )
    assert not modules & {f"trainer.evaluation.{name}" for name in evaluates}
    assert not modules & {"transformers", "peft", "datasets", "deepspeed", "wandb", "openai"}
