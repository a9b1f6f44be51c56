"""The model card (README.md of an export) and the files beside the weights: papers, and results for the hub.

The card states only what the run knows. What nobody measured (risks, biases, fitness for a use) is named as not
measured.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainer.data.report.pages import parse_hub_licence
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.documents.hub_results import model_index_entries, write_hub_results
from trainer.reporting.documents.write import render_document, write_papers

BOTTLENECK_METHOD = "bottleneck"
"""A tuning method whose adapters peft cannot load: shardtune loads them into a model of transformers."""
VIRTUAL_TOKEN_METHODS = ("prefix", "prompt", "p_tuning")
"""Tuning methods that put trained vectors before the tokens. peft loses them from the cache when it generates."""
AUTO_CLASS_BY_OBJECTIVE = {"classification": "AutoModelForSequenceClassification", "seq2seq": "AutoModelForSeq2SeqLM"}
HUB_TASK_BY_OBJECTIVE = {"classification": "text-classification", "seq2seq": "text2text-generation"}
"""The hub's name of the task; objectives that are missing here train a causal language model."""


def write_documents(directory: Path, papers: list[str], facts: ModelFacts, *, adapter: bool, base_path: str) -> None:
    """Write what stands beside the weights of an export: the model card (README.md), papers, and results for the hub.

    `papers`: names of compliance documents to write, such as `datasheet`. `facts`: what is known of the run; they get the
    licence in the base model's card if they have none. `adapter`: whether the export holds an adapter, not all weights.
    `base_path`: directory or hub id of the base model. Raises OSError.
    """
    if not facts.base_licence:
        facts.base_licence = licence_in_model_card(base_path)
    write_papers(directory, papers, facts)
    write_hub_results(directory, facts)
    # An adapter has no config.json, unless it was trained with other position embeddings than the base's.
    changes_positions = adapter and (directory / "config.json").is_file()
    card = render_card(facts, adapter=adapter, base_path=base_path, changes_positions=changes_positions)
    (directory / "README.md").write_text(card, encoding="utf-8")


def render_card(facts: ModelFacts, *, adapter: bool, base_path: str, changes_positions: bool = False) -> str:
    """Write the model card, the README.md of an export: the hub's metadata, the card, and the run's configuration at the end.

    `facts`: what the run knows of itself; the card states nothing else. `base_path`: directory or hub id of the base.
    `adapter`: whether the export holds an adapter, not all weights. `changes_positions`: whether the adapter was trained
    with other settings of position embeddings than the base's, which its config.json has.
    """
    objective = facts.run.objective
    method = facts.run.tuning or "full"
    base_name = _base_name(facts.run.base_model or base_path)
    num_labels = 0
    if objective == "classification":
        num_labels = len(facts.run.label_names or ())
    card = render_document(
        "card",
        facts,
        adapter=adapter,
        method=method,
        base=base_name,
        base_to_load=_base_name(base_path),
        changes_positions=changes_positions,
        loader=_loading_library(method=method, objective=objective, adapter=adapter),
        auto_class=facts.custom_auto_class or AUTO_CLASS_BY_OBJECTIVE.get(objective, "AutoModelForCausalLM"),
        num_labels=num_labels,
    )
    metadata = _metadata_yaml(facts, base_name=base_name, adapter=adapter, method=method)
    return f"---\n{metadata}\n---\n\n{card}{_configuration_section(facts.config_yaml)}"


def _loading_library(*, method: str, objective: str, adapter: bool) -> str:
    """What the card says the export can be loaded with: "transformers", "peft", "shardtune", or "peft, but not to generate".

    The last is for adapters that put trained vectors before the tokens (`VIRTUAL_TOKEN_METHODS`), but not of classifiers.
    `method`: of tuning, such as `lora`. `adapter`: whether the export holds an adapter, not all weights.
    """
    if not adapter:
        return "transformers"
    if method == BOTTLENECK_METHOD:
        return "shardtune"
    if method in VIRTUAL_TOKEN_METHODS and objective != "classification":
        return "peft, but not to generate"
    return "peft"


def _base_name(base_model: str) -> str:
    """The base model as the card names it: a hub id as it is, of a directory the last part, so that no card shows its path."""
    path = Path(base_model).expanduser()
    is_directory = path.is_absolute() or path.exists() or base_model.startswith((".", "~"))
    return path.name if is_directory else base_model


def licence_in_model_card(directory: str) -> str | None:
    """The licence of a base model, such as "apache-2.0", as its own README.md states it in its metadata; None if it does not.

    `directory`: of the model. A hub id, which is no directory here, gives None.
    """
    readme = Path(directory) / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return None
    metadata = text.split("\n---", 1)[0]
    licence_match = re.search(r"^license:[ \t]*(\S+)", metadata, re.MULTILINE)
    return licence_match[1].strip("\"'") if licence_match else None


def _metadata_yaml(facts: ModelFacts, *, base_name: str, adapter: bool, method: str) -> str:
    """The YAML at the head of a model card, from which the Hugging Face hub shows task, base model, licence and results.

    `base_name`: name of the base model. `method`: of tuning, such as `lora`.
    """
    from huggingface_hub import ModelCardData

    task = HUB_TASK_BY_OBJECTIVE.get(facts.run.objective, "text-generation")
    eval_results = model_index_entries(facts, task)
    licence, licence_name = parse_hub_licence(facts.licence)
    model_name = None  # the hub wants one only beside results
    if eval_results:
        model_name = f"{base_name}, fine-tuned ({method})"
    card_data = ModelCardData(
        model_name=model_name,
        eval_results=eval_results or None,
        base_model=base_name,
        # A bottleneck adapter is loaded into a model of transformers, not by peft.
        library_name="peft" if adapter and method != BOTTLENECK_METHOD else "transformers",
        pipeline_tag=task,
        license=licence,
        license_name=licence_name,
        tags=list(dict.fromkeys(["shardtune", "fine-tuned", method])),
    )
    return card_data.to_yaml(line_break="\n")


def _configuration_section(config_yaml: str) -> str:
    """The run's configuration as a folded block of the card; empty without one.

    It is no part of the template, which would close up blank lines within its texts.
    """
    if not config_yaml:
        return ""
    summary = "<summary>The whole configuration</summary>"
    return f"\n<details>{summary}\n\n```yaml\n{config_yaml.rstrip()}\n```\n\n</details>\n"
