"""`Document`, the form that a row of any format takes for checks, cleaning, privacy and tokens; and `Tally`, which counts drops.

Every transform takes a document and returns it, perhaps changed, or drops it. Each drop is counted under one reason,
so that rows in = documents kept + rows dropped by reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from strategies.errors import DataError

MAX_EXAMPLES = 5
"""How many file:line examples are kept of each kind of trouble."""

WRONG_KIND_REASON = "wrong_kind"
"""Why a row is bad from which an objective cannot learn, whatever it says: text where it compares answers, and so on."""

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, and optionally "train": whether the turn is learned, and
beside it "weight", above 0 and below 1: what its tokens count for in the loss.

An assistant turn may have "reasoning_content", a text, and "tool_calls" (`trainer/data/messages.py`), and then an empty
content; the result of a tool may have "name" and "tool_call_id".
"""


EXCERPT_CHARACTERS = 200
"""Length of an excerpt in characters."""
_UNPRINTABLE_REGEX = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
THINK_BLOCK_REGEX = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(slots=True)
class Document:
    """One row of the data, in the same form for every format. Which fields are set depends on the format.

    Conversations: `messages`, and perhaps `tools`. Prompt and completion: both, with `separator` between them if there is no chat
    template. Text: `text`, and `label` if it is labelled. Preference pairs: `messages` is the shared prompt, `chosen` and
    `rejected` are the turns that follow it. Thumbs up or down: `messages` or prompt and completion, and `desirable`. Prompts
    alone: `messages` that end before an answer, or `prompt` without a completion; and `columns`.
    """

    file: str
    line: int
    source: str = "data"
    """Name of the source (a key of `data.sources`, or `data`)."""
    messages: list[Message] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    desirable: bool | None = None
    separator: str = ""
    tools: list[dict[str, Any]] | None = None
    columns: dict[str, Any] | None = None
    """Columns that are kept as they are, since rewards read them. No stage looks into them."""
    group: str | None = None
    """What the row belongs to (`data.group_by`). It may name a person, so that only a digest of it leaves the process."""
    row_number: int | None = None
    """As in `SourceRow`. It is not stored: a document that was read from a prepared data set has none."""

    @property
    def location(self) -> str:
        """`file:line`, as every message about a row begins; `file:line (row 3)` if several rows begin on that line."""
        return location_text(self.file, self.line, self.row_number)

    def conversation(self) -> list[Message]:
        """The document as turns of a conversation, without rejected answers. Prompt and completion are two turns, a text none."""
        if self.prompt is not None:
            question = {"role": "user", "content": self.prompt}
            if self.completion is None:
                return [question]
            return [question, {"role": "assistant", "content": self.completion}]
        return [*(self.messages or []), *(self.chosen or [])]

    def pop_prompt_turns(self) -> list[Message]:
        """Take prompt and completion out of the document, as two turns, so that the caller can set `messages` instead."""
        turns = self.conversation()
        self.prompt = None
        self.completion = None
        self.separator = ""
        return turns

    def turns(self) -> list[Message]:
        """All messages of the document: shared ones, then chosen, then rejected. Empty if it is no conversation."""
        return [*(self.messages or []), *(self.chosen or []), *(self.rejected or [])]

    def texts(self) -> list[str]:
        """All texts that came from the row, in reading order, for what looks into texts: checks, privacy, comparison.

        Thoughts and arguments of tool calls are among them; labels and descriptions of tools are not.
        """
        texts: list[str] = []
        for message in self.turns():
            texts += message_texts(message)
        texts += [text for text in (self.prompt, self.completion, self.text) if text is not None]
        return texts

    def map_texts(self, change: Callable[[str], str]) -> None:
        """Replace every text of the document by `change(text)`, in place, as cleaning and redaction do.

        Names and keys of tool calls stay as they are.
        """
        for message in self.turns():
            for key in ("reasoning_content", "content"):
                if message.get(key):
                    message[key] = change(message[key])
            # A call of a tool has texts in its arguments alone.
            for index, call in enumerate(message.get("tool_calls", ())):
                function = call["function"]
                changed_arguments = map_argument_texts(function["arguments"], change)
                message["tool_calls"][index] = {**call, "function": {**function, "arguments": changed_arguments}}
        for attribute in ("prompt", "completion", "text"):
            text = getattr(self, attribute)
            if text is not None:
                setattr(self, attribute, change(text))


def argument_texts(arguments: Any) -> Iterator[str]:
    """Find the texts in the arguments of a tool call, in order, without blank texts and keys.

    `arguments`: those of one call, or anything inside of them; the function calls itself for what is inside. Example: {"query":
    "weather", "limit": 3} -> "weather".
    """
    if isinstance(arguments, str):
        if arguments.strip():
            yield arguments
    elif isinstance(arguments, dict):
        for inner in arguments.values():
            yield from argument_texts(inner)
    elif isinstance(arguments, list):
        for inner in arguments:
            yield from argument_texts(inner)


def map_argument_texts(node: Any, change: Callable[[str], str], change_key: Callable[[str], str] = str) -> Any:
    """Copy the arguments of a tool call with every text changed by `change`, and every key by `change_key`. Blank texts stay.

    `node`: the arguments, or anything inside of them; the function calls itself for what is inside. Example: {"query": "weather",
    "limit": 3} with str.upper -> {"query": "WEATHER", "limit": 3}.
    """
    if isinstance(node, str):
        return change(node) if node.strip() else node
    if isinstance(node, dict):
        return {change_key(key): map_argument_texts(inner, change, change_key) for key, inner in node.items()}
    if isinstance(node, list):
        return [map_argument_texts(inner, change, change_key) for inner in node]
    return node


def message_texts(message: Message) -> list[str]:
    """List the texts of a turn in reading order: its thought, its content, and the texts in the arguments of its tool calls.

    An empty content counts as a text only if the turn has nothing else.
    """
    # The usual turn has a role and a content only. It is answered first, because this runs for every turn of the data.
    if len(message) == 2:
        return [message["content"]]
    texts: list[str] = []
    if "reasoning_content" in message:
        texts.append(message["reasoning_content"])
    calls = message.get("tool_calls")
    has_more_than_content = texts or calls or message["role"] == "tool"
    if message["content"] or not has_more_than_content:
        texts.append(message["content"])
    for call in calls or ():
        texts += argument_texts(call["function"]["arguments"])
    return texts


def thought_of(message: Message) -> str | None:
    """The thought of a turn: its field `reasoning_content`, or <think>...</think> at the start of its content. None without."""
    if message.get("reasoning_content"):
        return message["reasoning_content"]
    think_block = THINK_BLOCK_REGEX.match(message["content"] or "")
    return think_block.group(1) if think_block else None


def location_text(file: str, line: int, row_number: int | None) -> str:
    """Say where a row is, for messages: `a.jsonl:7`, or `a.json:1 (row 3)` if several rows begin on that line.

    `row_number`: that of the row in its list, from 1; None if the line is enough.
    """
    return f"{file}:{line}" if row_number is None else f"{file}:{line} (row {row_number})"


class InputId(NamedTuple):
    """The name of a set of files that is read in one way, such as ("train", "faq")."""

    split: str
    source: str
    """A key of `data.sources`, "data", or the name of a held-out set; the path of a file to decontaminate against."""


@dataclass(slots=True)
class SourceRow:
    """One row of a source, as it was read."""

    file: str
    """Path as the user would write it, or `hub:NAME/SPLIT`."""
    line: int
    """Line on which the row starts, from 1; the row's number in Parquet, Arrow and hub data; 1 in text files."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Named values: texts, numbers, true/false, None, lists and objects of these; or an `UnreadableValue`, which says why."""
    unread_columns: tuple[str, ...] = ()
    """Further columns of the file, which nobody asked for: their values were not read."""
    derived_columns: tuple[str, ...] = ()
    """Columns that reading made: the file has none of that name."""
    row_number: int | None = None
    """The row's number in its list, from 1, if several rows of a JSON list begin on its line; else None: the line is enough."""

    def parse(self) -> SourceRow | RejectedRow:
        """The row with its `fields` set, or why it cannot be read. Never raises for what the row holds."""
        return self


def excerpt(text_or_bytes: bytes | str) -> str:
    r"""Shorten a row to its first 200 characters, for messages and the list of rejected rows.

    Control characters and surrogates are spelled out: "\0" -> "\x00". Bytes that are not UTF-8 become replacement characters.
    """
    if isinstance(text_or_bytes, str):
        text = text_or_bytes
    else:
        text = text_or_bytes[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")  # a character has at most 4 bytes
    start = text.rstrip("\r\n")[:EXCERPT_CHARACTERS]
    return _UNPRINTABLE_REGEX.sub(lambda match: ascii(match.group())[1:-1], start)


@dataclass(slots=True)
class RejectedRow:
    """A row that cannot be read, or that is no document; it goes to quarantine."""

    file: str
    line: int
    reason: str
    """Short code to count by, as `not_json`, `empty_text` or `no_assistant_turn`."""
    message: str
    """One sentence for a person with value and constraint, without file and line."""
    excerpt: str = ""
    """The row's first characters."""
    row_number: int | None = None
    """As in `SourceRow`."""

    @property
    def location(self) -> str:
        """`file:line`, or `file:line (row 3)`, as that of a `Document`."""
        return location_text(self.file, self.line, self.row_number)

    def parse(self) -> RejectedRow:
        """Return self, so that callers can parse a row without asking whether it is a `SourceRow` or `RejectedRow`."""
        return self

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


class RefusedDocument(DataError):
    """Raised for one document that cannot become tokens; the others of its batch can. `reason` is a short code."""

    def __init__(self, location: str, reason: str, message: str) -> None:
        super().__init__(location, reason, message)
        self.location = location
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.location}: {self.message}"


@dataclass(slots=True)
class PersonalDataFindings:
    """Personal data seen by the privacy stage. Holds no value that was found, only masks of a few."""

    scanned: Counter[str] = field(default_factory=Counter)
    """Documents looked into, by source."""
    documents: Counter[str] = field(default_factory=Counter)
    """Documents with at least one finding, by source."""
    counts: Counter[str] = field(default_factory=Counter)
    """Findings by type."""
    documents_by_type: Counter[str] = field(default_factory=Counter)
    """Documents with at least one finding of a type."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each type, as `file:line mask`."""

    def merge(self, later: PersonalDataFindings) -> None:
        """Add the findings of a later block of documents to these."""
        self.scanned.update(later.scanned)
        self.documents.update(later.documents)
        self.counts.update(later.counts)
        self.documents_by_type.update(later.documents_by_type)
        for finding_type, later_examples in later.examples.items():
            add_first_examples(self.examples, finding_type, later_examples)


def add_first_examples(examples_by_key: dict[str, list[str]], key: str, new_examples: list[str]) -> None:
    """Add the first of `new_examples` to the examples of a key, until the key has `MAX_EXAMPLES`."""
    examples = examples_by_key.setdefault(key, [])
    num_lacking = MAX_EXAMPLES - len(examples)
    examples.extend(new_examples[:num_lacking])


@dataclass(slots=True)
class Tally:
    """Counts of what the stages of preparation did to documents, by stage and reason, with the first few examples.

    Each block has its own; they are added up.
    """

    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """Documents dropped: stage -> reason -> number. A document is dropped once, under one reason."""
    noted: dict[str, Counter[str]] = field(default_factory=dict)
    """Things seen or changed in documents that stay: stage -> what -> number."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """`file:line` of the first few, by "stage/reason"."""
    findings: PersonalDataFindings = field(default_factory=PersonalDataFindings)
    drops: list[tuple[str, str, str]] = field(default_factory=list)
    """Every drop since the tally was made, as (stage, reason, location). `merge` does not add them up: they are written down."""

    def drop(self, stage: str, reason: str, location: str) -> None:
        """Count one document that a stage dropped, and add it to `drops`. `location`: its `file:line`, perhaps with a remark."""
        self._count_document(self.dropped, stage, reason, location)
        self.drops.append((stage, reason, location))

    def note(self, stage: str, observation: str, location: str) -> None:
        """Count what a stage saw in, or did to, a document that stays. `observation`: its code, such as "truncated"."""
        self._count_document(self.noted, stage, observation, location)

    def merge(self, later: Tally) -> None:
        """Add the counts, examples and findings of a later block to these. Its `drops` are not added."""
        for counts_by_stage, later_counts_by_stage in ((self.dropped, later.dropped), (self.noted, later.noted)):
            for stage, later_counts in later_counts_by_stage.items():
                counts_by_stage.setdefault(stage, Counter()).update(later_counts)
        for key, locations in later.examples.items():
            add_first_examples(self.examples, key, locations)
        self.findings.merge(later.findings)

    def _count_document(self, counts_by_stage: dict[str, Counter[str]], stage: str, code: str, location: str) -> None:
        """Count one document under a code, such as "too_long", and keep its location if it is one of the first with this code.

        `counts_by_stage`: `dropped` or `noted`.
        """
        counts_by_stage.setdefault(stage, Counter())[code] += 1
        add_first_examples(self.examples, f"{stage}/{code}", [location])


class Stage(Protocol):
    """A step of preparation that looks at one document at a time. Built from its settings in every worker process."""

    name: str

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, perhaps changed in place; None after `tally.drop` where it is dropped."""
