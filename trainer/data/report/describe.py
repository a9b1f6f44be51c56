"""Makes the audit of a finished store, and writes it with the page and the card that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.batches.mixing import SourceMix
from trainer.data.config import DataConfig, DataFormat, PrivacyMode
from trainer.data.document import Document, InputId, Tally
from trainer.data.fields import shorten_name_list
from trainer.data.objective_spec import DataSpec
from trainer.data.report import audit as audit_schema
from trainer.data.report.pages import audit_page_html, datacard_text
from trainer.data.report.preview import decode_weighted_pieces
from trainer.data.report.wording import SETTING_BY_STAGE
from trainer.data.selection.splits import DocumentColumns, Selection
from trainer.data.shards import QUARANTINE_FILE, PreparationTotals
from trainer.data.sources import SourceInput
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.data.transforms.filters import count_languages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST_PASS_STAGES = ("read", "checks", "cleaning", "filters", "privacy", "decontamination", "tokenise")
SECOND_PASS_STAGES = ("duplicates", "leakage", "balance")
MAX_JUDGED_DOCUMENTS = 1000
"""Documents whose language is judged."""
MAX_COUNTED_DOCUMENTS = 2000
"""Documents whose turns are counted."""
NUM_SAMPLES = 5
"""Decoded samples in the audit."""


class ReportWriter:
    """Counts what is in a finished store of prepared data, and writes its reports: audit, page and data card."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        inputs: list[SourceInput],
        formats: Mapping[InputId, DataFormat],
        fingerprint: str,
        directory: Path,
        *,
        digests: Callable[[Path], str],
    ) -> None:
        """Set up the reports on a finished store of prepared data in `directory`.

        `inputs`: the sources and held-out sets. `formats`: how the rows of each were read, by its (split, source). `digests`:
        gives the SHA-256 of a file.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.inputs = inputs
        self.format_by_input = formats
        """How the rows of each input were read, by its (split, source)."""
        self.fingerprint = fingerprint
        self.directory = directory
        self.digest_of = digests
        """Gives the SHA-256 of a file."""

    def write(
        self,
        totals: PreparationTotals,
        columns: DocumentColumns,
        selection: Selection,
        data_spec: DataSpec,
        label_names: list[str] | None,
    ) -> dict[str, Any]:
        """Write `audit.json`, `audit.html` and `datacard.md`; returns what a run records of the audit (`Audit.report`).

        Called once, when the data is prepared. `totals`: what was counted while rows were read. `selection`: which documents are
        in which split. `data_spec` says what samples are; `label_names` are in the order of their ids. Raises DataError for data
        that would teach nothing, and for a held-out set of which no row could be kept.
        """
        samples = self._decode_samples(TokenDataset.open(self.directory / "train"), data_spec, label_names, columns)
        audit = self._make_audit(totals, columns, selection, samples)
        # Before anything is written, so that data that would teach nothing leaves no reports.
        for name, split in audit.splits.items():
            self._check_split_is_useful(name, split, audit.flow, has_answers=data_spec.has_answers)
        # An empty evaluation file would otherwise be noticed only at the first evaluation.
        for source in audit.sources:
            if source.split != "train" and not source.kept:
                raise DataError(
                    f"data.{source.split}_path.{source.name}: of {source.rows} rows none could be kept; mend the files, or "
                    "loosen what drops them"
                )
        audit.write(self.directory)
        # Page and card are made of what the file says, so that the three cannot differ.
        audit = audit_schema.Audit.read(self.directory)
        (self.directory / "audit.html").write_text(audit_page_html(audit, self.config.card), encoding="utf-8")
        (self.directory / "datacard.md").write_text(datacard_text(audit, self.config.card), encoding="utf-8")
        return audit.report()

    def _make_audit(
        self,
        totals: PreparationTotals,
        columns: DocumentColumns,
        selection: Selection,
        samples: list[audit_schema.DecodedSample],
    ) -> audit_schema.Audit:
        """Make the audit of the store: what became of all rows, the sizes of splits and sources, and what each check found.

        `totals`: what was counted while rows were read. `columns`: what is known of each document. `selection`: which documents
        each split has, and what was dropped to make the splits. `samples`: a few decoded sequences. Raises AssertionError if a
        row was neither kept nor dropped.
        """
        # Such as {"rows_in": 100, "kept": 90, "dropped": 10}.
        row_balance = _count_rows_in_kept_dropped(totals, selection)
        datasets = {split: TokenDataset.open(self.directory / split) for split in selection.splits}
        splits = {split: self._describe_split(dataset, selection.splits[split]) for split, dataset in datasets.items()}
        sources = []
        for source_input in self.inputs:
            sources.append(self._describe_source(source_input, totals, columns, datasets.get(source_input.split)))
        unread_columns = {}
        for source, names in totals.unread_columns_by_source.items():
            if names:
                unread_columns[source] = shorten_name_list(names)
        # Judged by a sample of the training documents, and only on request, since it takes time.
        languages = {}
        if self.config.languages:
            languages = count_languages(self._spread_documents(selection.splits["train"], MAX_JUDGED_DOCUMENTS))
        # A part is empty if no setting asked for it.
        return audit_schema.Audit(
            schema=audit_schema.SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            shardtune=_shardtune_version(),
            fingerprint=self.fingerprint,
            words=_settings_by_key(asdict(self.config), "data"),
            conserved=row_balance,
            flow=_stage_reports(row_balance["rows_in"], totals.tally, selection.tally),
            quarantine={"rows": totals.num_rejected_by_reason.total(), "file": QUARANTINE_FILE},
            splits=splits,
            sources=sources,
            unread_columns=unread_columns,
            mixing=self._shares_of_epoch(datasets["train"]),
            **_selection_fields(selection),
            privacy=self._describe_personal_data(totals),
            languages=languages,
            samples=samples,
        )

    def _describe_split(self, dataset: TokenDataset, documents: np.ndarray) -> audit_schema.Split:
        """Describe one split for the audit: its sizes, end tokens and distributions. `documents`: the numbers of its documents.

        Turns are counted in a sample of the documents, since all of them would have to be read.
        """
        counted_documents = self._spread_documents(documents, MAX_COUNTED_DOCUMENTS)
        num_turns = np.array([len(document.turns()) for document in counted_documents], np.int64)
        supervised_shares = dataset.num_supervised / np.maximum(dataset.lengths, 1)
        return audit_schema.Split(
            **audit_schema.split_sizes(dataset),
            ends_supervised=dataset.num_ended,
            doubled_bos=self._num_doubled_bos(dataset),
            length_histogram=audit_schema.make_histogram(dataset.lengths),
            supervised_histogram=audit_schema.make_histogram(supervised_shares, shares=True),
            turns_histogram=audit_schema.make_histogram(num_turns) if num_turns.any() else None,
        )

    def _num_doubled_bos(self, dataset: TokenDataset) -> int:
        """Count the sequences that begin with two BOS: one of the template, one of the tokenizer. No pretraining text does."""
        bos = self.tokenizer.bos_token_id
        if bos is None or not len(dataset):
            return 0
        begins = dataset.starts[dataset.lengths > 1]
        is_doubled = (dataset.tokens[begins] == bos) & (dataset.tokens[begins + 1] == bos)
        return int(is_doubled.sum())

    def _check_split_is_useful(
        self, name: str, split: audit_schema.Split, flow: list[audit_schema.StageReport], *, has_answers: bool
    ) -> None:
        """Raise DataError if a split would teach nothing: no document is left, or too few tokens are supervised.

        `flow`: what each stage dropped, for the message. `has_answers`: whether the data has what is learned; False if the model
        generates it. Of labelled texts the label is learned, and no token.
        """
        has_own_files = getattr(self.config, f"{name}_path", None) is not None
        key = f"data.{name}_path" if has_own_files else "data.path"
        if not split.documents:
            missing = "has a supervised token to learn" if has_answers else "is left as a prompt"
            raise DataError(f"{key}: no document of the {name} split {missing} {self._advice_for_drops(flow)}")
        if has_answers and not split.labelled and split.supervised_share < self.config.min_supervised_share:
            raise DataError(
                f"{key}: only {split.supervised_share:.4%} of the {name} tokens are supervised, less than "
                f"data.min_supervised_share={self.config.min_supervised_share}; fix the data or lower the limit"
            )

    def _advice_for_drops(self, flow: list[audit_schema.StageReport]) -> str:
        """Write the end of an error message: all drops, and the setting to loosen, that of the stage that dropped most.

        Example: "(dropped: tokenise/too_long 12); raise data.max_length=64 or fix the data". `flow`: what each stage dropped.
        """
        drop_counts: list[str] = []
        reasons: set[str] = set()
        for stage in flow:
            for reason, count in stage.dropped.items():
                drop_counts.append(f"{stage.stage}/{reason} {count}")
                reasons.add(reason)
        worst_stage = max(flow, key=lambda stage: sum(stage.dropped.values())).stage
        setting = SETTING_BY_STAGE.get(worst_stage)
        advice = ""
        if setting:
            advice = f"loosen {setting} or "
        elif reasons & {"nothing_to_learn", "same_answers", "too_long"}:
            advice = f"raise data.max_length={self.config.max_length} or "
        return f"(dropped: {', '.join(drop_counts) or 'none'}); {advice}fix the data"

    def _describe_source(
        self,
        source_input: SourceInput,
        totals: PreparationTotals,
        columns: DocumentColumns,
        dataset: TokenDataset | None,
    ) -> audit_schema.Source:
        """Describe one input for the audit: rows and tokens that it gave, with sizes and digests of its files.

        `dataset`: the split that it belongs to; None if that is empty. `totals`: what was counted while rows were read.
        """
        files = []
        for record in source_input.origin.file_records(self.digest_of):
            num_rows = totals.num_rows_by_file.get(record["path"])
            files.append(audit_schema.SourceFile(**record, rows=num_rows))
        num_tokens = num_supervised = 0
        if source_input.source in columns.source_names and dataset is not None:
            is_of_source = dataset.sources == columns.source_names.index(source_input.source)
            num_tokens = int(dataset.lengths[is_of_source].sum())
            num_supervised = int(dataset.num_supervised[is_of_source].sum())
        return audit_schema.Source(
            name=source_input.source,
            split=source_input.split,
            format=str(self.format_by_input[source_input.id]),
            files=files,
            rows=totals.num_rows_by_input[source_input.id],
            kept=totals.num_kept_by_input[source_input.id],
            tokens=num_tokens,
            supervised_tokens=num_supervised,
            weight=source_input.weight,
            licence=source_input.licence or self.config.card.licence,
        )

    def _shares_of_epoch(self, train: TokenDataset) -> dict[str, Any]:
        """Say for the audit which share of an epoch each weighted source is to have and has, by its name; empty without weights.

        {"code": {"requested": 0.3, "share_tokens": 0.29, ...}}, see `SourceMix.report_by_source`. An epoch of unpacked documents:
        packs change the shares a little.
        """
        if all(source.weight is None for source in self.config.sources.values()):
            return {}
        mix = SourceMix.from_units(self.config, train.source_names, train.sources, train.lengths)
        documents_per_epoch = mix.quotas(self.config.mixing)  # of each source
        shares_by_source = mix.report_by_source(documents_per_epoch)
        # The data set has held-out inputs as sources too, which are never mixed.
        return {name: shares for name, shares in shares_by_source.items() if name in self.config.sources}

    def _describe_personal_data(self, totals: PreparationTotals) -> audit_schema.PersonalData | None:
        """Say for the audit what the search for personal data found, by type, the most frequent first; None if it was off.

        `totals`: what was counted while rows were read. Findings have masks of the first few, such as "j***@e***.com", never the
        data itself.
        """
        config = self.config.privacy
        if config.mode is PrivacyMode.none:
            return None
        # Imported here, because it compiles seventy regular expressions.
        from trainer.data.transforms.privacy.stage import privacy_coverage

        findings = totals.tally.findings
        types: dict[str, audit_schema.PersonalType] = {}
        # The most frequent first, then by name.
        for type_name in sorted(findings.counts, key=lambda type_name: (-findings.counts[type_name], type_name)):
            types[type_name] = audit_schema.PersonalType(
                findings=findings.counts[type_name],
                documents=findings.documents_by_type[type_name],
                examples=findings.examples.get(type_name, []),
            )
        documents_with_findings = {source: number for source, number in sorted(findings.documents.items()) if number}
        return audit_schema.PersonalData(
            mode=str(config.mode),
            preset=str(config.preset),
            engine=str(config.engine),
            **privacy_coverage(config),
            documents_scanned=dict(sorted(findings.scanned.items())),
            documents_with_findings=documents_with_findings,
            types=types,
        )

    def _spread_documents(self, document_numbers: np.ndarray, about: int) -> Iterator[Document]:
        """Read about `about` of the documents with these numbers, spread evenly over all, since files are often sorted."""
        table = DocumentTable(self.directory)
        stride = max(1, len(document_numbers) // about)
        for number in document_numbers[::stride]:
            yield table.document(int(number))

    def _decode_samples(
        self, dataset: TokenDataset, data_spec: DataSpec, label_names: list[str] | None, columns: DocumentColumns
    ) -> list[audit_schema.DecodedSample]:
        """Decode the sequences of `NUM_SAMPLES` documents, for people who read the audit; both answers of a pair.

        The documents are spread over the whole split, since files are often sorted. `data_spec` gives the heading of each
        sequence of a document ("chosen", "rejected") and a note on it; `label_names` are in the order of their ids.
        `columns`: what is known of each document.
        """
        table = DocumentTable(self.directory)
        per_document = data_spec.sequences_per_document
        num_documents = len(dataset) // per_document
        shown_documents = np.linspace(0, num_documents - 1, min(NUM_SAMPLES, num_documents)).astype(int)
        samples: list[audit_schema.DecodedSample] = []
        for first_sequence in (shown_documents * per_document).tolist():
            document_number = int(dataset.documents[first_sequence])
            location = columns.location(document_number, table.row(document_number))
            # The sequences of one document follow one another in the data set.
            for sequence, heading in enumerate(data_spec.headings(), start=first_sequence):
                sample = dataset.sample(sequence)
                heading_and_note = (heading.rstrip(":\n"), data_spec.note(sample, label_names))
                note = " ".join(filter(None, heading_and_note))
                pieces = [
                    _piece_fields(text, weight) for text, weight in decode_weighted_pieces(sample, self.tokenizer)
                ]
                samples.append(audit_schema.DecodedSample(where=location, note=note, pieces=pieces))
        return samples


def _count_rows_in_kept_dropped(totals: PreparationTotals, selection: Selection) -> dict[str, int]:
    """Count what became of all rows: {"rows_in", "kept", "dropped"}. Raises AssertionError for a row that is neither."""
    num_rows = totals.num_rows_by_input.total()
    num_dropped = _num_dropped(totals.tally) + _num_dropped(selection.tally)
    # Balance may repeat documents, which are kept once all the same.
    num_kept = len(np.unique(np.concatenate(list(selection.splits.values()))))
    if num_rows != num_kept + num_dropped:
        raise AssertionError(f"{num_rows} rows in, {num_kept} kept and {num_dropped} dropped: some are unaccounted for")
    return {"rows_in": num_rows, "kept": num_kept, "dropped": num_dropped}


def _selection_fields(selection: Selection) -> dict[str, Any]:
    """The fields of an `Audit` that report the choice of splits: labels, balance, duplicates, leakage and groups.

    `selection.report` has their contents by the same names; a part that no setting asked for is empty.
    """
    report = selection.report
    duplicates = {kind: audit_schema.Copies(**counts) for kind, counts in report.get("duplicates", {}).items()}
    leakage = {split: audit_schema.Leaks(**counts) for split, counts in report.get("leakage", {}).items()}
    groups = {split: audit_schema.Groups(**counts) for split, counts in report.get("groups", {}).items()}
    return {
        "labels": report.get("labels", {}),
        "balance": report.get("balance", {}),
        "duplicates": duplicates,
        "leakage": leakage,
        "groups": groups,
    }


def _num_dropped(tally: Tally) -> int:
    """How many documents all stages dropped."""
    return sum(counts_by_reason.total() for counts_by_reason in tally.dropped.values())


def _stage_reports(num_rows: int, first_pass: Tally, second_pass: Tally) -> list[audit_schema.StageReport]:
    """Say how many rows went into and came out of each stage of preparation, in order.

    A stage has a report only if it dropped or noted any; "read" always has one. `first_pass`: what was done to single documents,
    `second_pass`: what the choice of splits (copies, leaks, balance) dropped. `num_rows`: how many were read.
    """
    unknown_stages = {*first_pass.dropped, *second_pass.dropped} - {*FIRST_PASS_STAGES, *SECOND_PASS_STAGES}
    assert not unknown_stages, f"stages without a place in the flow: {unknown_stages}"
    reports: list[audit_schema.StageReport] = []
    rows_in = num_rows
    for stage in (*FIRST_PASS_STAGES, *SECOND_PASS_STAGES):
        # Each stage takes what the one before it left.
        tally = second_pass if stage in SECOND_PASS_STAGES else first_pass
        dropped = dict(tally.dropped.get(stage, {}))
        noted = dict(tally.noted.get(stage, {}))
        examples = {reason: tally.examples.get(f"{stage}/{reason}", []) for reason in (*dropped, *noted)}
        rows_out = rows_in - sum(dropped.values())
        if dropped or noted or stage == "read":
            reports.append(
                audit_schema.StageReport(
                    stage=stage, rows_in=rows_in, rows_out=rows_out, dropped=dropped, noted=noted, examples=examples
                )
            )
        rows_in = rows_out
    return reports


def _piece_fields(text: str, weight: float) -> dict[str, Any]:
    """The form of a decoded piece of a sample in the audit: {"text": "Hi", "learned": True}, and "weight" if below 1."""
    fields: dict[str, Any] = {"text": text, "learned": weight > 0}
    if 0 < weight < 1:
        fields["weight"] = weight
    return fields


def _settings_by_key(value: Any, key: str) -> dict[str, Any]:
    """List nested settings by dotted key: {"a": {"b": 1}} below "data" -> {"data.a.b": 1}. Enumerations as their values."""
    if not isinstance(value, dict) or not value:
        return {key: getattr(value, "value", value)}
    settings: dict[str, Any] = {}
    for name, inner_value in value.items():
        settings |= _settings_by_key(inner_value, f"{key}.{name}")
    return settings


def _shardtune_version() -> str:
    """The installed version of shardtune; "unknown" if it runs from a clone that is not installed."""
    try:
        return version("shardtune")
    except PackageNotFoundError:
        return "unknown"
