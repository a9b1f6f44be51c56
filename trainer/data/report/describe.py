"""What is told about a prepared data set: the report of a run, `audit.json`, and the pages made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.assemble import QUARANTINE, Columns, Totals
from trainer.data.batches.mixing import quotas, realised
from trainer.data.choose.splits import Selection
from trainer.data.config import DataConfig
from trainer.data.document import Tally
from trainer.data.inputs import Input, readers_of, source_weights
from trainer.data.report.card import datacard
from trainer.data.report.page import page
from trainer.data.report.preview import pieces
from trainer.data.stages.language import share
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.data.unread import shown_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STAGES = (
    "read",
    "checks",
    "cleaning",
    "filters",
    "privacy",
    "decontamination",
    "tokenise",
    "duplicates",
    "leakage",
    "balance",
)
MOST_JUDGED = 1000
"""Documents whose language is judged."""
SAMPLES = 5
"""Decoded samples in the audit."""


class Description:
    """Looks at a finished store and writes its reports."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        inputs: list[Input],
        fingerprint: str,
        directory: Path,
        *,
        digest: Callable[[Path], str],
    ) -> None:
        self.config, self.tokenizer, self.inputs, self.digest = config, tokenizer, inputs, digest
        self.formats = {
            item.id: reader.format for item, reader in zip(inputs, readers_of(inputs).values(), strict=True)
        }
        self.fingerprint, self.directory = fingerprint, directory

    def write(
        self, totals: Totals, columns: Columns, selection: Selection, label_names: list[str] | None
    ) -> dict[str, Any]:
        """Write `audit.json`, `audit.html` and `datacard.md`; returns the run's report. Raises DataError (law 5)."""
        rows, dropped = totals.num_rows, totals.tally.num_dropped() + selection.tally.num_dropped()
        chosen = np.unique(np.concatenate(list(selection.splits.values())))
        if rows != len(chosen) + dropped:
            raise AssertionError(f"{rows} rows in, {len(chosen)} kept and {dropped} dropped: some are unaccounted for")
        flow = self._flow(rows, totals.tally, selection.tally)
        data = {split: TokenDataset.open(self.directory / split) for split in selection.splits}
        splits = {split: self._split(part) for split, part in data.items()}
        report = {
            "conserved": {"rows_in": rows, "kept": len(chosen), "dropped": dropped},
            "flow": flow,
            **{split: dict(part) for split, part in splits.items()},
            "duplicates": selection.report.get("duplicates", {}),
            "leakage": selection.report.get("leakage", {}),
            "unread_columns": {name: shown_names(names) for name, names in totals.unread.items() if names},
            "samples": self._samples(data["train"]),
        }
        for split, part in splits.items():
            self._check(split, part, flow)
        audit = {
            "schema": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "shardtune": _version(),
            "fingerprint": self.fingerprint,
            "words": _words(asdict(self.config), "data"),
            "sources": self._sources(totals, columns, data["train"]),
            "flow": flow,
            "conserved": report["conserved"],
            "unread_columns": report["unread_columns"],
            "quarantine": {"rows": totals.num_bad, "file": QUARANTINE},
            "splits": {
                split: {**part, **self._histograms(data[split], selection.splits[split])}
                for split, part in splits.items()
            },
            **selection.report,
            "mixing": self._mixing(data["train"]),
            "samples": report["samples"],
        }
        if totals.findings is not None:
            privacy = self.config.privacy
            names = {"mode": str(privacy.mode), "preset": str(privacy.preset), "engine": str(privacy.engine)}
            audit["privacy"] = report["privacy"] = {**names, **totals.findings.as_dict()}
        if totals.bias is not None:
            audit["bias"] = totals.bias.as_dict()
        if self.config.languages:
            audit["languages"] = self._languages(selection.splits["train"])
        audit = {name: part for name, part in audit.items() if part not in (None, {}, [])}
        text = json.dumps(audit, indent=1, ensure_ascii=False, default=_plain)
        (self.directory / "audit.json").write_text(text, encoding="utf-8")
        (self.directory / "audit.html").write_text(page(audit), encoding="utf-8")
        (self.directory / "datacard.md").write_text(datacard(audit, self.config.card), encoding="utf-8")
        return report

    def _flow(self, rows: int, first: Tally, second: Tally) -> list[dict[str, Any]]:
        """Every stage that did something, with what went in and came out."""
        flow, left = [], rows
        for stage in STAGES:
            tally = second if stage in ("duplicates", "leakage", "balance") else first
            dropped, noted = dict(tally.dropped.get(stage, {})), dict(tally.noted.get(stage, {}))
            examples = {reason: tally.examples.get(f"{stage}/{reason}", []) for reason in (*dropped, *noted)}
            out = left - sum(dropped.values())
            if dropped or noted or stage == "read":
                part = {"stage": stage, "in": left, "out": out, "dropped": dropped, "noted": noted}
                flow.append({**part, "examples": examples})
            left = out
        unknown = {*first.dropped, *second.dropped} - set(STAGES)
        assert not unknown, f"stages without a place in the flow: {unknown}"
        return flow

    def _split(self, data: TokenDataset) -> dict[str, Any]:
        lengths = data.lengths
        tokens, supervised = int(lengths.sum()), int(data.num_supervised.sum())
        doubled, bos = 0, self.tokenizer.bos_token_id
        if bos is not None and len(data):
            starts = data.starts[lengths > 1]
            doubled = int(((data.tokens[starts] == bos) & (data.tokens[starts + 1] == bos)).sum())
        middle, most = np.quantile(lengths, (0.5, 0.9)).round().astype(int).tolist() if len(data) else (0, 0)
        return {
            "documents": len(data) if data.documents is None else len(np.unique(data.documents)),
            "sequences": len(data),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / max(tokens, 1),
            "labelled": data.labels is not None,
            "length_p50": middle,
            "length_p90": most,
            "length_max": int(lengths.max()) if len(data) else 0,
            "ends_supervised": data.num_ended,
            "doubled_bos": doubled,
        }

    def _check(self, split: str, part: dict[str, Any], flow: list[dict[str, Any]]) -> None:
        """Law 5: refuse what would teach nothing."""
        own = getattr(self.config, f"{split}_path", None) is not None
        key = f"data.{split}_path" if own else "data.path"
        if not part["documents"]:
            reasons = ", ".join(
                f"{s['stage']}/{reason} {count}" for s in flow for reason, count in s["dropped"].items()
            )
            raise DataError(
                f"{key}: no document of the {split} split has a supervised token to learn (dropped: {reasons or 'none'}); "
                f"{self._advice(flow)}"
            )
        if not part["labelled"] and part["supervised_share"] < self.config.min_supervised_share:
            raise DataError(
                f"{key}: only {part['supervised_share']:.4%} of the {split} tokens are supervised, less than "
                f"data.min_supervised_share={self.config.min_supervised_share}; mend the data or lower the limit"
            )

    def _advice(self, flow: list[dict[str, Any]]) -> str:
        """What to do about whatever dropped the most."""
        worst = max(flow, key=lambda stage: sum(stage["dropped"].values()))["stage"]
        settings = {"leakage": "data.leakage.policy", "privacy": "data.privacy.mode", "duplicates": "data.duplicates"}
        settings |= {
            "checks": "data.checks",
            "filters": "data.filters",
            "decontamination": "data.decontamination.policy",
        }
        if worst in settings:
            return f"loosen {settings[worst]} or mend the data"
        return f"raise data.max_length={self.config.max_length} or mend the data"

    def _sources(self, totals: Totals, columns: Columns, train: TokenDataset) -> list[dict[str, Any]]:
        found = []
        for item in self.inputs:
            about = {
                "name": item.source,
                "files": [
                    {**file, **({"rows": count} if (count := totals.rows_of_file.get(file["path"])) else {})}
                    for file in item.origin.files(self.digest)
                ],
                "format": str(self.formats[item.id]),
                "rows": totals.rows.get(item.id, 0),
                "kept": totals.kept.get(item.id, 0),
                "weight": item.weight,
                "licence": item.licence or self.config.card.licence,
            }
            if item.split == "train" and item.source in columns.sources and train.sources is not None:
                mine = train.sources == columns.sources.index(item.source)
                about["tokens"] = int(train.lengths[mine].sum())
                about["supervised_tokens"] = int(train.num_supervised[mine].sum())
            found.append({name: value for name, value in about.items() if value is not None})
        return found

    def _mixing(self, train: TokenDataset) -> dict[str, Any]:
        """What the weights ask for, and what an epoch of unpacked documents makes of them."""
        names = train.source_names
        weights = source_weights(self.config, names)
        if train.sources is None or all(weight is None for weight in weights):
            return {}
        units = np.bincount(train.sources, minlength=len(names))
        tokens = np.bincount(train.sources, train.lengths, minlength=len(names)).astype(np.int64)
        over, epoch = self.config.mixing.over, self.config.mixing.epoch
        quota = quotas(units, tokens, weights, over, epoch, names=names)
        told = realised(units, tokens, weights, quota, over, names=names)
        return {name: part for name, part in told.items() if name in self.config.sources}

    def _histograms(self, data: TokenDataset, documents: np.ndarray) -> dict[str, Any]:
        table = DocumentTable(self.directory)
        some = documents[:: max(1, len(documents) // 2000)]
        turns = np.array([len(table.document(int(number)).turns()) for number in some], np.int64)
        shares = data.num_supervised / np.maximum(data.lengths, 1)
        made = {"length_histogram": _histogram(data.lengths), "supervised_histogram": _histogram(shares, (0.0, 1.0))}
        if turns.any():
            most = int(turns.max())
            bins = np.arange(0.5, most + 1.5) if most <= 40 else 30
            counts, edges = np.histogram(turns, bins=bins)
            made["turns_histogram"] = {"edges": edges.round(4).tolist(), "counts": counts.tolist()}
        return made

    def _languages(self, documents: np.ndarray) -> dict[str, int]:
        """Languages of training documents spread over the whole, most frequent first."""
        table = DocumentTable(self.directory)
        some = documents[:: max(1, len(documents) // MOST_JUDGED)]
        return share((table.document(int(number)) for number in some), max_documents=MOST_JUDGED)

    def _samples(self, data: TokenDataset) -> list[dict[str, Any]]:
        table, samples = DocumentTable(self.directory), []
        for number in np.linspace(0, len(data) - 1, min(SAMPLES, len(data))).astype(int).tolist():
            where = table.document(int(data.documents[number])).where if data.documents is not None else ""
            runs = pieces(data.sample(number), self.tokenizer)
            samples.append({"where": where, "pieces": [{"text": text, "learned": learned} for text, learned in runs]})
        return samples


def _histogram(values: np.ndarray, range: tuple[float, float] | None = None) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=30, range=range)
    return {"edges": edges.round(4).tolist(), "counts": counts.tolist()}


def _words(value: Any, key: str) -> dict[str, Any]:
    """Settings by dotted name."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in _words(inner, f"{key}.{name}").items()}
    return {key: value}


def _plain(value: Any) -> Any:
    """What JSON does not know: enumerations."""
    return getattr(value, "value", str(value))


def _version() -> str:
    try:
        return version("shardtune")
    except PackageNotFoundError:  # run from a clone that is not installed
        return "unknown"
