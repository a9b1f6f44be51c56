"""A block of rows on its way through every step that looks at one document at a time, up to its tokens.

Blocks are what worker processes (or the jobs of an array) take: a block's result depends on its rows and the settings
alone, so that any number of workers makes the same data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import DataError
from trainer.data.choose.duplicates import DuplicatePolicy, Signer
from trainer.data.config import DataConfig
from trainer.data.document import Document, Rejected, Stage, Tally
from trainer.data.formats import RowReader
from trainer.data.labels import split_labels
from trainer.data.rated import rated_sequences
from trainer.data.read.row import Row
from trainer.data.source_target import SourceTargetEncoder
from trainer.data.stages.bias import BiasCounter
from trainer.data.stages.privacy.stage import Findings
from trainer.data.store.documents import to_batch
from trainer.data.store.sequences import Sample, Sequences
from trainer.data.tokens.cut import fit, fit_pair

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.data.tokens.encode import Encoder


@dataclass(slots=True)
class Job:
    """Rows of one source and one split, in input order."""

    number: int
    split: str
    source: str
    offset: int
    """Number of rows of the same split and source before this job."""
    rows: list[Row | Rejected]


@dataclass(slots=True)
class Bad:
    """A row in quarantine: it could not be read, or failed a check whose policy is `quarantine`."""

    source: str
    file: str
    line: int
    reason: str
    message: str
    excerpt: str


@dataclass(slots=True)
class Block:
    """What became of a job."""

    number: int
    split: str
    source: str
    rows: int
    rows_of_file: dict[str, int] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    documents: pa.RecordBatch | None = None
    """What is kept, as rows of `documents.arrow`, with `pieces[i]` sequences of document i."""
    pieces: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sequences: Sequences | None = None
    unread: list[str] = field(default_factory=list)
    """Columns that nothing read."""
    labels: list[str] = field(default_factory=list)
    """Label names in the block's own numbering."""
    signatures: dict[str, np.ndarray] = field(default_factory=dict)
    """Per document, see `curation.duplicates.Signer`."""
    findings: Findings | None = None
    bias: BiasCounter | None = None


class BlockMaker:
    """Turns jobs into blocks. Built once, before worker processes are forked from this one."""

    def __init__(
        self,
        config: DataConfig,
        *,
        readers: dict[tuple[str, str], RowReader],
        stages: Callable[[], list[Stage]],
        encoder: Encoder,
        counts: Callable[[Sample], dict[str, int]],
        label_names: list[str] | None,
        multi_label: bool = False,
        pairs: bool = False,
        rated: bool = False,
        texts: bool = False,
    ) -> None:
        self.config = config
        self.readers = readers
        self.stages = stages
        self.encoder = encoder
        self.counts = counts
        self.pairs = pairs
        """Whether a document becomes two sequences, its chosen and its rejected answer."""
        self.rated = rated
        """Whether answers are learned from by the verdict on them."""
        self.texts = texts
        """Whether plain texts alone are learned."""
        self.replays = any(source.replay for source in config.sources.values())
        self.label_names = None if label_names is None else set(label_names)
        self.multi_label = multi_label
        near = config.leakage.near or config.duplicates.near is not DuplicatePolicy.none
        splits = (config.eval_path, config.test_path, config.eval_share, config.test_share)
        self.signer = Signer(config.duplicates, near=near, held_out=any(splits))

    def __call__(self, job: Job) -> Block:
        """Read, check, clean and tokenise the rows of a job. Raises DataError and ConfigError."""
        files = Counter(row.file for row in job.rows)
        block = Block(job.number, job.split, job.source, rows=len(job.rows), rows_of_file=dict(files))
        stages = self.stages()  # anew for each block: what they count is the block's
        unread = self.readers[job.split, job.source].unread.names
        unread.clear()
        documents = [d for row in job.rows if (d := self._read(job, row, block)) is not None]
        block.unread = list(unread)
        for stage in stages:
            if stage.name == "privacy" and self._scanned_enough(job):
                continue
            if stage.name == "decontamination" and job.split != "train":
                continue  # held-out rows may well be the evaluation texts themselves
            documents = [kept for d in documents if (kept := self._pass(stage, d, block)) is not None]
        documents = self._tokenise(documents, block)
        block.documents = to_batch(documents)
        block.signatures = self.signer.sign(documents)
        for stage in stages:
            if (findings := getattr(stage, "findings", None)) is not None:
                block.findings = findings
        if self.config.bias.enabled:
            block.bias = BiasCounter(self.config.bias)
            for document in documents:
                block.bias.add(document)
        return block

    def _scanned_enough(self, job: Job) -> bool:
        """Whether a report on personal data has seen its share of the source, in whole jobs."""
        privacy = self.config.privacy
        return privacy.mode == "report" and 0 < privacy.scan_documents <= job.offset

    def _read(self, job: Job, row: Row | Rejected, block: Block) -> Document | None:
        parsed = row.parse()
        found = parsed if isinstance(parsed, Rejected) else self.readers[job.split, job.source](parsed)
        if isinstance(found, Rejected):
            self._quarantine(block, found)
            return None
        if found.label is None or self.label_names is None:
            return found
        labels = split_labels(found.label) if self.multi_label else [found.label]
        if unknown := next((label for label in labels if label not in self.label_names), None):
            message = f"label {unknown!r} is none of {sorted(self.label_names)} (objective.labels)"
            self._quarantine(block, Rejected(found.file, found.line, "unknown_label", message, found.text or ""))
            return None
        return found

    def _quarantine(self, block: Block, row: Rejected) -> None:
        block.tally.drop("read", row.reason, f"{row.file}:{row.line}")
        block.bad.append(Bad(block.source, row.file, row.line, row.reason, row.message, row.excerpt[:200]))

    def _pass(self, stage: Stage, document: Document, block: Block) -> Document | None:
        before = len(block.tally.drops)
        kept = stage(document, block.tally)
        if (kept is None) != (len(block.tally.drops) == before + 1):
            raise AssertionError(f"{document.where}: stage {stage.name} lost count of a document")
        if kept is None and stage.name == "checks":
            _, reason, _ = block.tally.drops[-1]
            excerpt = document.content()[:200]
            block.bad.append(
                Bad(block.source, document.file, document.line, reason, "quarantined by data.checks", excerpt)
            )
        return kept

    def _tokenise(self, documents: list[Document], block: Block) -> list[Document]:
        """The documents of which something is left, their sequences now in the block."""
        encoder, samples, pieces, left = self.encoder, list[Sample](), list[int](), list[Document]()
        block.labels = sorted({d.label for d in documents if d.label is not None})
        encoder.label_ids = {name: number for number, name in enumerate(block.labels)}
        usable = documents if self.rated else [d for d in documents if _teaches(d, block.tally)]
        for document, made in self._encoded(usable, block.tally):
            if not made:
                continue
            if self.replays:
                for sample in made:
                    sample.replay = block.split == "train" and self.config.sources[block.source].replay
            samples += made
            pieces.append(len(made))
            left.append(document)
        block.pieces = np.array(pieces, np.int64)
        block.sequences = Sequences.of(samples, self.counts)
        last = (sample.input_ids[sample.supervised][-1:] for sample in samples)
        ended = [len(token) == 1 and int(token[0]) in encoder.end_ids for token in last]
        block.sequences.columns["ended"] = np.array(ended, np.int64)
        return left

    def _encoded(self, documents: list[Document], tally: Tally) -> Iterator[tuple[Document, list[Sample]]]:
        """Documents with their sequences; none where nothing is left. Raises DataError."""
        if self.rated:
            yield from rated_sequences(self.encoder, documents, self.config, tally)
            return
        if self.texts and (other := next((d for d in documents if d.text is None), None)) is not None:
            raise DataError(
                f"{other.where}: is no plain text, which objective=pretrain learns; give rows of text or text files, or "
                "use objective=sft"
            )
        if not self.pairs:
            for document, sample in self.encoder.encode(documents):
                yield document, self._fit(document, sample, tally)
            return
        for document in documents:
            if not document.chosen or not document.rejected:
                raise DataError(
                    f"{document.where}: has no preferred and rejected answer, which this objective compares; give rows "
                    "of prompt, chosen and rejected (data.format=preference), or use objective=sft"
                )
        for document, chosen, rejected in self.encoder.encode_pairs(documents):
            yield document, self._fit_pair(document, chosen, rejected, tally)

    def _fit_pair(self, document: Document, chosen: Sample, rejected: Sample, tally: Tally) -> list[Sample]:
        """Both answers after the length policy; none, with a reason counted, where one has nothing left to compare."""
        limit = self.config.max_length
        made = fit_pair(document, chosen, rejected, limit, self.config.over_length)
        if made is None:
            tally.drop("tokenise", "too_long", document.where)
            return []
        if not all(sample.supervised.any() for sample in made):
            tally.drop("tokenise", "nothing_to_learn", document.where)
            return []
        if np.array_equal(made[0].input_ids, made[1].input_ids):
            tally.drop("tokenise", "same_answers", document.where)
            return []
        if max(len(chosen.input_ids), len(rejected.input_ids)) > limit:
            tally.note("tokenise", "truncated", document.where)
        else:
            self._audit(document, chosen, tally)
        made[1].rejected = True
        return made

    def _fit(self, document: Document, sample: Sample, tally: Tally) -> list[Sample]:
        """The pieces of a document after the length policy; none, with a reason counted, where nothing is left."""
        limit, policy = self.config.max_length, self.config.over_length
        too_long = len(sample.input_ids) > limit
        if isinstance(self.encoder, SourceTargetEncoder):
            made: list[Sample] | None = self.encoder.fit(document, sample, limit, policy)
            too_long = any(len(piece.input_ids) < len(sample.input_ids) for piece in made or ())
        else:
            made = fit(self.encoder, document, sample, limit, policy)
        if not made:
            tally.drop("tokenise", "too_long", document.where)
            return []
        made = [piece for piece in made if piece.label is not None or piece.supervised.any()]
        if not made:
            tally.drop("tokenise", "nothing_to_learn", document.where)
        elif too_long:
            tally.note("tokenise", "split" if len(made) > 1 else "truncated", document.where)
        else:
            self._audit(document, sample, tally)
        return made

    def _audit(self, document: Document, sample: Sample, tally: Tally) -> None:
        for code in self.encoder.audit(document, sample):
            tally.note("tokenise", code, document.where)


def _teaches(document: Document, tally: Tally) -> bool:
    """Answers marked as undesirable are no text to imitate."""
    if document.desirable is False:
        tally.drop("tokenise", "thumbs_down", document.where)
        return False
    return True


def jobs(
    rows: Iterator[tuple[tuple[str, str], Row | Rejected]], *, most_rows: int = 512, most_bytes: int = 4 << 20
) -> Iterator[Job]:
    """Group ((split, source), row) into jobs; where a job ends depends on the input alone."""
    number, size, current = 0, 0, Job(0, "", "", 0, [])
    for (split, source), row in rows:
        same = (split, source) == (current.split, current.source)
        if not same or len(current.rows) >= most_rows or size >= most_bytes:
            if current.rows:
                yield current
                number += 1
            current = Job(number, split, source, current.offset + len(current.rows) if same else 0, [])
            size = 0
        current.rows.append(row)
        size += len(row.raw) if isinstance(row, Row) and row.raw is not None else 1024
    if current.rows:
        yield current


def refuse_bad(bad: list[Bad], num_bad: int, num_rows: int, limit: float, quarantine: str) -> None:
    """Raise DataError where more than the share `limit` of the rows is in quarantine."""
    if num_bad <= limit * num_rows:
        return
    shown = "\n".join(f"  {b.file}:{b.line}: {b.message}" for b in bad)
    more = f"\n  ... and {num_bad - len(bad)} more" if num_bad > len(bad) else ""
    raise DataError(
        f"{num_bad} of {num_rows} rows cannot be used, more than data.max_bad_share={limit:g} allows:\n{shown}{more}\n"
        f"all of them are listed in {quarantine}; mend the data, or raise data.max_bad_share to go on without them"
    )
