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
from strategies.runtime import num_usable_cores
from trainer.data.cache import (
    MANIFEST_FILE,
    DigestCache,
    Shards,
    build_once,
    data_fingerprint,
    entry_name,
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
    identifying_data_settings,
)
from trainer.data.disk_space import require_disk_space
from trainer.data.document import InputId
from trainer.data.formats import RowReader
from trainer.data.objective_spec import DataSpec
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths
from trainer.data.rendered import refuse_rendered_rows
from trainer.data.report.describe import ReportWriter
from trainer.data.report.progress import PreparationProgress, PrintLine, print_on_rank_0
from trainer.data.selection.near_duplicates import index_bytes_per_document
from trainer.data.selection.splits import DocumentColumns, Selection, choose_splits
from trainer.data.shards import DatasetWriter, PreparedBlock
from trainer.data.sources import find_inputs, make_row_readers, row_ranges, rows_of_inputs
from trainer.data.store.documents import DocumentTable
from trainer.data.store.sequences import TokenDataset, sequence_numbers
from trainer.data.tokens.clock import TemplateDate, reads_clock
from trainer.data.tokens.encode import Encoder
from trainer.data.worker import BlockMaker, frozen_heap, ordered_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREPARATION_VERSION = 7
"""Raised whenever the code would make other tokens, masks or choices out of the same input."""
TEMPLATE_DATE_KEY = "template_date"
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


def keep_or_first_date(kept_date: TemplateDate | None) -> ChooseDate:
    """A `ChooseDate` that chooses `kept_date`; if that is None, the date of the first preparation into the cache."""
    return lambda find_first_date: kept_date or find_first_date()


class Preparation:
    """The preparation of one configuration's data: raw files become a data set of tokens, unless the cache has it already.

    The entry in `config.cache_dir` is named by a fingerprint over the bytes of the inputs, the tokenizer with its chat template,
    the options and how the objective reads. No collective; several processes may work at once. Raises ConfigError, DataError,
    StorageError, and Preempted if `stop` says so.
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
        """Find the inputs of the data, and the fingerprint of what they become, by which the cache may have it already.

        `data_spec`: how the objective reads the data. `seed` decides held-out shares and resampling. If the chat template writes
        today's date, `choose_date` decides which one, by default the day of the first preparation into this cache. `stop` is
        asked between blocks. `print_line` prints a line of progress.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.data_spec = data_spec
        self.seed = seed
        self.stop = stop
        self.progress = PreparationProgress(print_line)
        with self.progress.printing():
            cache_dir = Path(config.cache_dir).expanduser()
            # The sources and held-out sets that the settings name, with their files.
            self.inputs = find_inputs(config)
            # SHA-256 of files; it notices files that change while they are read.
            self.digests = DigestCache(cache_dir)
            # The date comes second: the first date of preparation is recorded under the fingerprint without a date.
            undated_fingerprint = data_fingerprint(self._input_identities(), tokenizer, self._fingerprint_options())
            self.template_date: TemplateDate | None = None
            # Some templates write today's date into each conversation.
            if tokenizer.chat_template and reads_clock(tokenizer.get_chat_template()):
                find_first_date = partial(load_or_record_first_date, cache_dir, undated_fingerprint)
                self.template_date = (choose_date or keep_or_first_date(None))(find_first_date)
            # A date in the fingerprint, since it is in the prepared tokens.
            self.fingerprint = fingerprint_with_date(undated_fingerprint, self.template_date)
            self.directory = cache_dir / entry_name(self.fingerprint)
            """The entry of the cache."""

    def _input_identities(self) -> list[Any]:
        """Find what the bytes of prepared data depend on beside options and tokenizer, for the fingerprint of the cache entry.

        That is the bytes of all input files, as their digests (or of hub data sets, as their commit), and the key of pseudonyms.
        A change in this list outdates the entry of the cache.
        """
        config = self.config
        identities: list[Any] = []
        for source_input in self.inputs:
            content_identity = source_input.origin.content_identity(self.digests)
            identities.append((source_input.split, source_input.source, content_identity))
        if config.decontamination.paths is not None:
            key = "data.decontamination.paths"
            evaluation_files = expand_paths(config.decontamination.paths, key, allow_remote=config.remote)
            identities.append(("decontamination", Origin(key, evaluation_files).content_identity(self.digests)))
        if config.privacy.mode is PrivacyMode.pseudonymise:
            # Imported here, because it compiles seventy regular expressions.
            from trainer.data.transforms.privacy.stage import key_identity

            identities.append(("key of the pseudonyms", key_identity()))
        return identities

    def _fingerprint_options(self) -> dict[str, Any]:
        """Find the settings that change prepared bytes, for the fingerprint of the cache entry: a new key outdates all caches.

        The seed is None if no setting draws by it.
        """
        config = self.config
        settings = identifying_data_settings(asdict(config))
        for key in SETTINGS_NOT_IN_FINGERPRINT:
            del settings[key]
        draws_by_seed = config.eval_share or config.test_share or config.balance.by is not BalanceBy.none
        data_spec_class = type(self.data_spec)
        # Fingerprints keep the class names of earlier versions ("SftReading"): data that these prepared is found again.
        class_name = data_spec_class.__qualname__.replace("DataSpec", "Reading")
        return {
            "version": PREPARATION_VERSION,
            "data": settings,
            "seed": self.seed if draws_by_seed else None,
            "reading": {"class": f"{data_spec_class.__module__}.{class_name}", **self.data_spec.identity()},
        }

    def open_or_prepare(self) -> PreparedData:
        """Return the prepared data set, opened from the cache. If it is not there, prepare it, or wait for a process that does.

        Prints progress meanwhile.
        """
        with self.progress.printing():
            return self._open_or_prepare()

    def _open_or_prepare(self) -> PreparedData:
        """Open the data set if the cache has it, or prepare it first, without printing progress.

        Raises DataError for rows that hold a rendered chat template, unless the user has set `data.control_tokens`.
        """
        started_at = time.perf_counter()
        if not self._is_in_cache():
            self._refuse_rendered_rows()
        self.progress.phase = "waiting for another process that prepares the same data"
        # Looked up again: another process may have completed the entry during the check. If not, the jobs of an array may
        # have done the first pass already.
        shards = None if self._is_in_cache() else Shards.find_complete(self.directory)
        has_prepared = build_once(
            self.directory, partial(self._prepare, shards=shards), raise_if_stopped=self.raise_if_stopped
        )

        self.progress.phase = "comparing the prepared data with its hashes"
        # This process need not check what it has just written.
        verify = None if has_prepared else self._verify_on_this_process()
        elapsed_s = time.perf_counter() - started_at
        prepared = open_prepared(self.directory, cached=not has_prepared, seconds=elapsed_s, verify=verify)
        prepared.date = self.template_date
        if self.template_date is not None:
            # Reports that an earlier version wrote lack it.
            prepared.report.setdefault(TEMPLATE_DATE_KEY, self.template_date.day.isoformat())
        if not has_prepared and _spells_control_tokens(prepared.report):
            # It was prepared with data.control_tokens=text, which this user may not have set.
            self._refuse_rendered_rows()
        return prepared

    def _is_in_cache(self) -> bool:
        """Whether the cache has the prepared data set: its manifest is written last."""
        return (self.directory / MANIFEST_FILE).exists()

    def _verify_on_this_process(self) -> Verify:
        """How closely this process compares the prepared files with their hashes: as `data.verify` says.

        But one process of a host alone reads all bytes (`Verify.all`), since the others would read the same files.
        """
        is_first_process_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
        if self.config.verify is Verify.all and not is_first_process_of_host:
            return Verify.sampled
        return self.config.verify

    def make_shard(self, number: int, num_shards: int) -> None:
        """Do one part of the first pass, as one job of an array: write shard `number` of `num_shards` into the cache.

        It stays there until `open_or_prepare` finds all shards and merges them. Does nothing if the data is prepared or the shard
        complete; waits if another process writes the shard.
        """
        if self._is_in_cache():
            return
        self._refuse_rendered_rows()
        readers = self._make_readers()
        shards = Shards(self.directory, num_shards)
        with self.progress.printing(), shards.writing_shard(number, self.raise_if_stopped) as write_block:
            if write_block is None:  # it is complete
                return
            with closing(self._make_blocks(readers, shard=number, num_shards=num_shards)) as blocks:
                for block in blocks:
                    self.raise_if_stopped()
                    write_block(block)
            self.digests.check_files_unchanged()

    @cached_property
    def _encoder(self) -> Encoder:
        """The encoder of all steps. Made once, because it copies the tokenizer, which takes up to a second."""
        return self.data_spec.encoder(self.tokenizer, self.config)

    def _make_readers(self) -> dict[InputId, RowReader]:
        """A reader for each input, by (split, source) such as ("train", "data"), in the format that its first row has."""
        spec = self.data_spec
        return make_row_readers(self.inputs, label=spec.label, preferred=spec.formats, kept=spec.kept)

    def _refuse_rendered_rows(self) -> None:
        """Raise DataError if rows hold a rendered chat template, such as "<|im_start|>user", as ordinary text.

        A model would learn to spell the tokens. Does nothing if the user has set `data.control_tokens`.
        """
        if self.config.control_tokens is ControlTokens.auto:
            refuse_rendered_rows(self.inputs, self._make_readers(), self._encoder)

    def raise_if_stopped(self) -> None:
        """Raise Preempted if this process was asked to stop. Called between blocks, where stopping is safe."""
        if self.stop():
            raise Preempted("interrupted while preparing data; the preparation will start over")

    def _prepare(self, target: Path, shards: Shards | None = None) -> None:
        """Prepare the data into the directory `target`: both passes, the reports, and last the manifest.

        The first pass turns rows into blocks of documents and tokens; the second chooses which documents are in which split.
        `shards`: the blocks of the first pass, if the jobs of an array have written them already; they are deleted at the end.
        """
        self.raise_if_stopped()
        readers = self._make_readers()
        dataset_writer = self._new_dataset_writer(target)
        with closing(dataset_writer):
            with closing(self._make_blocks(readers) if shards is None else shards.load_blocks()) as blocks:
                for block in blocks:
                    self.raise_if_stopped()
                    dataset_writer.append(block)
                    self.progress.add_done_rows(block.num_rows)

            # The second pass looks at columns of numbers alone, and at the texts of two documents that are to be compared.
            self.progress.phase = "choosing documents (copies, held-out shares, balance)"
            columns = dataset_writer.finish_documents()
            table = DocumentTable(target)
            if self.config.privacy.mode is PrivacyMode.fail:
                from trainer.data.transforms.privacy.stage import raise_if_personal_data

                raise_if_personal_data(dataset_writer.totals.tally.findings, self.config.privacy)
            # Labels were numbered as the blocks came; the objective decides their final ids.
            label_names, label_ids = self.data_spec.number_labels(columns, table)
            selection = choose_splits(self.config, columns, table, seed=self.seed, log_drop=dataset_writer.log_drop)
            dataset_writer.finish_store(label_ids)

        self.progress.phase = "writing the reports"
        self._write_splits(target, columns, selection)
        formats = {input_id: reader.format for input_id, reader in readers.items()}
        report_writer = ReportWriter(
            self.config, self.tokenizer, self.inputs, formats, self.fingerprint, target, digests=self.digests
        )
        report = report_writer.write(dataset_writer.totals, columns, selection, self.data_spec, label_names)
        if self.template_date is not None:
            report[TEMPLATE_DATE_KEY] = self.template_date.day.isoformat()
        manifest = {
            "fingerprint": self.fingerprint,
            "tokenizer": {"path": str(self.tokenizer.name_or_path), "vocab_size": len(self.tokenizer)},
            "sources": columns.source_names,
            "splits": {split: len(documents) for split, documents in selection.splits.items()},
            "label_names": label_names,
            "report": report,
            "hashes": file_hashes(target),
        }
        self.digests.check_files_unchanged()
        # Written last: an entry without this file is unfinished.
        (target / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if shards is not None:
            shards.remove()

    def _new_dataset_writer(self, target: Path) -> DatasetWriter:
        """Make the `DatasetWriter` that joins prepared blocks in the directory `target`.

        If too many rows are rejected, it writes their list beside the cache entries, and advises to split documents if that
        helps.
        """
        rejected_file = target.parent / "rejected" / f"{entry_name(self.fingerprint)}.jsonl"
        may_split = OverLength.split in self.data_spec.over_length
        advise_split = may_split and self.config.over_length is not OverLength.split
        return DatasetWriter(target, self.config.max_bad_share, rejected_file, advise_split=advise_split)

    def _write_splits(self, target: Path, columns: DocumentColumns, selection: Selection) -> None:
        """Write a directory in `target` for each split: the numbers of its sequences (`index.npy`), and its manifest.

        Tokens are not written again: a split is a list of numbers. `columns`: what is known of all documents. `selection`: which
        documents are in which split.
        """
        # An evaluation set without a name of its own is called as its split.
        named_evaluation_sets = []
        for source_input in self.inputs:
            if source_input.split == "eval" and source_input.source != "eval":
                named_evaluation_sets.append(source_input.source)
        for split, documents in selection.splits.items():
            directory = target / split
            directory.mkdir()
            np.save(directory / "index.npy", sequence_numbers(documents, columns.num_sequences_by_document))
            manifest = {"fingerprint": f"{self.fingerprint}/{split}", "sources": columns.source_names}
            if split == "eval" and named_evaluation_sets:
                manifest["sets"] = named_evaluation_sets
            (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    def _search_bytes_per_row(self) -> int:
        """Bytes on the disk, for each row, that the search for near copies takes while it works; 0 if nothing asks for it."""
        config = self.config
        if config.duplicates.near is DuplicatePolicy.none and not config.leakage.near:
            return 0
        return index_bytes_per_document(config.duplicates.threshold)

    def _make_blocks(
        self, readers: dict[InputId, RowReader], *, shard: int = 0, num_shards: int = 1
    ) -> Generator[PreparedBlock]:
        """Read, clean and tokenise the rows of one shard: blocks of documents and tokens, in the order of the input.

        A block is what one range of rows became. A shard is every `num_shards`-th range, beginning with number `shard`; by
        default all ranges. `readers`: by input, what makes documents of its rows. Raises StorageError if the disk is too small.

        Workers are forked with this process's memory. The blocks do not depend on their number.
        """
        make_block = BlockMaker(
            self.config, self.data_spec, readers=readers, encoder=self._encoder, date=self.template_date
        )
        # Unless there is plenty of room, this prepares the first rows of each input, to see how much will be written.
        require_disk_space(
            self.directory.parent,
            self.inputs,
            make_block,
            self.config.max_documents,
            num_shards=num_shards,
            # Only the merge of all shards searches for near copies.
            scratch_bytes_per_row=self._search_bytes_per_row() if num_shards == 1 else 0,
        )
        if self.config.max_documents is None:  # else the size of the files does not tell how many rows are read
            self.progress.estimate_rows(self.inputs, share=1 / num_shards)
        all_ranges = row_ranges(rows_of_inputs(self.inputs, self.config.max_documents))
        ranges_of_shard = (row_range for row_range in all_ranges if row_range.number % num_shards == shard)
        # Lines on progress say rows a second from here on.
        self.progress.begin_rows()
        counted_ranges = self.progress.count_text_rows(ranges_of_shard)  # the same ranges, counted as they pass
        # With small inputs one process works alone, since forking workers takes longer.
        input_bytes = sum(source_input.origin.size_bytes() for source_input in self.inputs)
        has_small_inputs = input_bytes <= SMALL_INPUT_BYTES
        num_workers = 1 if has_small_inputs else self.config.workers or num_usable_cores()
        with frozen_heap():  # so that forked workers share this process's memory
            if num_workers > 1:
                yield from ordered_map(
                    make_block, counted_ranges, workers=num_workers, while_waiting=self.raise_if_stopped
                )
            else:
                yield from map(make_block, counted_ranges)


def _spells_control_tokens(report: dict[str, Any]) -> bool:
    """Whether control tokens of any document became ordinary characters, as the report of prepared data says."""
    tokenise_stages = [stage for stage in report["flow"] if stage["stage"] == "tokenise"]
    return any("control_tokens_as_text" in stage["noted"] for stage in tokenise_stages)


def open_prepared(
    directory: Path, *, cached: bool = True, seconds: float = 0.0, verify: Verify | None = Verify.sampled
) -> PreparedData:
    """Open a finished entry of the cache of prepared data. Raises DataError for one that is torn, or differs from its hashes.

    `verify`: how closely the files are compared with their hashes; None: not at all. `cached` and `seconds` go into the report:
    whether the entry was there already, and how long preparation or waiting for it took.
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

    def open_split_or_none(split: str) -> TokenDataset | None:
        """The split, or None if nothing was held out for it."""
        return TokenDataset.open(directory / split) if (directory / split).is_dir() else None

    return PreparedData(
        train=TokenDataset.open(directory / "train"),
        evaluation=open_split_or_none("eval"),
        test=open_split_or_none("test"),
        directory=directory,
        report={**manifest["report"], "cached": cached, "seconds": round(seconds, 3)},
        label_names=manifest["label_names"],
    )
