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


def children(modules: set[str], package: str) -> set[str]:
    """The names directly below `package` that are loaded."""
    return {name.removeprefix(f"{package}.").split(".")[0] for name in modules if name.startswith(f"{package}.")}


def test_the_loop_loads_neither_a_model_nor_a_task_nor_a_tracker():
    modules = loaded_by("import trainer.loop")
    assert "trainer.loop_types" in modules
    assert len(ours(modules)) <= 62, sorted(ours(modules))
    assert children(modules, "trainer.evaluation") <= {"base", "best", "endpoint", "interval"}
    assert children(modules, "trainer.data") <= {"config"}
    assert not children(modules, "trainer.checkpoints") and not children(modules, "trainer.reporting.trackers")
    assert "transformers" not in modules


def test_composing_loads_neither_ssh_nor_a_model(tmp_path):
    model, rows = tmp_path / "llama", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    rows.write_text('{"text": "a b c"}\n', encoding="utf-8")
    words = [f"model.path={model}", f"data.path={rows}", "objective=pretrain", "tuning=lora", "run.device=cpu"]
    words.append("budget.steps=1")
    named_alone = ["model.path=gpt2", "strategy=zero3", "tuning=lora", "objective=classification"]
    modules = loaded_by(
        "from launch.config.compose import compose_config; "
        f"compose_config({words!r}); compose_config({named_alone!r}, check=False)"
    )
    assert "trainer.config.validate" in modules, "composed without its rules"

    other_hosts = {"ssh", "ssh_nodes", "node", "torchrun"}
    assert not [name for name in ours(modules) if name.split(".")[-1] in other_hosts]
    # known_shapes.py reads small files. flex.py, rotary.py and their compat file are the contexts in which an objective calls a
    # model. They load neither a kernel nor transformers.
    assert children(modules, "trainer.model") <= {"config", "rules", "known_shapes", "flex", "rotary", "compat"}
    # What a task's own settings are checked by, and nothing that evaluates.
    assert children(modules, "trainer.evaluation") <= {"base", "tasks", "endpoint", "classifier", "harness", "interval"}
    assert not modules & {
        "transformers",
        "peft",
        "datasets",
        "deepspeed",
        "wandb",
        "openai",
        "accelerate",
        "pandas",
        "pyarrow",
    }
    assert not modules & {"torch.distributed.checkpoint", "torch.distributed.tensor", "torch._dynamo", "sympy"}
    assert "trainer.data.transforms.privacy.stage" not in modules, "seventy expressions, for who asks for them"
