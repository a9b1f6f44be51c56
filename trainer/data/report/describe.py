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
from trainer.data.batches.mixing import Mix
from trainer.data.config import DataConfig, DataFormat, PrivacyMode
from trainer.data.document import Document, Tally
from trainer.data.fields import shown_names
from trainer.data.objective_spec import DataSpec
from trainer.data.report import audit as form
from trainer.data.report.pages import audit_page, datacard
from trainer.data.report.preview import decode_pieces
from trainer.data.report.wording import STAGE_SETTINGS
from trainer.data.selection.splits import Columns, Selection
from trainer.data.shards import QUARANTINE, Totals
from trainer.data.sources import Input
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset
from trainer.data.transforms.filters import count_languages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST_PASS = ("read", "checks", "cleaning", "filters", "privacy", "decontamination", "tokenise")
SECOND_PASS = ("duplicates", "leakage", "balance")
MAX_JUDGED_DOCUMENTS = 1000
"""Documents whose language is judged."""
MAX_COUNTED_DOCUMENTS = 2000
"""Documents whose turns are counted."""
NUM_SAMPLES = 5
"""Decoded samples in the audit."""


class ReportWriter:
    """Looks at a finished store and writes its reports."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        inputs: list[Input],
        formats: Mapping[tuple[str, str], DataFormat],
        fingerprint: str,
        directory: Path,
        *,
        digest: Callable[[Path], str],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.inputs = inputs
        self.formats = formats
        """How the rows of each input were read, by its id."""
        self.fingerprint = fingerprint
        self.directory = directory
        self.digest = digest

    def write(
        self, totals: Totals, columns: Columns, selection: Selection, data_spec: DataSpec, names: list[str] | None
    ) -> dict[str, Any]:
        """Write `audit.json`, `audit.html` and `datacard.md`; returns the run's report.

        `reading` says what samples are, `names` are those of the labels in the order of their ids. Raises DataError for data
        that would teach nothing.
        """
        samples = self._decode_samples(TokenDataset.open(self.directory / "train"), data_spec, names)
        audit = self.audit(totals, columns, selection)
        audit.samples = samples
        for name, split in audit.splits.items():
            self._refuse_useless_split(name, split, audit.flow)
        # An empty evaluation file would otherwise be noticed only at the first evaluation.
        for source in audit.sources:
            if source.split != "train" and not source.kept:
                raise DataError(
                    f"data.{source.split}_path.{source.name}: of {source.rows} rows none could be kept; mend the files, or "
                    "loosen what drops them"
                )
        audit.write(self.directory)
        # Page and card are made of what the file says, so that the three cannot differ.
        audit = form.Audit.read(self.directory)
        (self.directory / "audit.html").write_text(audit_page(audit, self.config.card), encoding="utf-8")
        (self.directory / "datacard.md").write_text(datacard(audit, self.config.card), encoding="utf-8")
        return audit.report()

    def audit(self, totals: Totals, columns: Columns, selection: Selection) -> form.Audit:
        """The audit of the store, without samples. Raises AssertionError where a row is unaccounted for."""
        rows = totals.rows.total()
        dropped = _num_dropped(totals.tally) + _num_dropped(selection.tally)
        # Balance may repeat documents, which are kept once all the same.
        kept = len(np.unique(np.concatenate(list(selection.splits.values()))))
        if rows != kept + dropped:
            raise AssertionError(f"{rows} rows in, {kept} kept and {dropped} dropped: some are unaccounted for")
        datasets = {split: TokenDataset.open(self.directory / split) for split in selection.splits}
        parts = selection.report
        languages = {}
        if self.config.languages:
            languages = count_languages(self._documents(selection.splits["train"], MAX_JUDGED_DOCUMENTS))
        return form.Audit(
            schema=form.SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            shardtune=_version(),
            fingerprint=self.fingerprint,
            words=_dotted_settings(asdict(self.config), "data"),
            conserved={"rows_in": rows, "kept": kept, "dropped": dropped},
            flow=_flow(rows, totals.tally, selection.tally),
            quarantine={"rows": totals.bad_reasons.total(), "file": QUARANTINE},
            splits={split: self._split(dataset, selection.splits[split]) for split, dataset in datasets.items()},
            sources=[self._source(source, totals, columns, datasets.get(source.split)) for source in self.inputs],
            unread_columns={source: shown_names(names) for source, names in totals.unread.items() if names},
            mixing=self._mixing(datasets["train"]),
            labels=parts.get("labels", {}),
            balance=parts.get("balance", {}),
            duplicates={kind: form.Copies(**copies) for kind, copies in parts.get("duplicates", {}).items()},
            leakage={split: form.Leaks(**leaks) for split, leaks in parts.get("leakage", {}).items()},
            groups={split: form.Groups(**groups) for split, groups in parts.get("groups", {}).items()},
            privacy=self._privacy(totals),
            languages=languages,
            samples=[],
        )

    def _split(self, dataset: TokenDataset, documents: np.ndarray) -> form.Split:
        """Sizes, end tokens and distributions of one split."""
        lengths = dataset.lengths
        bos = self.tokenizer.bos_token_id
        doubled_bos = 0
        if bos is not None and len(dataset):
            starts = dataset.starts[lengths > 1]
            # A template that writes BOS and a tokenizer that adds another: the model would see what it never saw in
            # pretraining.
            is_doubled = (dataset.tokens[starts] == bos) & (dataset.tokens[starts + 1] == bos)
            doubled_bos = int(is_doubled.sum())
        counted_documents = self._documents(documents, MAX_COUNTED_DOCUMENTS)
        turns = np.array([len(document.turns()) for document in counted_documents], np.int64)
        return form.Split(
            **form.split_sizes(dataset),
            ends_supervised=dataset.num_ended,
            doubled_bos=doubled_bos,
            length_histogram=form.make_histogram(lengths),
            supervised_histogram=form.make_histogram(dataset.num_supervised / np.maximum(lengths, 1), shares=True),
            turns_histogram=form.make_histogram(turns) if turns.any() else None,
        )

    def _refuse_useless_split(self, name: str, split: form.Split, flow: list[form.StageReport]) -> None:
        """Raise DataError for a split that would teach nothing, with the setting that took its documents."""
        has_own_files = getattr(self.config, f"{name}_path", None) is not None
        key = f"data.{name}_path" if has_own_files else "data.path"
        if not split.documents:
            drops: list[tuple[str, str, int]] = []
            for stage in flow:
                drops += [(stage.stage, code, number) for code, number in stage.dropped.items()]
            reasons = ", ".join(f"{name_of_stage}/{code} {number}" for name_of_stage, code, number in drops)
            worst_stage = max(flow, key=lambda stage: sum(stage.dropped.values())).stage
            setting = STAGE_SETTINGS.get(worst_stage)
            advice = ""
            if setting:
                advice = f"loosen {setting} or "
            elif any(code in ("nothing_to_learn", "same_answers", "too_long") for _, code, _ in drops):
                advice = f"raise data.max_length={self.config.max_length} or "
            raise DataError(
                f"{key}: no document of the {name} split has a supervised token to learn (dropped: {reasons or 'none'}); "
                f"{advice}fix the data"
            )
        if not split.labelled and split.supervised_share < self.config.min_supervised_share:
            raise DataError(
                f"{key}: only {split.supervised_share:.4%} of the {name} tokens are supervised, less than "
                f"data.min_supervised_share={self.config.min_supervised_share}; fix the data or lower the limit"
            )

    def _source(
        self, source_input: Input, totals: Totals, columns: Columns, dataset: TokenDataset | None
    ) -> form.Source:
        """Rows and tokens that one input gave, with sizes and digests of its files."""
        files = source_input.origin.files(self.digest)
        tokens = supervised = 0
        if source_input.source in columns.sources and dataset is not None:
            of_source = dataset.sources == columns.sources.index(source_input.source)
            tokens = int(dataset.lengths[of_source].sum())
            supervised = int(dataset.num_supervised[of_source].sum())
        return form.Source(
            name=source_input.source,
            split=source_input.split,
            format=str(self.formats[source_input.id]),
            files=[form.SourceFile(**file, rows=totals.rows_of_file.get(file["path"])) for file in files],
            rows=totals.rows[source_input.id],
            kept=totals.kept[source_input.id],
            tokens=tokens,
            supervised_tokens=supervised,
            weight=source_input.weight,
            licence=source_input.licence or self.config.card.licence,
        )

    def _mixing(self, train: TokenDataset) -> dict[str, Any]:
        """Shares that the weights of sources ask for beside those of an epoch of unpacked documents; empty without weights."""
        if all(source.weight is None for source in self.config.sources.values()):
            return {}
        mix = Mix.of(self.config, train.source_names, train.sources, train.lengths)
        realised = mix.realised(mix.quotas(self.config.mixing))
        return {name: shares for name, shares in realised.items() if name in self.config.sources}

    def _privacy(self, totals: Totals) -> form.PersonalData | None:
        """What the search for personal data found; None if it was switched off."""
        config = self.config.privacy
        if config.mode is PrivacyMode.none:
            return None
        # Imported here, because it compiles seventy regular expressions.
        from trainer.data.transforms.privacy.stage import coverage

        findings = totals.tally.findings
        types: dict[str, form.PersonalType] = {}
        for name, count in sorted(findings.counts.items(), key=lambda entry: (-entry[1], entry[0])):
            types[name] = form.PersonalType(
                findings=count, documents=findings.documents_by_type[name], examples=findings.examples.get(name, [])
            )
        with_findings = {source: number for source, number in sorted(findings.documents.items()) if number}
        return form.PersonalData(
            mode=str(config.mode),
            preset=str(config.preset),
            engine=str(config.engine),
            **coverage(config),
            documents_scanned=dict(sorted(findings.scanned.items())),
            documents_with_findings=with_findings,
            types=types,
        )

    def _documents(self, numbers: np.ndarray, at_most: int) -> Iterator[Document]:
        """About `at_most` of the documents with these numbers, spread over all of them."""
        table = DocumentTable(self.directory)
        stride = max(1, len(numbers) // at_most)
        return (table.document(int(number)) for number in numbers[::stride])

    def _decode_samples(
        self, dataset: TokenDataset, data_spec: DataSpec, label_names: list[str] | None
    ) -> list[form.DecodedSample]:
        """Decoded sequences, spread over the split; of pairs both answers, since one alone would not tell which is wanted."""
        table = DocumentTable(self.directory)
        samples: list[form.DecodedSample] = []
        per_document = data_spec.sequences_per_document
        num_documents = len(dataset) // per_document
        # Spread over the whole split, since files are often sorted.
        shown_documents = np.linspace(0, num_documents - 1, min(NUM_SAMPLES, num_documents)).astype(int)
        for first in (shown_documents * per_document).tolist():
            location = table.document(int(dataset.documents[first])).location
            for number, heading in enumerate(data_spec.headings(), first):
                sample = dataset.sample(number)
                notes = (heading.rstrip(":\n"), data_spec.note(sample, label_names))
                samples.append(
                    form.DecodedSample(
                        where=location,
                        note=" ".join(filter(None, notes)),
                        pieces=[_piece(text, weight) for text, weight in decode_pieces(sample, self.tokenizer)],
                    )
                )
        return samples


def _num_dropped(tally: Tally) -> int:
    return sum(reasons.total() for reasons in tally.dropped.values())


def _flow(rows: int, first_pass: Tally, second_pass: Tally) -> list[form.StageReport]:
    """Every stage that did something, with what went in and came out."""
    unknown = {*first_pass.dropped, *second_pass.dropped} - {*FIRST_PASS, *SECOND_PASS}
    assert not unknown, f"stages without a place in the flow: {unknown}"
    flow: list[form.StageReport] = []
    rows_in = rows
    for stage in (*FIRST_PASS, *SECOND_PASS):
        # The passes keep tallies of their own.
        tally = second_pass if stage in SECOND_PASS else first_pass
        dropped = dict(tally.dropped.get(stage, {}))
        noted = dict(tally.noted.get(stage, {}))
        examples = {code: tally.examples.get(f"{stage}/{code}", []) for code in (*dropped, *noted)}
        rows_out = rows_in - sum(dropped.values())
        if dropped or noted or stage == "read":
            flow.append(
                form.StageReport(
                    stage=stage, rows_in=rows_in, rows_out=rows_out, dropped=dropped, noted=noted, examples=examples
                )
            )
        rows_in = rows_out
    return flow


def _piece(text: str, weight: float) -> dict[str, Any]:
    """A piece as `form.DecodedSample` has it."""
    piece: dict[str, Any] = {"text": text, "learned": weight > 0}
    if 0 < weight < 1:
        piece["weight"] = weight
    return piece


def _dotted_settings(setting: Any, key: str) -> dict[str, Any]:
    """Settings by dotted name, enumerations as their words."""
    if not isinstance(setting, dict) or not setting:
        return {key: getattr(setting, "value", setting)}
    settings: dict[str, Any] = {}
    for name, inner in setting.items():
        settings |= _dotted_settings(inner, f"{key}.{name}")
    return settings


def _version() -> str:
    try:
        return version("shardtune")
    except PackageNotFoundError:  # run from a clone that is not installed
        return "unknown"
