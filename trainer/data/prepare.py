"""Prepares data: makes a data set of tokens, with its audit, from raw files, once for every distinct input.

There are two passes. The first takes blocks of rows through everything that looks at one document at a time (read, check,
clean, filter, privacy, tokens), in as many processes as there are cores. The second decides what needs the whole data set
(copies, held-out splits, leakage, balance) from columns of numbers alone. Tokens are written once; a split is a list of numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError, Preempted
from trainer.data.cache import (
    MANIFEST_FILE,
    Digests,
    Shards,
    build_once,
    data_fingerprint,
    file_hashes,
    fingerprint_with_date,
    load_or_record_first_date,
    verify_hashes,
)
from trainer.data.config import (
    BalanceBy,
    ControlTokens,
    DataConfig,
    DuplicatePolicy,
    OverLength,
    PrivacyMode,
    Verify,
    identifying,
)
from trainer.data.formats import RowReader
from trainer.data.objective_spec import DataSpec
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths
from trainer.data.rendered import refuse_rendered_rows
from trainer.data.report.describe import ReportWriter
from trainer.data.report.progress import PreparationProgress, PrintLine, print_on_rank_0
from trainer.data.selection.near_duplicates import index_bytes_per_document
from trainer.data.selection.splits import Columns, Selection, choose_splits
from trainer.data.shards import Assembly, Block
from trainer.data.sources import find_inputs, make_row_readers, require_disk_space, row_ranges, rows_of_inputs
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset, sequence_numbers
from trainer.data.tokens.clock import TemplateDate, reads_clock
from trainer.data.tokens.encode import Encoder
from trainer.data.worker import BlockMaker, frozen_heap, num_usable_cores, ordered_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 7
"""Raised whenever the code would make other tokens, masks or choices out of the same input."""
TEMPLATE_DATE = "template_date"
"""Where a report has the date that the chat template wrote."""
SMALL_INPUT_BYTES = 8 << 20
"""Bytes of input up to which this process does the work alone: starting others would cost more."""
SETTINGS_NOT_IN_FINGERPRINT = {
    # Stand for files whose bytes are hashed, or say how these are reached.
    "path",
    "eval_path",
    "test_path",
    "remote",
    "streaming",
    # Say where and how preparation works.
    "cache_dir",
    "workers",
    "verify",
    # Say what is made of prepared data.
    "packing",
    "layout",
    "shuffle",
}
"""Settings that change no prepared byte."""


@dataclass(slots=True)
class PreparedData:
    """A prepared data set: splits opened read-only, and the report of its preparation."""

    train: TokenDataset
    evaluation: TokenDataset | None
    directory: Path
    report: dict[str, Any]
    label_names: list[str] | None
    date: TemplateDate | None = None
    """The date that the chat template wrote; None if the template writes none."""
    test: TokenDataset | None = None
    """The test documents, which nothing is chosen by; None without `data.test_path` and `data.test_share`."""
    has_rows: bool = True
    """False if one document without meaning stands in for data that is not read."""


ChooseDate = Callable[[Callable[[], TemplateDate]], TemplateDate]
"""Decides which date the chat template writes, given a function for the date of the first preparation into the cache."""


def keep_or_first_date(kept: TemplateDate | None) -> ChooseDate:
    """A `ChooseDate` that returns `kept`; if that is None, the date of the first preparation into the cache."""
    return lambda find_first_date: kept or find_first_date()


class Preparation:
    """The preparation of one configuration's data: its fingerprint, and the work if the cache does not have it.

    The entry in `config.cache_dir` is named by a fingerprint over the bytes of the inputs, the tokenizer with its chat
    template, the options and how the objective reads. `seed` decides held-out shares and resampling. If the template writes
    today's date, `choose_date` decides which one, by default the day of the first preparation into this cache. `stop` is asked
    between blocks. `print_line` prints a line of progress.

    No collective; several processes may work at once. Raises ConfigError, DataError, StorageError, and Preempted if `stop` says
    so.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        data_spec: DataSpec,
        *,
        seed: int,
        stop: Callable[[], bool] = lambda: False,
        choose_date: ChooseDate | None = None,
        print_line: PrintLine = print_on_rank_0,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.data_spec = data_spec
        self.seed = seed
        self.stop = stop
        self.progress = PreparationProgress(print_line)
        with self.progress.printing():
            self._identify(choose_date or keep_or_first_date(None))

    def _identify(self, choose_date: ChooseDate) -> None:
        """Set `fingerprint`, under which the prepared data stands in the cache, `directory`, its place there, and `date`.

        Also sets `inputs`, `digests` and `is_small`. The fingerprint covers the bytes of all inputs, the options, the tokenizer,
        and the date if the chat template writes the date.
        `choose_date`: returns the date to use, given a function that looks up when the same data was first prepared.
        """
        config = self.config
        self.inputs = find_inputs(config)
        cache = Path(config.cache_dir).expanduser()
        self.digests = Digests(cache)
        self.is_small = sum(source_input.origin.size() for source_input in self.inputs) <= SMALL_INPUT_BYTES

        # What the bytes of prepared data depend on beside options and tokenizer.
        identities: list[Any] = []
        for source_input in self.inputs:
            identities.append((source_input.split, source_input.source, source_input.origin.identity(self.digests)))
        if config.decontamination.paths is not None:
            key = "data.decontamination.paths"
            evaluation_files = Origin(key, expand_paths(config.decontamination.paths, key, remote=config.remote))
            identities.append(("decontamination", evaluation_files.identity(self.digests)))
        if config.privacy.mode is PrivacyMode.pseudonymise:
            # Imported here, because it compiles seventy regular expressions.
            from trainer.data.transforms.privacy.stage import key_identity

            identities.append(("key of the pseudonyms", key_identity()))

        # Settled before the date: the first date is remembered under the fingerprint without one.
        undated_fingerprint = data_fingerprint(identities, self.tokenizer, self._options())
        self.date: TemplateDate | None = None
        if self.tokenizer.chat_template and reads_clock(self.tokenizer.get_chat_template()):
            self.date = choose_date(partial(load_or_record_first_date, cache, undated_fingerprint))
        self.fingerprint = fingerprint_with_date(undated_fingerprint, self.date)
        self.directory = cache / self.fingerprint[:32]

    def _options(self) -> dict[str, Any]:
        """Settings that change prepared bytes. They are part of the fingerprint, so a new key here outdates all caches."""
        config = self.config
        settings = identifying(asdict(config))
        for key in SETTINGS_NOT_IN_FINGERPRINT:
            del settings[key]
        uses_seed = config.eval_share or config.test_share or config.balance.by is not BalanceBy.none
        data_spec_class = type(self.data_spec)
        # Fingerprints keep the class names of earlier versions ("SftReading"): data that these prepared is found again.
        class_name = data_spec_class.__qualname__.replace("DataSpec", "Reading")
        return {
            "version": VERSION,
            "data": settings,
            "seed": self.seed if uses_seed else None,
            "reading": {"class": f"{data_spec_class.__module__}.{class_name}", **self.data_spec.identity()},
        }

    def open_or_make(self) -> PreparedData:
        """The prepared data set: opened, or made by this process, or waited for while another makes it."""
        with self.progress.printing():
            return self._open_or_make()

    def _open_or_make(self) -> PreparedData:
        """Open the prepared data if it is in the cache; else prepare it, or wait for the process that does.

        The work of `open_or_make`, which prints progress meanwhile.
        """
        started_at = time.perf_counter()
        # Make it, unless it is there already.
        if not (self.directory / MANIFEST_FILE).exists():
            self._refuse_rendered_rows()
        self.progress.phase = "waiting for another process that prepares the same data"
        # Jobs of an array may have done the first pass already.
        is_prepared = (self.directory / MANIFEST_FILE).exists()
        shards = None if is_prepared else Shards.find_complete(self.directory)
        was_made = build_once(self.directory, partial(self.run, shards=shards), raise_if_stopped=self.check_stop)

        # Open it. Data that this process has just written need not be compared with its own hashes.
        self.progress.phase = "comparing the prepared data with its hashes"
        verify = None if was_made else self.config.verify
        # All bytes are read once a host; the other processes of the host look at samples.
        if os.environ.get("LOCAL_RANK", "0") != "0" and verify is Verify.all:
            verify = Verify.sampled
        elapsed_s = time.perf_counter() - started_at
        prepared = open_prepared(self.directory, cached=not was_made, seconds=elapsed_s, verify=verify)
        prepared.date = self.date
        if self.date is not None:
            prepared.report.setdefault(TEMPLATE_DATE, self.date.day.isoformat())  # an earlier version did not write it
        if not was_made and _spells_control_tokens(prepared.report):
            self._refuse_rendered_rows()  # it was prepared when the user had typed data.control_tokens=text
        return prepared

    def make_shard(self, number: int, count: int) -> None:
        """Do part `number` of `count` of the first pass, as one job of an array.

        Its blocks are kept until a call of `open_or_make` finds the parts of all jobs. Does nothing if the data is prepared, or
        another process makes this part.
        """
        if (self.directory / MANIFEST_FILE).exists():
            return
        self._refuse_rendered_rows()
        readers = self._readers()
        with (
            self.progress.printing(),
            Shards(self.directory, count).writing_shard(number, self.check_stop) as keep_block,
        ):
            if keep_block is None:
                return
            with closing(self._blocks(readers, number, count)) as blocks:
                for block in blocks:
                    self.check_stop()
                    keep_block(block)
            self.digests.refuse_changed_files()

    @cached_property
    def _encoder(self) -> Encoder:
        """The encoder of all steps. Made once, because it copies the tokenizer, which takes up to a second."""
        return self.data_spec.encoder(self.tokenizer, self.config)

    def _readers(self) -> dict[tuple[str, str], RowReader]:
        """A reader for each input, by (split, source) such as ("train", "data"), in the format that its first row has."""
        spec = self.data_spec
        return make_row_readers(self.inputs, label=spec.label, preferred=spec.formats, kept=spec.kept)

    def _refuse_rendered_rows(self) -> None:
        """Raise DataError for rows that hold a rendered chat template, unless the user has typed what becomes of it."""
        if self.config.control_tokens is ControlTokens.auto:
            refuse_rendered_rows(self.inputs, self._readers(), self._encoder)

    def check_stop(self) -> None:
        """Raise Preempted if this process was asked to stop. Called between blocks, where stopping is safe."""
        if self.stop():
            raise Preempted("interrupted while preparing data; the preparation will start over")

    def run(self, target: Path, shards: Shards | None = None) -> None:
        """Prepare the data into the directory `target`: both passes, and the reports.

        `shards`: the blocks of the first pass, if the jobs of an array have made them already.
        """
        self.check_stop()
        rejected_file = target.parent / "rejected" / f"{self.fingerprint[:32]}.jsonl"
        may_split = OverLength.split in self.data_spec.over_length
        advise_split = may_split and self.config.over_length is not OverLength.split
        assembly = Assembly(target, self.config.max_bad_share, rejected_file, advise_split=advise_split)
        with closing(assembly):
            # The first pass: blocks of documents that were read, checked, cleaned and tokenised.
            readers = self._readers()
            with closing(self._blocks(readers) if shards is None else shards.load_blocks()) as blocks:
                for block in blocks:
                    self.check_stop()
                    assembly.append(block)
                    self.progress.count_done(block.rows)

            # The second pass: from here on only columns of numbers are looked at, and the texts of two documents that are
            # to be compared.
            self.progress.phase = "choosing documents (copies, held-out shares, balance)"
            columns = assembly.columns()
            table = DocumentTable(target)
            if self.config.privacy.mode is PrivacyMode.fail:
                from trainer.data.transforms.privacy.stage import refuse_findings

                refuse_findings(assembly.totals.tally.findings, self.config.privacy)
            label_names, label_ids = self.data_spec.numbered(columns, table)
            selection = choose_splits(self.config, columns, table, seed=self.seed, log=assembly.log_drop)
            assembly.finish(label_ids)

        self.progress.phase = "writing the reports"
        self._write_splits(target, columns, selection)
        formats = {input_id: reader.format for input_id, reader in readers.items()}
        reports = ReportWriter(
            self.config, self.tokenizer, self.inputs, formats, self.fingerprint, target, digests=self.digests
        )
        report = reports.write(assembly.totals, columns, selection, self.data_spec, label_names)
        if self.date is not None:
            report[TEMPLATE_DATE] = self.date.day.isoformat()
        manifest = {
            "fingerprint": self.fingerprint,
            "tokenizer": {"path": str(self.tokenizer.name_or_path), "vocab_size": len(self.tokenizer)},
            "sources": columns.sources,
            "splits": {split: len(documents) for split, documents in selection.splits.items()},
            "label_names": label_names,
            "report": report,
            "hashes": file_hashes(target),
        }
        self.digests.refuse_changed_files()
        # Written last: an entry without this file is unfinished.
        (target / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if shards is not None:
            shards.remove()

    def _write_splits(self, target: Path, columns: Columns, selection: Selection) -> None:
        """Write a directory in `target` for each split, with the numbers of its sequences and its manifest.

        `columns`: what is known of all documents. `selection`: which documents are in which split.
        """
        evaluation_sets = []
        for source_input in self.inputs:
            if source_input.split == "eval" and source_input.source != "eval":  # a set with a name of its own
                evaluation_sets.append(source_input.source)
        for split, documents in selection.splits.items():
            directory = target / split
            # A split is a list of sequence numbers; the tokens of all splits are in one store.
            directory.mkdir()
            np.save(directory / "index.npy", sequence_numbers(documents, columns.pieces))
            manifest = {"fingerprint": f"{self.fingerprint}/{split}", "sources": columns.sources}
            if split == "eval" and evaluation_sets:
                manifest["sets"] = evaluation_sets
            (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    def _search_bytes_per_row(self) -> int:
        """Bytes of disk for each row that the search for near copies takes while it works; 0 without that search."""
        config = self.config
        if config.duplicates.near is DuplicatePolicy.none and not config.leakage.near:
            return 0
        return index_bytes_per_document(config.duplicates.threshold)

    def _blocks(self, readers: dict[tuple[str, str], RowReader], part: int = 0, parts: int = 1) -> Generator[Block]:
        """Read, clean and tokenise one `part` of `parts` of the rows: blocks of documents and tokens, in input order.

        A block is what one range of rows became. `readers`: by input, how its rows become documents.

        Raises StorageError if the disk is too small.
        """
        make_block = BlockMaker(self.config, self.data_spec, readers=readers, encoder=self._encoder, date=self.date)
        require_disk_space(
            self.directory.parent,
            self.inputs,
            make_block,
            self.config.max_documents,
            parts=parts,
            more_bytes_per_row=self._search_bytes_per_row() if parts == 1 else 0,
        )
        if self.config.max_documents is None:
            self.progress.expect(self.inputs, 1 / parts)
        # The rows of this part, in ranges that become a block each.
        ranges = row_ranges(rows_of_inputs(self.inputs, self.config.max_documents))
        if parts > 1:
            ranges = (row_range for row_range in ranges if row_range.number % parts == part)
        # Blocks in the order of the ranges, by this process or by several.
        workers = self.config.workers or num_usable_cores()
        if self.is_small:  # forking workers takes longer than small data
            workers = 1
        self.progress.begin_rows()
        ranges = self.progress.count_text_rows(ranges)
        with frozen_heap():
            if workers > 1:
                yield from ordered_map(make_block, ranges, workers=workers, check=self.check_stop)
            else:
                yield from map(make_block, ranges)


def _spells_control_tokens(report: dict[str, Any]) -> bool:
    """Whether control tokens were encoded as ordinary characters in any document, by the report of prepared data."""
    counts_of_tokenise = [stage["noted"] for stage in report["flow"] if stage["stage"] == "tokenise"]
    return any("control_tokens_as_text" in counts for counts in counts_of_tokenise)


def open_prepared(
    directory: Path, *, cached: bool = True, seconds: float = 0.0, verify: Verify | None = Verify.sampled
) -> PreparedData:
    """Open a finished entry of the cache. Raises DataError for one that is torn, or that differs from its hashes.

    `verify` of None: it is not compared with its hashes. `cached` and `seconds` stand in the report: whether it was there
    already, and how long preparation or waiting for it took.
    """
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        hashes = manifest["hashes"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{directory / MANIFEST_FILE}: is no manifest of prepared data ({error}); delete {directory} to prepare it again"
        ) from error
    if verify is not None:
        verify_hashes(directory, hashes, verify)
    # A split other than train may be missing.
    report = {**manifest["report"], "cached": cached, "seconds": round(seconds, 3)}
    evaluation = TokenDataset.open(directory / "eval") if (directory / "eval").is_dir() else None
    test = TokenDataset.open(directory / "test") if (directory / "test").is_dir() else None
    train = TokenDataset.open(directory / "train")
    return PreparedData(train, evaluation, directory, report, manifest["label_names"], test=test)
