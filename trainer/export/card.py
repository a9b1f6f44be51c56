"""The model card: what an export is, what it was made from and how well it did, as the README.md of its directory.

States only what the run knows. What nobody measured (risks, biases, fitness for a use) is named as not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.data.report.pages import HUB_LICENCES
from trainer.export.results import model_index
from trainer.papers.known import Known
from trainer.papers.write import paper
from trainer.records.findings import findings_in
from trainer.records.short import readable

BOTTLENECK = "bottleneck"
VIRTUAL_TOKENS = ("prefix", "prompt", "p_tuning")
OWN_LOADER = """
peft 0.21 computes this adapter rightly, and loses it from the cache when it generates with transformers 5.24. To generate:

```python
from trainer.tuning.virtual import load  # of shardtune; `model` is the base model

model = load(model, "path/to/this/directory")
```"""


@dataclass(kw_only=True, slots=True)
class CardFacts:
    """What a card is written from."""

    config_yaml: str = ""
    """The frozen configuration, as YAML."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The run record (`run.json`): base model, tuning, strategy, data report, versions, substitutions and more."""
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at the end."""
    tokens_trained: int = 0
    steps: int = 0
    licence: str | None = None
    """Licence of the base model; default: what its own card states. It binds the export too."""
    gates: dict[str, Any] = field(default_factory=dict)
    """What the run's gates said of these weights (`Judged.record`); empty where there are none."""
    known: Known | None = None
    """What was measured of these weights after training, and what the owner answered; None where nobody asked."""
    benchmarks: dict[str, str] = field(default_factory=dict)
    """Data sets of the hub that tasks were asked from local copies of, as <owner>/<name>[/<task there>] by the task here."""
    resize_to: int | None = None
    """Vocabulary size that an adapter's base must be resized to before loading; set by the export."""


def render_card(card: CardFacts, *, adapter: bool, base_path: str) -> str:
    """The text of README.md, with the Hugging Face metadata block in front."""
    facts = card.facts
    base = _base_name(facts.get("base_model") or base_path)
    method = str(facts.get("tuning", "full"))
    parts = [
        _front_matter(card, licence=card.licence or licence_of(base_path), base=base, adapter=adapter, method=method),
        f"# {base}, fine-tuned ({method})",
        _intended_use(base, card.known, adapter=adapter),
        "## How to load\n\n" + _loading(card, base_path, adapter=adapter),
        _data(facts),
        _procedure(card, method),
        _evaluation(card),
        *([] if card.known is None else [paper("measured", card.known).rstrip()]),
        *_gates(card),
        LIMITATIONS,
        _lineage(card),
    ]
    return "\n\n".join(parts) + "\n"


LIMITATIONS = """## Limitations

This text is written by the training program, which knows the numbers above and nothing else. The following has **not** been
measured unless stated above, and should be before others rely on the model:

- how it behaves outside the kind of data it was tuned on, and what the base model knew that tuning made worse;
- bias, toxicity and the safety of its answers: those of the base model are inherited, and tuning may weaken its safeguards;
- whether it repeats personal or confidential passages of its training data."""


def _base_name(value: str) -> str:
    """A hub id as it is; of a directory only the last part, so that no card tells the layout of a machine."""
    path = Path(value).expanduser()
    return path.name if path.is_absolute() or path.exists() or value.startswith((".", "~")) else value


def licence_of(directory: str) -> str | None:
    """The licence that the model card of a directory states in its metadata block, if it has one."""
    readme = Path(directory) / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    metadata = text.split("\n---", 1)[0] if text.startswith("---") else ""
    stated = re.search(r"^license:[ \t]*(\S+)", metadata, re.MULTILINE)
    return stated[1].strip("\"'") if stated else None


def _front_matter(card: CardFacts, *, licence: str | None, base: str, adapter: bool, method: str) -> str:
    """The metadata block, as the hub reads it. A licence that the hub has no name for is `other`, with its name beside."""
    from huggingface_hub import ModelCardData

    objective = card.facts.get("objective")
    task = {"seq2seq": "text2text-generation", "classification": "text-classification"}.get(
        str(objective), "text-generation"
    )
    own = (card.known.answers.get("licence") if card.known else None) or licence
    known = own is None or HUB_LICENCES.fullmatch(own.lower()) is not None
    results = model_index(card.known, task)
    about = ModelCardData(
        model_name=f"{base}, fine-tuned ({method})" if results else None,
        eval_results=results or None,
        base_model=base,
        library_name="peft" if adapter and method != BOTTLENECK else "transformers",
        pipeline_tag=task,
        license=(own.lower() if known else "other") if own else None,
        license_name=None if known else own,
        tags=list(dict.fromkeys(["shardtune", "fine-tuned", method])),
    )
    return f"---\n{about.to_yaml(line_break=chr(10))}\n---"


def _intended_use(base: str, known: Known | None, *, adapter: bool) -> str:
    if known is not None and (said := known.answers.get("intended_use")):
        unfit = f" Not for: {known.answers['out_of_scope']}" if known.answers.get("out_of_scope") else ""
        return f"{said}{unfit}"
    what = f"An adapter for `{base}`" if adapter else f"A whole model tuned from `{base}`"
    return (
        f"{what}. It is meant for texts like those it was tuned on; its owner decides on any use beyond that, within the "
        "licence of the base model and of the data."
    )


def _loading(card: CardFacts, base_path: str, *, adapter: bool) -> str:
    classifier = card.facts.get("objective") == "classification"
    auto = "AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM"
    if card.facts.get("objective") == "seq2seq":
        auto = "AutoModelForSeq2SeqLM"
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    method = str(card.facts.get("tuning", "full"))
    if adapter:
        own = method == BOTTLENECK
        if own:
            lines.insert(1, "from trainer.tuning.bottleneck import load  # of shardtune")
        else:
            lines.insert(0, "from peft import PeftModel")
        labels = card.facts.get("label_names")
        extra = f", num_labels={len(labels)}" if classifier and labels else ""
        lines.append(f"model = {auto}.from_pretrained({json.dumps(_base_name(base_path))}{extra})  # the base model")
        if scheme := card.facts.get("quantisation"):
            lines.append(
                f"# It was trained on this base in {scheme}; on the unrounded one its answers differ a little."
            )
        if card.resize_to:
            lines.append(f"model.resize_token_embeddings({card.resize_to})  # tokens were added to the vocabulary")
        loader = "load" if own else "PeftModel.from_pretrained"
        lines.append(f'model = {loader}(model, "path/to/this/directory")')
    else:
        lines.append(f'model = {auto}.from_pretrained("path/to/this/directory")')
    lines.append('tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")')
    text = "\n".join(["```python", *lines, "```"])
    return text + "\n" + OWN_LOADER if adapter and method in VIRTUAL_TOKENS and not classifier else text


def _data(facts: Mapping[str, Any]) -> str:
    rows = [f"- fingerprint: `{facts.get('data_fingerprint', 'not recorded')}`"]
    report = facts.get("data_report")
    for name, part in report.items() if isinstance(report, Mapping) else ():
        if not isinstance(part, Mapping):
            continue
        counts = {key: part[key] for key in ("documents", "tokens", "supervised_tokens") if key in part}
        counts |= {
            key: value["count"] for key, value in part.items() if isinstance(value, Mapping) and value.get("count")
        }
        if counts:
            rows.append(f"- {name}: {', '.join(f'{value:,} {_words(key)}' for key, value in counts.items())}")
    return "## Training data\n\n" + "\n".join(rows)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _procedure(card: CardFacts, method: str) -> str:
    facts = card.facts
    names = (
        "strategy",
        "world_size",
        "precision",
        "global_batch",
        "micro_batch",
        "accumulation",
        "attention",
        "layout",
    )
    rows = [f"- method: {method}", f"- steps: {card.steps:,}", f"- tokens: {card.tokens_trained:,}"]
    rows += [f"- {_words(name)}: {facts[name]}" for name in names if facts.get(name) is not None]
    rows += [f"- substituted: {key} -> {value}" for key, value in (facts.get("substitutions") or {}).items()]
    if averaged := facts.get("averaged_checkpoints"):
        rows.append(f"- weights: the mean of the checkpoints {', '.join(averaged)}")
    if facts.get("initialised"):
        rows.append(f"- newly initialised, not from the base: {', '.join(facts['initialised'])}")
    return "## Procedure\n\n" + "\n".join(rows)


def _evaluation(card: CardFacts) -> str:
    if not card.after:
        return "## Evaluation\n\nNo held-out data was evaluated."
    rows = ["| held-out metric | before | after |", "| --- | ---: | ---: |"]
    for name, value in card.after.items():
        before = readable(card.before[name]) if name in card.before else "-"
        rows.append(f"| {name} | {before} | {readable(value)} |")
    text = "## Evaluation\n\n" + "\n".join(rows)
    if findings := findings_in(card.facts.get("challenges")):
        lines = [f"- **{each.name}**, since step {each.step}: {each.says}" for each in findings]
        text += "\n\nThe detectors of the run found:\n\n" + "\n".join(lines)
    return text


def _gates(card: CardFacts) -> list[str]:
    """What had to hold before it was given to others, and why it was given where it did not."""
    if not (gates := card.gates.get("gates")):
        return []
    rows = ["| gate | bound | value | |", "| --- | --- | ---: | --- |"]
    for each in gates:
        value = "not measured" if each["value"] is None else f"{each['value']:.4g}"
        rows.append(
            f"| {each['metric']} | `{each['bound']}` | {value} | {'passed' if each['passed'] else '**not passed**'} |"
        )
    why = card.gates.get("override")
    text = "\n".join(rows) + (f"\n\nExported although gates were not passed, for this reason: {why}" if why else "")
    return ["## Gates\n\n" + text]


def _lineage(card: CardFacts) -> str:
    facts = card.facts
    versions = ", ".join(f"{name} {number}" for name, number in (facts.get("versions") or {}).items())
    rows = [
        f"- code revision: {facts.get('git_revision') or 'unknown (not run from a clone)'}",
        f"- config sha256: {facts.get('config_sha256', 'not recorded')}",
        f"- versions: {versions or 'not recorded'}",
    ]
    rows += [f"- accepted: {line}" for line in facts.get("accepted") or ()]
    text = "## Lineage\n\n" + "\n".join(rows)
    if card.config_yaml:
        block = f"```yaml\n{card.config_yaml.rstrip()}\n```"
        text += f"\n\n<details><summary>The whole configuration</summary>\n\n{block}\n\n</details>"
    return text
