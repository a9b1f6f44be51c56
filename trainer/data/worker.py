"""Takes blocks of rows through all steps that look at one document at a time, in several processes, in input order."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any, TypeVar

import numpy as np

from strategies.errors import ShardtuneError
from strategies.parent_death import die_with_parent
from trainer.data.compat import close_own_writer
from trainer.data.config import CleaningConfig, DataConfig, FilterConfig, PrivacyMode
from trainer.data.document import EXCERPT_CHARACTERS, Document, InputId, RefusedDocument, RejectedRow, Stage, Tally
from trainer.data.formats import RowReader
from trainer.data.objective_spec import DataSpec
from trainer.data.selection.document_hashes import DocumentHasher, content_json, group_digest
from trainer.data.shards import LOST_REASONS, PreparedBlock
from trainer.data.sources import RowRange, evaluation_documents
from trainer.data.store.documents import to_record_batch
from trainer.data.store.sequences import REPLAY, Sample, Sequences
from trainer.data.tokens.clock import TemplateDate
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.truncation import last_supervised_id
from trainer.data.transforms.checks import Checks, Cleaner
from trainer.data.transforms.decontamination import Decontaminator, texts_to_decontaminate_from
from trainer.data.transforms.filters import Filters


class BlockMaker:
    """Takes ranges of rows through the first pass of data preparation, and makes a block of each: documents and their tokens."""

    def __init__(
        self,
        config: DataConfig,
        data_spec: DataSpec,
        *,
        readers: dict[InputId, RowReader],
        encoder: Encoder,
        date: TemplateDate | None = None,
    ) -> None:
        """Set up what all workers need; it is built before they are forked, and they inherit it.

        `readers`: by (split, source), what makes documents of its rows. `date`: what the chat template writes for today; None if
        it writes none. Raises DataError for evaluation files to decontaminate against that do not exist or hold a row that cannot
        be read.
        """
        self.config = config
        self.data_spec = data_spec
        self.readers = readers
        self.encoder = encoder
        # All workers must write the same date, whenever they start.
        self.encoder.fix_date(date)
        self.decontaminator: Decontaminator | None = None
        if config.decontamination.paths is not None:
            documents = evaluation_documents(config.decontamination.paths, config)
            texts = itertools.chain.from_iterable(map(texts_to_decontaminate_from, documents))
            self.decontaminator = Decontaminator(texts, config.decontamination)
        # Then each sequence is marked by whether its source is general text, replayed against forgetting.
        self.has_replay = any(source.replay for source in config.sources.values())
        # Whether there may be rows that training does not see, with which training rows are compared.
        has_held_out = any((config.eval_path, config.test_path, config.eval_share, config.test_share))
        self.document_hasher = DocumentHasher(
            config.duplicates, finds_near_leaks=config.leakage.near, has_held_out=has_held_out
        )

    def __call__(self, row_range: RowRange) -> PreparedBlock:
        """Turn a range of rows into a block: the documents that stay, their tokens, and hashes to find copies by later.

        Called for each range, in a worker process if there are several; blocks are joined into the data set in the order of the
        input. Rows that cannot be used are in `block.rejected_rows`, and `block.tally` counts what stages dropped or noted.
        Raises DataError and ConfigError.
        """
        block = PreparedBlock(
            row_range.number,
            row_range.split,
            row_range.source,
            num_rows=len(row_range.rows),
            num_rows_by_file=dict(Counter(row.file for row in row_range.rows)),
        )
        documents = self._read(row_range, block)
        # Each stage looks at one document at a time: checks, cleaning, filters, personal data, decontamination.
        for stage in self._stages(row_range):
            documents = self._run_stage(stage, documents, block)
        tokenised_documents = self._tokenise(documents, block)
        block.documents = to_record_batch(tokenised_documents)
        row_numbers = [document.row_number or 0 for document in tokenised_documents]
        block.row_numbers = np.array(row_numbers, np.int32)
        block.document_hashes = self.document_hasher.hash_documents(tokenised_documents)
        # By these, documents of a group stay on one side of a split. A digest, because the name may be that of a person.
        if self.config.group_by is not None:
            group_digests = [group_digest(document.group) for document in tokenised_documents]
            block.document_hashes["group"] = np.array(group_digests, np.uint64)
        return block

    def _read(self, row_range: RowRange, block: PreparedBlock) -> list[Document]:
        """Turn the rows of a range into documents of the format that the run expects, such as conversations.

        Rows that cannot be read, or that the objective cannot use, go to `block.rejected_rows` instead. Sets
        `block.unread_columns`, the columns of the rows that nothing read.
        """
        reader = self.readers[InputId(row_range.split, row_range.source)]
        reader.unread.names.clear()
        documents: list[Document] = []
        for row in row_range.rows:
            document_or_rejected = reader(row.parse())
            if isinstance(document_or_rejected, Document):
                document_or_rejected = self._reject_if_unusable(document_or_rejected)
            if isinstance(document_or_rejected, RejectedRow):
                self._quarantine(block, document_or_rejected, "read")
            else:
                documents.append(document_or_rejected)
        block.unread_columns = list(reader.unread.names)
        return documents

    def _reject_if_unusable(self, document: Document) -> Document | RejectedRow:
        """Ask the objective whether it can learn from a document: returns it if so, else a rejected row that says why.

        A preference objective, for example, cannot use a document without two answers to compare.
        """
        reason_and_message = self.data_spec.reason_to_reject(document)
        if reason_and_message is None:
            return document
        reason, message = reason_and_message
        excerpt = document.text or content_json(document)
        return RejectedRow(document.file, document.line, reason, message, excerpt, row_number=document.row_number)

    def _run_stage(self, stage: Stage, documents: list[Document], block: PreparedBlock) -> list[Document]:
        """Take the documents of a block through one stage of preparation, such as a filter, and return those that it keeps.

        A stage may change documents in place, and counts what it drops in `block.tally`. Documents that the stage "checks"
        (`data.checks`) drops go to `block.rejected_rows` as well. Raises AssertionError if the stage counted another number of
        drops than it made.
        """
        num_drops_before = len(block.tally.drops)
        remaining: list[Document] = []
        for document in documents:
            changed_document = stage(document, block.tally)
            if changed_document is not None:
                remaining.append(changed_document)
            # By `data.checks.quarantine`, a failed check makes a bad row; what other stages drop is only counted.
            elif stage.name == Checks.name:
                _stage, reason, _location = block.tally.drops[-1]  # which the stage has just counted
                block.rejected_rows.append(_rejected_row(document, reason, "quarantined by data.checks"))
        num_dropped = len(documents) - len(remaining)
        if num_dropped != len(block.tally.drops) - num_drops_before:
            raise AssertionError(f"{block.source}: stage {stage.name} lost count of a document")
        return remaining

    def _stages(self, row_range: RowRange) -> Iterator[Stage]:
        """Make the stages of preparation that the configuration asks for, in order, each only when the documents come to it.

        A stage looks at one document at a time, and keeps, changes or drops it.
        """
        config = self.config
        yield Checks(config.checks)
        if config.cleaning != CleaningConfig():
            yield Cleaner(config.cleaning)
        if config.filters != FilterConfig():
            yield Filters(config.filters)
        if config.privacy.mode is not PrivacyMode.none:
            # Imported here, because it compiles seventy regular expressions.
            from trainer.data.transforms.privacy.stage import PrivacyStage

            yield PrivacyStage(config.privacy, documents_before=row_range.offset)
        if self.decontaminator is not None and row_range.split == "train":
            yield self.decontaminator  # held-out rows may well be the evaluation texts themselves

    def _quarantine(self, block: PreparedBlock, row: RejectedRow, stage: str) -> None:
        """Reject a row: put it among the block's rejected rows, and count it as dropped by `stage`, such as "read"."""
        block.tally.drop(stage, row.reason, row.location)
        row.excerpt = row.excerpt[:EXCERPT_CHARACTERS]
        block.rejected_rows.append(row)

    def _tokenise(self, documents: list[Document], block: PreparedBlock) -> list[Document]:
        """Tokenise the documents of a block into `block.sequences`; return those that became at least one sequence.

        Also sets `block.num_sequences_by_document` and `block.label_names`. A document may become several sequences: a long one
        that is split, or a pair of answers. It becomes none if the objective drops it.
        """
        # Labels get numbers of the block's own, because no worker knows those of the others; `DatasetWriter` renumbers them.
        block.label_names = sorted({document.label for document in documents if document.label is not None})
        self.encoder.set_label_names(block.label_names)
        samples: list[Sample] = []
        num_sequences: list[int] = []
        tokenised: list[Document] = []
        for document, samples_of_document in self._make_samples(documents, block):
            samples += samples_of_document
            num_sequences.append(len(samples_of_document))
            tokenised.append(document)
        block.num_sequences_by_document = np.array(num_sequences, np.int64)
        if self.has_replay:
            # Only sources of training data can be marked as replay.
            is_replay = block.split == "train" and self.config.sources[block.source].replay
            for sample in samples:
                sample.marks[REPLAY] = is_replay
        block.sequences = Sequences.from_samples(samples, self.data_spec.counts)
        # For the report: whether the last target of a sequence is an end-of-turn token, so that the model learns to stop.
        is_ended = [last_supervised_id(sample) in self.encoder.end_ids for sample in samples]
        block.sequences.columns["ended"] = np.array(is_ended, np.int64)
        return tokenised

    def _make_samples(self, documents: list[Document], block: PreparedBlock) -> Iterator[tuple[Document, list[Sample]]]:
        """Make the token sequences of documents as the objective wants them: (document, its sequences) if it has any.

        Drops are counted in `block.tally`; those that no setting asked for go to `block.rejected_rows` as well. All documents
        are tokenised together. If one of them is refused, as by the chat template, each is tokenised alone, to tell which.
        """
        tally = Tally()  # not that of the block: it is thrown away if the documents are tokenised again one by one
        try:
            documents_and_samples = list(self.data_spec.sequences(self.encoder, documents, self.config, tally))
        except RefusedDocument as refused:
            if len(documents) > 1:
                for document in documents:
                    yield from self._make_samples([document], block)
                return
            (document,) = documents
            self._quarantine(block, _rejected_row(document, refused.reason, refused.message), "tokenise")
            return
        block.tally.merge(tally)
        block.tally.drops += tally.drops  # which `merge` leaves out
        reason_by_location = {location: reason for _stage, reason, location in tally.drops}
        for document, samples in documents_and_samples:
            if samples:
                yield document, samples
                continue
            # It was dropped. If no setting asked for that, it is a rejected row.
            reason = reason_by_location[document.location]
            if reason in LOST_REASONS:
                message = LOST_REASONS[reason].format(self.config.max_length)
                block.rejected_rows.append(_rejected_row(document, reason, message))


def _rejected_row(document: Document, reason: str, message: str) -> RejectedRow:
    """The rejected row for a document that cannot be used, with the beginning of its content."""
    excerpt = content_json(document)[:EXCERPT_CHARACTERS]
    return RejectedRow(document.file, document.line, reason, message, excerpt, row_number=document.row_number)


Argument = TypeVar("Argument")
Returned = TypeVar("Returned")

_worker_function: Callable[[Any], Any] | None = None
"""What workers call. Set before they are forked, so that it need not be pickled."""


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Inside the context, Python's garbage collector passes over the objects that there were before it.

    Entered while data is prepared, which forks workers. The objects are some 500,000, mostly of torch and transformers. Each
    full collection would look at all of them, and in forked workers copy the memory that they share with this process.
    """
    if gc.get_freeze_count():  # the caller has frozen what it wants to stay so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


LIVENESS_CHECK_S = 1.0
"""Seconds between looks whether workers live that are waited for."""


class Worker(ForkProcess):
    """A worker process that its pool can always end: processes that may be asked to stop hold back the pool's usual SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class WorkerContext(ForkContext):
    """Lets a pool fork its workers as `Worker`."""

    Process = Worker


def ordered_map(
    function: Callable[[Argument], Returned],
    arguments: Iterable[Argument],
    *,
    workers: int,
    while_waiting: Callable[[], None] = lambda: None,
) -> Iterator[Returned]:
    """Call `function` for each of `arguments` in `workers` processes, and yield the results in the order of the arguments.

    The processes are forked from this one, so that `function` may hold anything. About two calls for each worker are pending at
    a time, so that `arguments` may be a long iterator. `while_waiting` is called about once a second while a result is waited
    for, and may raise.

    An exception of the function is raised here. Any exception, and closing this generator, kills the workers amid their work.
    Raises ShardtuneError if a worker dies.
    """
    # Forked workers inherit the function, with the tokenizer and the evaluation texts in it: nothing is pickled. There,
    # `_call_function` calls it.
    global _worker_function
    _worker_function = function
    pool = ProcessPoolExecutor(workers, mp_context=WorkerContext(), initializer=_start_worker, initargs=(os.getpid(),))
    pending_results: deque[Future[Returned]] = deque()
    processes: list[Worker] = []
    try:
        for argument in arguments:
            pending_results.append(pool.submit(_call_function, argument))
            if not processes:  # the pool forks all of them with the first call
                processes = [child for child in active_children() if isinstance(child, Worker)]
            # Two calls for each worker keep all of them busy; more would only fill the memory with rows.
            if len(pending_results) > 2 * workers:
                yield _wait_for_result(pending_results.popleft(), pool, processes, while_waiting)
        while pending_results:
            yield _wait_for_result(pending_results.popleft(), pool, processes, while_waiting)
    except BrokenProcessPool as error:
        raise ShardtuneError(
            "a worker process of the data preparation was killed; SIGKILL often means that the host ran out of memory: "
            "set data.workers lower"
        ) from error
    except BaseException:
        _kill_workers(pool, processes)  # native code in a worker may take long to come to an end
        raise
    finally:
        _worker_function = None
        with _ignore_ctrl_c():
            pool.shutdown(wait=True, cancel_futures=True)


def _wait_for_result(
    future: Future[Returned], pool: ProcessPoolExecutor, workers: list[Worker], while_waiting: Callable[[], None]
) -> Returned:
    """Wait for the result of one call in a worker. If any worker has died, kill all of them, and raise BrokenProcessPool.

    `while_waiting` is called about once a second, and may raise.
    """
    while not wait([future], LIVENESS_CHECK_S).done:
        while_waiting()
        if not all(worker.is_alive() for worker in workers):
            _kill_workers(pool, workers)  # the pool notices, and sets BrokenProcessPool as the result of each call
    return future.result()


def _kill_workers(pool: ProcessPoolExecutor, workers: list[Worker]) -> None:
    """Kill all workers of a pool, whatever they do.

    A worker that dies amid a result leaves half of it in the pipe, and the pool would wait for ever for the rest. Reading ends
    once nobody can write: so this process closes its own end as well.
    """
    close_own_writer(pool)
    for worker in workers:
        worker.kill()


@contextmanager
def _ignore_ctrl_c() -> Iterator[None]:
    """Ignore Ctrl-C while the body runs: a pool of workers that is interrupted while it ends waits for them for ever.

    Only the main thread can set that; in other threads nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _start_worker(parent_pid: int) -> None:
    """Prepare a new worker process: it uses one core, ignores Ctrl-C, and ends when its parent does."""
    # Otherwise each worker would start as many threads as there are cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A terminal interrupts the whole process group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)


def _call_function(argument: Any) -> Any:
    """In a worker: the result of the function that `ordered_map` was given."""
    assert _worker_function is not None, "set before the workers were forked"
    return _worker_function(argument)
