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

from trainer.config.combinations import COMPILED, FEATURES, NOT_COMPILED, summary  # noqa: E402
from trainer.config.combinations import methods_by_row as all_methods  # noqa: E402
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
from trainer.tuning.table import METHODS, PEFT_METHODS, PROPERTIES, UNSUPPORTED_TYPES, Method  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
MEASURED = ROOT / "benchmarks" / "results" / "methods.json"
HEAD = """# Tuning methods

This page lists every tuning method, what you can combine it with, and what it costs. After it you know whether the run that you
want is legal, and why not if it is refused. To choose a method, read [peft.md](peft.md) first: it says what each family is good
for, and has a learning rate for each method.

`tuning=<name>` chooses the method. For example:

```bash
shardtune train model.path=<dir> data.path=<files> budget.epochs=1 tuning=ia3 optim.lr=5e-3
```

- A method takes the same steps under every strategy that runs it, as in one process.
- It starts from the same values for any number of ranks. `peft` itself draws the values, one layer at a time, from the seed and
  the name of the layer.
- It computes what plain `peft` computes with the same weights. The exception is `bottleneck`, which `peft` does not have.
- A combination that does not work is refused before any process starts. The error has the reason, and the nearest legal choice.
"""
EXPERTS = """**Mixtures of experts.** `tuning=lora` adapts the linear layers. `tuning.experts=true` adds the experts, and
`tuning.router=true` adds the routers. Both work under every strategy. With `tuning.targets=[]` you train only them. Exports with
experts or routers are merged by default ([mixtures.md](mixtures.md)). The experts of a layer can be divided among ranks
(`parallel.experts`, [mixtures.md](mixtures.md#expert-parallelism)): see the column *experts* below."""
CELLS = """The table has a row for each method. Its cells have one of three words:

| cell | what it means |
|---|---|
| *tested* | a tiny run takes the same steps as with `strategy=single`: within 1e-5 in fp32, within 1e-2 in bf16 |
| *refused* | the run is refused. [Why not](#why-not) has the reason |
| *GPU only* | it needs a GPU, so the tests on CPUs cannot show it |

The second column, *every strategy*, is for a run without the features of the columns that follow. Those columns are:
"""
TESTED = """## Tested how

- Each method takes five steps with clipped gradients in fp32. The steps must be within 1e-5 of those of one process
  (`tests/parity/test_methods.py`). Experts and routers have tests of their own (`tests/parity/test_experts.py`).
- `make test-all` runs each method under each strategy, with each feature and with each optimizer.
- `make test` runs a selection. Each method meets `fsdp2` or `zero3`, a strategy that keeps parameters whole, recomputed blocks,
  and another layout of rows. Each feature meets each strategy under some method (`torch.compile` only one strategy). Each
  optimizer meets the engines of torch and of DeepSpeed.
- Experts dealt over ranks: each method that has *tested* there takes the steps of one process under `fsdp2` on two ranks, and
  under `hsdp` on four ranks (two replicas of two). A tiny Qwen3-MoE with eight experts is trained.
- `torch.compile` is tested as far as its graphs. They are traced and differentiated as in any run, and then executed without
  generated code.

`docs/make_methods.py` writes this page from the data that also refuses runs and selects the tests:

| part | file |
|---|---|
| methods | `trainer/tuning/table.py` |
| optimizers | `trainer/optim/support.py` |
| features and verdicts | `trainer/config/combinations.py` |
| measurements | `benchmarks/results/methods.json` |

A test compares the page with them."""
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


def methods_by_row(table: dict[str, Method], key: str) -> list[str]:
    """What each method is, one line each."""
    lines = ["| choice | what it is | export | merge | trained |", "|---|---|---|---|---|"]
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
        found = [summary(name), *(summary(name, feature=feature) for feature in shown)]
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
        f"- `{name}` with `optim={optim}`: {why}."
        for name, method in all_methods().items()
        for optim, why in method.refusal_by_optimizer.items()
    ]
    lines = [
        "Every method trains with every optimizer, under the strategies that run the optimizer",
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
        "The table shows what a method costs, in parameters, memory and time. Methods have the settings that are shown above.",
        "",
        f"- **Command:** `{record['command']}`.",
        f"- **Model:** {record['model']}.",
        f"- **Work:** {record['steps']} steps of {record['batch']}.",
        f"- **Machine:** {record['hardware']}. {versions}.",
        "- **memory** is the peak, minus the memory of an idle process.",
        "- **step** is the CPU time of one step, divided by that of a LoRA step. The steps of both alternated. For example, 1.70",
        "  means that a step takes 1.7 times as long as LoRA's.",
        "- The row `lora` compares LoRA with itself, so the distance of its *step* from 1 is noise.",
        "",
    ]
    learned = not record["random"]
    if not learned:
        lines += ["The model is random, so the table says nothing about what a method learns.", ""]
    lines += ["| method | trained | memory (MiB) | step |" + (" loss |" if learned else "")]
    lines += ["|---|---|---|---|" + ("---|" if learned else "")]
    for name, each in record["methods"].items():
        loss = f" {each['first_loss']:.3f} -> {each['last_loss']:.3f} |" if learned else ""
        cost = f"{each['trained']:,} | {each['memory_mib']:.0f} | {each['step_ratio']:.2f}"
        lines.append(f"| `{name}` | {cost} |{loss}")
    return [*lines, ""]


def refusals(method: Method) -> Iterator[tuple[str, str]]:
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
    proven = ", ".join(f"`{name}`" for name in COMPILED)
    lines = ["| what is refused | with these methods | why (*it* is the method) |", "|---|---|---|"]
    lines += [f"| {what} | {', '.join(names)} | {reason} |" for (what, reason), names in sorted(sharing.items())]
    return [
        *lines,
        f"| `strategy.compile=true` | all but {proven} | {NOT_COMPILED} |",
        "| `precision=fp16` on a CPU | all | not supported on CPUs |",
    ]


def refused_types() -> list[str]:
    """The methods of peft that are refused: a row for each reason, with the names that share it."""
    sharing: dict[str, list[str]] = {}
    for name, reason in UNSUPPORTED_TYPES.items():
        sharing.setdefault(reason, []).append(f"`{name}`")
    lines = ["| `tuning.type=` | why (*it* is the method) |", "|---|---|"]
    return [*lines, *(f"| {', '.join(names)} | {reason} |" for reason, names in sharing.items())]


def page() -> str:
    """The text of the whole page."""
    size = parameters(FullConfig())[1]
    lines = [
        HEAD,
        "## The methods",
        "",
        f"The column *trained* is counted on a small Llama (2 blocks, width 64, vocabulary 256; {size:,} parameters). If a",
        "setting is shown there, the count is with this setting. Without one, the method has its default settings.",
        "",
        *methods_by_row(METHODS, "tuning"),
        "",
        "`tuning=peft tuning.type=<name>` takes another method of peft. `tuning.options.<option>=<value>` sets one of peft's",
        "own options. An option that peft does not know is an error.",
        "",
        *methods_by_row(PEFT_METHODS, "tuning.type"),
        "",
        EXPERTS,
        "",
        "## What works with what",
        "",
        CELLS,
        *columns(),
        "",
        "With `model.quantisation` ([qlora.md](qlora.md)), three variants of LoRA are refused too: DoRA, PiSSA and OLoRA.",
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
        "These methods of peft are refused:",
        "",
        *refused_types(),
        "",
        "Any other type of peft is refused too, because it is not tested here.",
        "",
        TESTED,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
