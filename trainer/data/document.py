"""`Document`, the form that a row of any format takes for checks, cleaning, privacy and tokens; and `Tally`, which counts drops.

Every transform takes a document and returns it, perhaps changed, or drops it. Each drop is counted under one reason,
so that rows in = documents kept + rows dropped by reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

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
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
THINK_BLOCK_REGEX = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


@dataclass(slots=True)
class Document:
    """One row, in the same form for every format. Which fields are set depends on the format.

    Conversations: `messages`, and perhaps `tools`. Prompt and completion: both, with `separator` between them if there is no
    chat template. Text: `text`, and `label` if it is labelled. Preference pairs: `messages` is the shared prompt,
    `chosen` and `rejected` are the turns that follow it. Thumbs up or down: `messages` or prompt and completion, and
    `desirable`. Prompts alone: `messages` that end before an answer, or `prompt` without a completion; and `columns`.
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

    @property
    def location(self) -> str:
        """`file:line`, as every message about a row begins."""
        return f"{self.file}:{self.line}"

    def conversation(self) -> list[Message]:
        """The turns, without rejected answers; prompt and completion as two turns. Empty for a text."""
        if self.prompt is not None:
            question = {"role": "user", "content": self.prompt}
            if self.completion is None:
                return [question]
            return [question, {"role": "assistant", "content": self.completion}]
        return [*(self.messages or []), *(self.chosen or [])]

    def take_turns(self) -> list[Message]:
        """Prompt and completion as two turns. Clears both, so that the caller can set `messages` instead."""
        turns = self.conversation()
        self.prompt = None
        self.completion = None
        self.separator = ""
        return turns

    def turns(self) -> list[Message]:
        """All messages of the row: shared ones, then chosen, then rejected."""
        return [*(self.messages or []), *(self.chosen or []), *(self.rejected or [])]

    def texts(self) -> list[str]:
        """All texts that came from the row, in reading order: thoughts and arguments of calls too; no labels, no tools."""
        texts: list[str] = []
        for message in self.turns():
            texts += message_texts(message)
        texts += [text for text in (self.prompt, self.completion, self.text) if text is not None]
        return texts

    def map_texts(self, change: Callable[[str], str]) -> None:
        """Replace every text of `texts` by `change(text)`, in place."""
        for message in self.turns():
            for name in ("reasoning_content", "content"):
                if message.get(name):
                    message[name] = change(message[name])
            for index, call in enumerate(message.get("tool_calls", ())):
                function = call["function"]
                arguments = map_argument_texts(function["arguments"], change)
                message["tool_calls"][index] = {**call, "function": {**function, "arguments": arguments}}
        for name in ("prompt", "completion", "text"):
            text = getattr(self, name)
            if text is not None:
                setattr(self, name, change(text))


def argument_texts(node: Any) -> Iterator[str]:
    """The texts in the arguments of tool calls, without names and keys. `node`: a list of calls, or anything inside of one.

    Example: [{"function": {"name": "search", "arguments": {"query": "weather"}}}] -> "weather".
    """
    if isinstance(node, str):
        if node.strip():
            yield node
    elif isinstance(node, dict):
        # A call: only its arguments are text.
        inner_nodes = [node["function"]["arguments"]] if "function" in node else node.values()
        for inner in inner_nodes:
            yield from argument_texts(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from argument_texts(inner)


def map_argument_texts(node: Any, change: Callable[[str], str], change_key: Callable[[str], str] = str) -> Any:
    """Arguments of a tool call with every text changed by `change`, and every key by `change_key`. `node`: anything in them.

    Example: {"query": "weather", "limit": 3} with str.upper -> {"query": "WEATHER", "limit": 3}.
    """
    if isinstance(node, str):
        return change(node) if node.strip() else node
    if isinstance(node, dict):
        return {change_key(name): map_argument_texts(inner, change, change_key) for name, inner in node.items()}
    if isinstance(node, list):
        return [map_argument_texts(inner, change, change_key) for inner in node]
    return node


def message_texts(message: Message) -> list[str]:
    """The texts of a turn in reading order. An empty content counts as a text only if the turn has nothing else."""
    # The usual turn, role and content, without a look at the rest.
    if len(message) == 2:
        return [message["content"]]
    texts: list[str] = []
    if "reasoning_content" in message:
        texts.append(message["reasoning_content"])
    calls = message.get("tool_calls")
    has_something_else = texts or calls or message["role"] == "tool"
    if message["content"] or not has_something_else:
        texts.append(message["content"])
    if calls is not None:
        texts += argument_texts(calls)
    return texts


def thought_of(message: Message) -> str | None:
    """The thought of a turn: its own field, or <think>...</think> at the start of its content."""
    if message.get("reasoning_content"):
        return message["reasoning_content"]
    match = THINK_BLOCK_REGEX.match(message["content"] or "")
    return match.group(1) if match else None


@dataclass(slots=True)
class Row:
    """One row of a source, as it was read."""

    file: str
    """Path as the user would write it, or `hub:NAME/SPLIT`."""
    line: int
    """Line on which the row starts, from 1; the row's number in Parquet, Arrow and hub data; 1 in text files."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Named values: texts, numbers, true/false, None, lists and objects of these; a `Fault` where a column has none."""
    unread_columns: tuple[str, ...] = ()
    """Further columns of the file, which nobody asked for: their values were not read."""
    made_columns: tuple[str, ...] = ()
    """Columns that reading made: the file has none of that name."""

    def parse(self) -> Row | Rejected:
        """The row with its `fields` set, or why it cannot be read. Never raises for what the row holds."""
        return self


def excerpt(start: bytes | str) -> str:
    """The first 200 characters, decoded with replacement, control characters and surrogates escaped."""
    text = start if isinstance(start, str) else start[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "replace")
    return _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], text.rstrip("\r\n")[:EXCERPT_CHARACTERS])


@dataclass(slots=True)
class Rejected:
    """A row that cannot be read, or that is no document; it goes to quarantine."""

    file: str
    line: int
    reason: str
    """Short code to count by, as `not_json`, `empty_text` or `no_assistant_turn`."""
    message: str
    """One sentence for a person with value and constraint, without file and line."""
    excerpt: str = ""
    """The row's first characters."""

    def parse(self) -> Rejected:
        """Return self, so that callers can parse a row without asking whether it is a `Row` or `Rejected`."""
        return self

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


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
class Findings:
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

    def merge(self, other: Findings) -> None:
        """Add a later block's findings."""
        for name in ("scanned", "documents", "counts", "documents_by_type"):
            getattr(self, name).update(getattr(other, name))
        for type_, new_examples in other.examples.items():
            keep_first(self.examples, type_, new_examples)


def keep_first(examples: dict[str, list[str]], key: str, new_examples: list[str]) -> None:
    """Add examples to those of a key, as far as `MAX_EXAMPLES` allows."""
    examples_of_key = examples.setdefault(key, [])
    num_missing = MAX_EXAMPLES - len(examples_of_key)
    examples_of_key.extend(new_examples[:num_missing])


@dataclass(slots=True)
class Tally:
    """Counts of what the stages did to documents, by stage and reason, with the first few examples. Blocks add theirs up."""

    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    """Documents dropped: stage -> reason -> number. A document is dropped once, under one reason."""
    noted: dict[str, Counter[str]] = field(default_factory=dict)
    """Things seen or changed in documents that stay: stage -> what -> number."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """`file:line` of the first few, by "stage/reason"."""
    findings: Findings = field(default_factory=Findings)
    drops: list[tuple[str, str, str]] = field(default_factory=list)
    """Every drop since the tally was made, as (stage, reason, location). `merge` does not add them up: they are written down."""

    def drop(self, stage: str, reason: str, location: str) -> None:
        """Count one dropped document; `location` is its `file:line`, perhaps with a word on it."""
        self._add(self.dropped, stage, reason, location)
        self.drops.append((stage, reason, location))

    def note(self, stage: str, what: str, location: str) -> None:
        """Count something, `what`, that was seen in (or done to) a document that stays."""
        self._add(self.noted, stage, what, location)

    def merge(self, other: Tally) -> None:
        """Add a later block's tally."""
        for counts_by_stage, other_counts in ((self.dropped, other.dropped), (self.noted, other.noted)):
            for stage, counts in other_counts.items():
                counts_by_stage.setdefault(stage, Counter()).update(counts)
        for key, locations in other.examples.items():
            keep_first(self.examples, key, locations)
        self.findings.merge(other.findings)

    def _add(self, counts_by_stage: dict[str, Counter[str]], stage: str, reason: str, location: str) -> None:
        """Count one document in `dropped` or `noted`, and keep its location if it is one of the first."""
        counts_by_stage.setdefault(stage, Counter())[reason] += 1
        keep_first(self.examples, f"{stage}/{reason}", [location])


class Stage(Protocol):
    """A step of preparation that looks at one document at a time. Built from its settings in every worker process."""

    name: str

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, perhaps changed in place; None after `tally.drop` where it is dropped."""
