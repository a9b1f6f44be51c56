"""Writes `docs/methods.md` from the tables in the code and from measurements. Edit those, not the page.

python docs/make_methods.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.config.combinations import (  # noqa: E402
    FEATURES,
    METHODS_THAT_COMPILE,
    NOT_COMPILED_REASON,
    states_under_strategies_text,
)
from trainer.config.combinations import methods_by_name as all_methods  # noqa: E402
from trainer.tuning.base import FullConfig, LoraConfig, TuningConfig  # noqa: E402
from trainer.tuning.build import build_tuning  # noqa: E402
from trainer.tuning.config import (  # noqa: E402
    AdaLoraConfig,
    AdaptionPromptConfig,
    BoftConfig,
    BottleneckConfig,
    FreezeConfig,
    Ia3Config,
    LnConfig,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    PrefixConfig,
    PromptConfig,
    PTuningConfig,
    VeraConfig,
)
from trainer.tuning.table import PEFT_METHODS, PROPERTIES, TUNING_METHODS, UNSUPPORTED_TYPES, TuningMethod  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
MEASURED = ROOT / "benchmarks" / "results" / "methods.json"
HEAD = """# Tuning methods

This page lists every tuning method, what you can combine it with, and what it costs. Use it to see whether shardtune accepts the
run that you want, and the reason if it does not. To choose a method, read [peft.md](peft.md) first: it explains what each family
of methods is good for, and gives a learning rate for each method.

`tuning=<name>` selects the method. For example:

```bash
shardtune train model.path=<dir> data.path=<files> budget.epochs=1 tuning=ia3 optim.lr=5e-3
```

These rules hold for every method:

- It computes the training steps of one process under every strategy that supports it.
- It starts from the same values for any number of ranks. `peft` draws these values, one layer at a time, from the seed and
  the name of the layer.
- With the same weights, it computes the same as plain `peft`. The exception is `bottleneck`, which `peft` does not have.
- If a combination is not supported, it is refused before any process starts. The error message gives the reason, and the nearest
  combination that works.
"""
EXPERTS = """**Mixtures of experts.** By default `tuning=lora` adapts the linear layers. To adapt other layers, set:

- `tuning.experts=true` also adapts the experts, and `tuning.router=true` also adapts the routers. Both work with every strategy.
  Exports with either are merged by default ([mixtures.md](mixtures.md)).
- `tuning.targets=[]` with one of these settings trains only experts or routers.
- `parallel.experts` distributes the experts of a layer over the ranks, under `fsdp2` and `hsdp`
  ([mixtures.md](mixtures.md#expert-parallelism)). The column *experts* below shows which methods support it."""
CELLS = """The table has a row for each method. A cell has one of three values:

| cell | meaning |
|---|---|
| *tested* | a test trains a tiny model: its steps agree with `strategy=single` within 1e-5 in fp32, and within 1e-2 in bf16 |
| *refused* | the run is refused. [Why not](#why-not) gives the reason |
| *GPU only* | it needs a GPU, and our tests run on CPUs |

The column *every strategy* is for a run without the features of the other columns. The other columns are:
"""
TESTED = """## Tested how

- Each method trains five steps with clipped gradients in fp32. The steps must agree with those of one process within 1e-5
  (`tests/parity/test_methods.py`). Experts and routers have their own tests (`tests/parity/test_experts.py`).
- `make test-all` runs each method with each strategy, each feature and each optimizer.
- `make test` runs a selection. Each method is tested with `fsdp2` or `zero3`, with a strategy that does not shard parameters,
  with activation checkpointing, and with a second data layout. Each feature is tested with each strategy and some method
  (`torch.compile` with one strategy only). Each optimizer is tested with PyTorch's and with DeepSpeed's sharding.
- Expert parallelism: each method with *tested* in its column computes the training steps of one process, under `fsdp2` on two
  ranks, and under `hsdp` on four ranks (two replicas of two). The model is a tiny Qwen3-MoE with eight experts.
- For `torch.compile`, the graphs are traced and differentiated as in any run, and then executed without generated code. So the
  code that the compiler generates is not tested.

`docs/make_methods.py` writes this page from the data that shardtune uses to refuse runs and to select tests:

| data | file |
|---|---|
| methods | `trainer/tuning/table.py` |
| optimizers | `trainer/optim/support.py` |
| features and results | `trainer/config/combinations.py` |
| measurements | `benchmarks/results/methods.json` |

A test checks that the page agrees with these files."""
SETTINGS: dict[str, tuple[TuningConfig, str]] = {
    "full": (FullConfig(), ""),
    "freeze": (FreezeConfig(layers="last-1"), "`tuning.layers=last-1`"),
    "lora": (LoraConfig(rank=8), "`tuning.rank=8`"),
    "adalora": (AdaLoraConfig(), ""),
    "ia3": (Ia3Config(), ""),
    "vera": (VeraConfig(), ""),
    "loha": (LohaConfig(), ""),
    "lokr": (LokrConfig(), ""),
    "oft": (OftConfig(), ""),
    "boft": (BoftConfig(), ""),
    "ln": (LnConfig(), ""),
    "prefix": (PrefixConfig(), ""),
    "prompt": (PromptConfig(), ""),
    "p_tuning": (PTuningConfig(), ""),
    "adaption_prompt": (AdaptionPromptConfig(), ""),
    "bottleneck": (BottleneckConfig(size=8), "`tuning.size=8`"),
    "beft": (PeftConfig(type="beft"), ""),
    "c3a": (PeftConfig(type="c3a", options={"block_size": 16}), "`tuning.options.block_size=16`"),
    "glora": (PeftConfig(type="glora"), ""),
    "gralora": (PeftConfig(type="gralora"), ""),
    "hira": (PeftConfig(type="hira"), ""),
    "hra": (PeftConfig(type="hra"), ""),
    "miss": (PeftConfig(type="miss", options={"r": 8}), "`tuning.options.r=8`"),
    "peanut": (PeftConfig(type="peanut"), ""),
    "road": (PeftConfig(type="road"), ""),
    "waveft": (PeftConfig(type="waveft", options={"n_frequency": 64}), "`tuning.options.n_frequency=64`"),
}


def parameters(config: TuningConfig) -> tuple[int, int]:
    """(trained, all base) parameters on the tiny model, which has a shape and no memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
            )
        )
    size = sum(p.numel() for p in model.parameters())
    tuned = build_tuning(config).apply(model)
    return sum(p.numel() for p in tuned.parameters() if p.requires_grad), size


def methods_by_name(table: dict[str, TuningMethod], key: str) -> list[str]:
    """What each method is, one line each."""
    lines = ["| choice | what is trained | export | can be merged | trained parameters |", "|---|---|---|---|---|"]
    for name, method in table.items():
        config, shown = SETTINGS[name]
        count = f"{parameters(config)[0]:,}" + (f" ({shown})" if shown else "")
        merge = ("no" if method.merge_refusal else "yes") if method.adapter else "-"
        export = "adapter" if method.adapter else "whole model"
        lines.append(f"| `{key}={name}` | {method.title} | {export} | {merge} | {count} |")
    return lines


def cells() -> list[str]:
    """The verdict on each method with each feature, whatever the strategy."""
    shown = [name for name in FEATURES if name != "plain"]
    lines = [f"| method | every strategy | {' | '.join(shown)} |", "|---" * (2 + len(shown)) + "|"]
    for name in all_methods():
        found = [
            states_under_strategies_text(name),
            *(states_under_strategies_text(name, feature=feature) for feature in shown),
        ]
        lines.append(f"| `{name}` | {' | '.join(found)} |")
    return lines


def columns() -> list[str]:
    """What each column of the table of cells stands for."""
    lines = ["| column | setting | what it is |", "|---|---|---|"]
    for name, feature in FEATURES.items():
        if name != "plain":
            lines.append(f"| {name} | `{feature.settings}` | {feature.title} |")
    return lines


def optimizers() -> list[str]:
    """Which optimizers a method is not trained with."""
    exceptions = [
        f"- `{name}` with `optim={optim}` is refused: {why}."
        for name, method in all_methods().items()
        for optim, why in method.refusal_by_optimizer.items()
    ]
    lines = [
        "Every method works with every optimizer, with the strategies that support the optimizer",
        "([optimizers.md](optimizers.md)).",
    ]
    if exceptions:
        lines += ["", "Exceptions:", "", *exceptions]
    return [*lines, ""]


def measured() -> list[str]:
    """What each method costs, as `benchmarks/methods.py` found it."""
    record = json.loads(MEASURED.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "The table shows the trained parameters, the memory and the time of each method, with the settings of the tables above.",
        "Setup:",
        "",
        f"- **Command:** `{record['command']}`.",
        f"- **Model:** {record['model']}.",
        f"- **Work:** {record['steps']} steps of {record['batch']}.",
        f"- **Machine:** {record['hardware']}. {versions}.",
        "- **Memory** is the peak memory, minus the memory of an idle process.",
        "- **Time of a step** is the CPU time of one step, divided by that of a LoRA step. Steps of the method and of",
        "  LoRA alternated. For example, 1.70 means that a step takes 1.7 times as long as with LoRA.",
        "- The row `lora` compares LoRA with itself, so the distance of its time from 1 is measurement noise.",
        "",
    ]
    learned = not record["random"]
    if not learned:
        lines += ["The model has random weights, so the table does not show how well a method learns.", ""]
    lines += [
        "| method | trained parameters | memory (MiB) | time of a step (LoRA = 1) |" + (" loss |" if learned else "")
    ]
    lines += ["|---|---|---|---|" + ("---|" if learned else "")]
    for name, each in record["methods"].items():
        loss = f" {each['first_loss']:.3f} -> {each['last_loss']:.3f} |" if learned else ""
        cost = f"{each['trained']:,} | {each['memory_mib']:.0f} | {each['step_ratio']:.2f}"
        lines.append(f"| `{name}` | {cost} |{loss}")
    return [*lines, ""]


def refusals(method: TuningMethod) -> Iterator[tuple[str, str]]:
    """What a method refuses, and why."""
    for reason in dict.fromkeys(method.refusal_by_strategy.values()):
        names = ", ".join(f"`{strategy}`" for strategy, why in method.refusal_by_strategy.items() if why == reason)
        yield f"strategies {names}", reason
    for word, reason in method.refusal_by_property.items():
        under = " under `fsdp2`, `hsdp` and ZeRO" if word == "half" else ""
        yield f"{PROPERTIES[word]}{under}", reason
    for what, reason in (
        ("merging the adapter", method.merge_refusal),
        ("classification and reward models", method.new_head_refusal),
        ("`objective=seq2seq`", method.seq2seq_refusal),
        ("`model.add_tokens`", method.new_tokens_refusal),
        ("`tuning.from` and `model.adapters`", method.continuation_refusal),
    ):
        if reason:
            yield what, reason


def reasons() -> list[str]:
    """Why a cell says refused: a row for each reason, with the methods that share it."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for name, method in all_methods().items():
        for refusal in refusals(method):
            sharing.setdefault(refusal, []).append(f"`{name}`")
    proven = ", ".join(f"`{name}`" for name in METHODS_THAT_COMPILE)
    lines = ["| what is refused | with these methods | reason (*it* is the method) |", "|---|---|---|"]
    lines += [f"| {what} | {', '.join(names)} | {reason} |" for (what, reason), names in sorted(sharing.items())]
    return [
        *lines,
        f"| `strategy.compile=true` | all except {proven} | {NOT_COMPILED_REASON} |",
        "| `precision=fp16` on a CPU | all | not supported on CPUs |",
    ]


def refused_types() -> list[str]:
    """The methods of peft that are refused: a row for each reason, with the names that share it."""
    sharing: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED_TYPES.items():
        sharing.setdefault(reason, []).append(f"`{name}`")
    lines = ["| `tuning.type=` | reason (*it* is the method) |", "|---|---|"]
    return [*lines, *(f"| {', '.join(names)} | {reason} |" for reason, names in sharing.items())]


def page() -> str:
    """The text of the whole page."""
    size = parameters(FullConfig())[1]
    lines = [
        HEAD,
        "## The methods",
        "",
        f"The numbers of trained parameters are for a small Llama (2 blocks, width 64, vocabulary 256; {size:,} parameters).",
        "They are for default settings, unless the cell names a setting.",
        "",
        *methods_by_name(TUNING_METHODS, "tuning"),
        "",
        "`tuning=peft tuning.type=<name>` selects one of ten more methods of `peft`. `tuning.options.<option>=<value>` sets",
        "an option of `peft`. If `peft` does not know the option, the run is refused.",
        "",
        *methods_by_name(PEFT_METHODS, "tuning.type"),
        "",
        EXPERTS,
        "",
        "## What works with what",
        "",
        CELLS,
        *columns(),
        "",
        "If you set `model.quantisation` ([qlora.md](qlora.md)), LoRA's variants DoRA, PiSSA and OLoRA are refused too.",
        "",
        *cells(),
        "",
        *optimizers(),
        "## What they cost",
        "",
        *measured(),
        "## Why not",
        "",
        *reasons(),
        "",
        "These methods of `peft` are refused:",
        "",
        *refused_types(),
        "",
        "Any other type of `peft` is refused too, because we have not tested it.",
        "",
        TESTED,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
