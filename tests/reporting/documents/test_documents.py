"""Every document of one model, word for word: the card with its metadata, and all papers.

After a change of a template that was meant: `python -m tests.reporting.documents.test_documents`, and read the difference.
"""

from pathlib import Path

import pytest

from trainer.reporting.documents.card import render_card
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.documents.questions import Paper
from trainer.reporting.documents.write import render_document
from trainer.reporting.results import EVALUATION_REPORT, REVIEW_REPORT, KeptReport
from trainer.reporting.run_record import parse_run_record

EXPECTED = Path(__file__).with_name("expected")
RUN = {
    "tuning": "lora",
    "objective": "sft",
    "strategy": "zero3",
    "world_size": 4,
    "precision": "bf16",
    "global_batch": 16,
    "micro_batch": 2,
    "accumulation": 2,
    "attention": "sdpa",
    "layout": "padding_free",
    "device": "cuda:0",
    "device_name": "NVIDIA H100",
    "base_model": "org/base",
    "base_parameters": 1_234_567_890,
    "flops_per_token": 6e9,
    "quantisation": "nf4",
    "data_fingerprint": "abc123",
    "data_report": {
        "train": {"documents": 1200, "tokens": 34567, "truncated": {"count": 7}, "empty": {"count": 0}},
        "eval": {"documents": 3, "tokens": 10},
        "seconds": 1.0,
    },
    "substitutions": {"batch.micro": "auto -> 2 (more & <faster>)"},
    "versions": {"torch": "2.13", "transformers": "5.24", "peft": "0.21"},
    "git_revision": "deadbeef",
    "config_sha256": "f00",
    "initialised": ["score.weight"],
    "accepted": ["3 rows that are no conversations"],
    "energy": {"kwh": 1.5, "by": "codecarbon", "hosts": 2, "kg_co2e": 0.5, "country": "DEU"},
    "challenges": {"overfit": {"found": True, "verdict": "overfitting", "first_step": 20, "says": "loss *rose*"}},
    "outcome": {
        "progress": {"step": 500},
        "before": {"eval/loss": 2.5, "eval/perplexity": 1e9},
        "after": {"eval/loss": 1.25, "eval/new": 0.5, "eval/perplexity": 3.49},
        "speed": {"tokens_per_s": 1000.0},
    },
}
AUDIT = {
    "sources": [
        {
            "name": "notes|ward",
            "split": "train",
            "format": "chat",
            "rows": 10,
            "kept": 9,
            "tokens": 100,
            "licence": "cc-by-nc-4.0",
        },
        {"name": "web", "split": "eval", "format": "text", "rows": 10, "kept": 9, "tokens": 100, "licence": None},
    ],
    "conserved": {"rows_in": 20, "kept": 18, "dropped": 2},
    "fingerprint": "abc123",
    "languages": {"en": 5, "de": 2},
    "flow": [{"stage": "read", "rows_in": 20, "rows_out": 18, "dropped": {"short": 2}}],
    "duplicates": {"exact": {"documents": 1, "policy": "drop"}},
    "privacy": {
        "mode": "report",
        "engine": "rules",
        "preset": "eu",
        "looked_for": ["EMAIL"],
        "not_looked_for": {"PERSON": "needs data.privacy.engine=presidio"},
        "documents_scanned": {"notes|ward": 9},
        "documents_with_findings": {"notes|ward": 1},
        "types": {"EMAIL": {"findings": 2, "documents": 1}},
    },
}
ANSWERS = {"provider": "Clinic | of X", "licence": "my-own-terms", "base_flop": 1e16, "intended_use": "Notes of wards."}
GATES = {
    "gates": [
        {"metric": "eval/loss", "bound": "<2", "value": 1.25, "passed": True},
        {"metric": "review/win_rate", "bound": ">0.5", "value": None, "passed": False},
    ],
    "override": "the review is next week",
}


def _evaluation(artefact):
    loss = {"value": 1.2345678, "low": 1.1, "high": 1.3}
    tasks = {
        "general": {
            "num_rows": 8,
            "rows_sha256": "a",
            "path": "/home/somebody/general.jsonl",
            "metrics": {"loss": loss},
        },
        "facts": {
            "num_rows": 9,
            "rows_sha256": "b",
            "path": "hub:owner/facts",
            "metrics": {"exact_match": {"value": 1}},
        },
    }
    base = {"what": "base", "tasks": {"general": {"metrics": {"loss": {"value": 3.0}}}}}
    return KeptReport(
        EVALUATION_REPORT, Path("report"), {"model": {"artefact": artefact}, "tasks": tasks, "against": base}
    )


def _review(artefact):
    report = {
        "model": {"artefact": artefact},
        "reviewers": [{"name": "ada", "flags": ["fast"]}, {"name": "bert", "flags": []}],
        "num_prompts": 12,
        "method": "pairs",
        "metrics": {"win_rate": {"value": 0.6, "low": 0.4, "high": 0.8}, "alpha": {"value": 0.33}},
    }
    return KeptReport(REVIEW_REPORT, Path("review"), report)


def documents() -> dict[str, str]:
    """Text by file name."""
    facts = ModelFacts(
        run=parse_run_record(RUN, []),
        config_yaml="model:\n  path: org/base\n",
        audit=AUDIT,
        answers=ANSWERS,
        reports=[_review("weights"), _evaluation("weights"), _evaluation("other weights")],
        step=500,
        tokens=1_000_000,
        artefact="weights",
        accepted=["base"],
        gates=GATES,
        base_licence="apache-2.0",
        resize_to=777,
    )
    texts = {f"{name}.md": render_document(name, facts) for name in Paper}
    return texts | {"card.md": render_card(facts, adapter=True, base_path="org/base")}


@pytest.mark.parametrize("name", ["card.md", *(f"{paper}.md" for paper in Paper)])
def test_document_is_word_for_word_the_recorded_one(name):
    assert documents()[name] == (EXPECTED / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    for name, text in documents().items():
        (EXPECTED / name).write_text(text, encoding="utf-8")
