"""The model card says what is known, names what is not, and tells no paths of the machine."""

import yaml

from trainer.reporting.documents.card import licence_in_model_card, render_card, write_documents
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.run_record import parse_run_record

FACTS = {
    "tuning": "lora",
    "objective": "sft",
    "strategy": "zero3",
    "data_fingerprint": "abc123",
    "data_report": {
        "train": {"documents": 1200, "tokens": 34567, "truncated": {"count": 7, "examples": []}},
        "seconds": 1.0,
    },
    "substitutions": {"precision": "auto -> bf16"},
    "versions": {"torch": "2.13"},
    "git_revision": "deadbeef",
    "config_sha256": "f00",
}


def facts(run=FACTS, **fields):
    return ModelFacts(run=parse_run_record(run, []), step=500, tokens=1_000_000, **fields)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_metadata_evaluation_and_lineage():
    outcome = {
        "progress": {"step": 500},
        "before": {"eval/loss": 2.5},
        "after": {"eval/loss": 1.25, "eval/new": 0.5},
    }
    model = facts({**FACTS, "outcome": outcome}, config_yaml="a: 1\n", base_licence="mit")
    text = render_card(model, adapter=True, base_path="org/name")
    assert front_matter(text) == {
        "base_model": "org/name",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["shardtune", "fine-tuned", "lora"],
    }
    assert "| eval/loss | 2.5000 | 1.2500 |" in text and "| eval/new | - | 0.5000 |" in text
    for known in (
        "1,200 documents, 34,567 tokens, 7 truncated",
        "abc123",
        "deadbeef",
        "f00",
        "torch 2.13",
        "zero3",
        "1,000,000",
    ):
        assert known in text
    assert "resolved: precision: auto -> bf16" in text and "```yaml\na: 1\n```" in text
    assert "PeftModel.from_pretrained" in text and "resize" not in text


def test_card_claims_metrics_of_training_only_for_the_weights_that_it_ended_with():
    outcome = {"progress": {"step": 500}, "before": {}, "after": {"eval/loss": 1.25}}
    model = facts({**FACTS, "outcome": outcome})
    assert "eval/loss" in render_card(model, adapter=True, base_path="org/name")
    model.are_of_one_checkpoint = False
    assert "eval/loss" not in render_card(model, adapter=True, base_path="org/name")
    model.are_of_one_checkpoint, model.step = True, 400
    assert "eval/loss" not in render_card(model, adapter=True, base_path="org/name")


def test_card_keeps_the_blank_lines_of_texts_in_the_configuration():
    text = "a: 'one\n\n\n\n  two'\n"
    card = render_card(facts(config_yaml=text), adapter=True, base_path="org/name")
    assert f"```yaml\n{text}```" in card


def test_card_claims_nothing_that_nobody_measured():
    text = render_card(facts({}), adapter=False, base_path="org/name")
    assert (
        "No held-out data was evaluated" in text
        and "not recorded" in text
        and "**not** been" in text.replace("\n", " ")
    )
    assert "license" not in front_matter(text) and "peft" not in text


def test_card_names_a_directory_by_its_last_part_only(tmp_path):
    base = tmp_path / "clinic" / "base-model"
    base.mkdir(parents=True)
    text = render_card(facts({**FACTS, "base_model": str(base)}), adapter=True, base_path=str(base))
    assert front_matter(text)["base_model"] == "base-model" and str(tmp_path) not in text


def test_card_licence_is_the_one_that_the_base_states(tmp_path):
    assert licence_in_model_card(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: []\n---\nlicense: mine\n")
    assert licence_in_model_card(str(tmp_path)) == "apache-2.0"
    export = tmp_path / "export"
    export.mkdir()
    write_documents(export, [], facts(), adapter=True, base_path=str(tmp_path))
    assert front_matter((export / "README.md").read_text())["license"] == "apache-2.0"
    (tmp_path / "README.md").write_text("# no metadata\nlicense: mit\n")
    assert licence_in_model_card(str(tmp_path)) is None


def test_loading_code_of_a_classifier_and_of_a_grown_vocabulary():
    run = {**FACTS, "objective": "classification", "label_names": ["a", "b", "c"]}
    text = render_card(facts(run, resize_to=777), adapter=True, base_path="org/name")
    assert (
        "AutoModelForSequenceClassification" in text
        and "num_labels=3" in text
        and "resize_token_embeddings(777)" in text
    )
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_loading_code_of_methods_that_plain_peft_does_not_serve():
    text = render_card(facts({**FACTS, "tuning": "bottleneck"}), adapter=True, base_path="org/name")
    assert front_matter(text)["library_name"] == "transformers" and "PeftModel" not in text
    assert "from trainer.tuning.bottleneck import load" in text
    assert 'load(model, "path/to/this/directory")' in text
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    for method, told in (("prefix", True), ("lora", False)):
        text = render_card(facts({**FACTS, "tuning": method}), adapter=True, base_path="org/name")
        assert "PeftModel.from_pretrained" in text and ("trainer.tuning.virtual import load" in text) == told
