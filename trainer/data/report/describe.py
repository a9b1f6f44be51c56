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
from trainer.data.objective_spec import Reading
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
        self.config, self.tokenizer, self.inputs, self.digest = config, tokenizer, inputs, digest
        self.formats = formats
        """How the rows of each input were read, by its id."""
        self.fingerprint, self.directory = fingerprint, directory

    def write(
        self, totals: Totals, columns: Columns, selection: Selection, reading: Reading, names: list[str] | None
    ) -> dict[str, Any]:
        """Write `audit.json`, `audit.html` and `datacard.md`; returns the run's report. Raises DataError (law 5).

        `reading` says what samples are, `names` are those of the labels in the order of their ids.
        """
        samples = self._decode_samples(TokenDataset.open(self.directory / "train"), reading, names)
        made = self.audit(totals, columns, selection)
        made.samples = samples
        for split, part in made.splits.items():
            self._refuse_useless_split(split, part, made.flow)
        for source in made.sources:
            if source.split != "train" and not source.kept:
                raise DataError(
                    f"data.{source.split}_path.{source.name}: of {source.rows} rows none could be kept; mend the files, or "
                    "loosen what drops them"
                )
        made.write(self.directory)
        # Page and card are made of what the file says, so that the three cannot differ.
        audit = form.Audit.read(self.directory)
        (self.directory / "audit.html").write_text(audit_page(audit, self.config.card), encoding="utf-8")
        (self.directory / "datacard.md").write_text(datacard(audit, self.config.card), encoding="utf-8")
        return audit.report()

    def audit(self, totals: Totals, columns: Columns, selection: Selection) -> form.Audit:
        """The audit of the store, without samples. Raises AssertionError where a row is unaccounted for."""
        rows, dropped = (
            totals.rows.total(),
            sum(c.total() for t in (totals.tally, selection.tally) for c in t.dropped.values()),
        )
        chosen = np.unique(np.concatenate(list(selection.splits.values())))
        if rows != len(chosen) + dropped:
            raise AssertionError(f"{rows} rows in, {len(chosen)} kept and {dropped} dropped: some are unaccounted for")
        data = {split: TokenDataset.open(self.directory / split) for split in selection.splits}
        found = selection.report
        judged = self._documents(selection.splits["train"], MAX_JUDGED_DOCUMENTS)
        return form.Audit(
            schema=form.SCHEMA,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            shardtune=_version(),
            fingerprint=self.fingerprint,
            words=_dotted_settings(asdict(self.config), "data"),
            conserved={"rows_in": rows, "kept": len(chosen), "dropped": dropped},
            flow=_flow(rows, totals.tally, selection.tally),
            quarantine={"rows": totals.bad_reasons.total(), "file": QUARANTINE},
            splits={split: self._split(part, selection.splits[split]) for split, part in data.items()},
            sources=[self._source(item, totals, columns, data.get(item.split)) for item in self.inputs],
            unread_columns={source: shown_names(names) for source, names in totals.unread.items() if names},
            mixing=self._mixing(data["train"]),
            labels=found.get("labels", {}),
            balance=found.get("balance", {}),
            duplicates={kind: form.Copies(**part) for kind, part in found.get("duplicates", {}).items()},
            leakage={split: form.Leaks(**part) for split, part in found.get("leakage", {}).items()},
            groups={split: form.Groups(**part) for split, part in found.get("groups", {}).items()},
            privacy=self._privacy(totals),
            languages=count_languages(judged) if self.config.languages else {},
            samples=[],
        )

    def _split(self, data: TokenDataset, documents: np.ndarray) -> form.Split:
        lengths, doubled, bos = data.lengths, 0, self.tokenizer.bos_token_id
        if bos is not None and len(data):
            starts = data.starts[lengths > 1]
            doubled = int(((data.tokens[starts] == bos) & (data.tokens[starts + 1] == bos)).sum())
        sizes = form.split_sizes(data)
        turns = np.array(
            [len(document.turns()) for document in self._documents(documents, MAX_COUNTED_DOCUMENTS)], np.int64
        )
        return form.Split(
            **sizes,
            ends_supervised=data.num_ended,
            doubled_bos=doubled,
            length_histogram=form.make_histogram(lengths),
            supervised_histogram=form.make_histogram(data.num_supervised / np.maximum(lengths, 1), shares=True),
            turns_histogram=form.make_histogram(turns) if turns.any() else None,
        )

    def _refuse_useless_split(self, split: str, part: form.Split, flow: list[form.StageReport]) -> None:
        """Law 5: refuse what would teach nothing."""
        own = getattr(self.config, f"{split}_path", None) is not None
        key = f"data.{split}_path" if own else "data.path"
        if not part.documents:
            reasons = ", ".join(f"{s.stage}/{reason} {count}" for s in flow for reason, count in s.dropped.items())
            worst = max(flow, key=lambda stage: sum(stage.dropped.values())).stage
            knob = STAGE_SETTINGS.get(worst)
            too_long = any({"nothing_to_learn", "same_answers", "too_long"} & {*stage.dropped} for stage in flow)
            advice = f"loosen {knob} or " if knob else ""
            if too_long and not knob:
                advice = f"raise data.max_length={self.config.max_length} or "
            raise DataError(
                f"{key}: no document of the {split} split has a supervised token to learn (dropped: {reasons or 'none'}); "
                f"{advice}mend the data"
            )
        if not part.labelled and part.supervised_share < self.config.min_supervised_share:
            raise DataError(
                f"{key}: only {part.supervised_share:.4%} of the {split} tokens are supervised, less than "
                f"data.min_supervised_share={self.config.min_supervised_share}; mend the data or lower the limit"
            )

    def _source(self, item: Input, totals: Totals, columns: Columns, data: TokenDataset | None) -> form.Source:
        files = item.origin.files(self.digest)
        tokens = supervised = 0
        if item.source in columns.sources and data is not None:
            mine = data.sources == columns.sources.index(item.source)
            tokens, supervised = int(data.lengths[mine].sum()), int(data.num_supervised[mine].sum())
        return form.Source(
            name=item.source,
            split=item.split,
            format=str(self.formats[item.id]),
            files=[form.SourceFile(**file, rows=totals.rows_of_file.get(file["path"])) for file in files],
            rows=totals.rows[item.id],
            kept=totals.kept[item.id],
            tokens=tokens,
            supervised_tokens=supervised,
            weight=item.weight,
            licence=item.licence or self.config.card.licence,
        )

    def _mixing(self, train: TokenDataset) -> dict[str, Any]:
        """What the weights ask for, and what an epoch of unpacked documents makes of them."""
        if all(source.weight is None for source in self.config.sources.values()):
            return {}
        mix = Mix.of(self.config, train.source_names, train.sources, train.lengths)
        told = mix.realised(mix.quotas(self.config.mixing))
        return {name: part for name, part in told.items() if name in self.config.sources}

    def _privacy(self, totals: Totals) -> form.PersonalData | None:
        config, found = self.config.privacy, totals.tally.findings
        if config.mode is PrivacyMode.none:
            return None
        from trainer.data.transforms.privacy.stage import coverage  # which makes seventy expressions

        return form.PersonalData(
            mode=str(config.mode),
            preset=str(config.preset),
            engine=str(config.engine),
            **coverage(config),
            documents_scanned=dict(sorted(found.scanned.items())),
            documents_with_findings=dict(sorted((k, v) for k, v in found.documents.items() if v)),
            types={
                name: form.PersonalType(
                    findings=count, documents=found.documents_by_type[name], examples=found.examples.get(name, [])
                )
                for name, count in sorted(found.counts.items(), key=lambda item: (-item[1], item[0]))
            },
        )

    def _documents(self, numbers: np.ndarray, most: int) -> Iterator[Document]:
        """About `most` of the documents, spread over the whole."""
        table = DocumentTable(self.directory)
        return (table.document(int(number)) for number in numbers[:: max(1, len(numbers) // most)])

    def _decode_samples(
        self, data: TokenDataset, reading: Reading, names: list[str] | None
    ) -> list[form.DecodedSample]:
        """Sequences spread over the whole; of pairs both answers, since a mark alone would not tell which is wanted."""
        table, samples, each = DocumentTable(self.directory), [], reading.sequences_per_document
        of_each = len(data) // each
        for first in (np.linspace(0, of_each - 1, min(NUM_SAMPLES, of_each)).astype(int) * each).tolist():
            taken = [data.sample(number) for number in range(first, first + each)]
            where = table.document(int(data.documents[first])).where
            for sample, head in zip(taken, reading.headings(), strict=True):
                note = " ".join(filter(None, (head.rstrip(":\n"), reading.note(sample, names))))
                made = [_piece(text, weight) for text, weight in decode_pieces(sample, self.tokenizer)]
                samples.append(form.DecodedSample(where=where, note=note, pieces=made))
        return samples


def _flow(rows: int, first: Tally, second: Tally) -> list[form.StageReport]:
    """Every stage that did something, with what went in and came out."""
    flow, left = [], rows
    for stage in (*FIRST_PASS, *SECOND_PASS):
        tally = second if stage in SECOND_PASS else first
        dropped, noted = dict(tally.dropped.get(stage, {})), dict(tally.noted.get(stage, {}))
        examples = {reason: tally.examples.get(f"{stage}/{reason}", []) for reason in (*dropped, *noted)}
        out = left - sum(dropped.values())
        if dropped or noted or stage == "read":
            made = form.StageReport(
                stage=stage, rows_in=left, rows_out=out, dropped=dropped, noted=noted, examples=examples
            )
            flow.append(made)
        left = out
    unknown = {*first.dropped, *second.dropped} - {*FIRST_PASS, *SECOND_PASS}
    assert not unknown, f"stages without a place in the flow: {unknown}"
    return flow


def _piece(text: str, weight: float) -> dict[str, Any]:
    return {"text": text, "learned": weight > 0, **({"weight": weight} if 0 < weight < 1 else {})}


def _dotted_settings(value: Any, key: str) -> dict[str, Any]:
    """Settings by dotted name, enumerations as their words."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in _dotted_settings(inner, f"{key}.{name}").items()}
    return {key: getattr(value, "value", value)}


def _version() -> str:
    try:
        return version("shardtune")
    except PackageNotFoundError:  # run from a clone that is not installed
        return "unknown"
