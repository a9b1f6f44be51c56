"""All settings of data: where it is, what is done to it, and how it becomes batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from strategies.settings import DESCRIBES, FREE, Reach, group, number, setting

HELD_OUT = ("eval", "test")
"""Splits that are never trained on."""
DataFormat = StrEnum(
    "DataFormat",
    [
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "pair",
        "text",
        "labelled",
        "preference",
        "thumbs",
        "prompt",
    ],
)
OverLength = Enum(  # no StrEnum: a member `split` would hide the method of strings
    "OverLength",
    {"drop": "drop", "truncate": "truncate", "truncate_left": "truncate_left", "split": "split", "fail": "fail"},
)
ControlTokens = StrEnum("ControlTokens", ["auto", "text", "refuse", "keep"])
Verify = StrEnum("Verify", ["sampled", "all"])
Layout = StrEnum("Layout", ["auto", "padding_free", "padded"])


@dataclass(kw_only=True, slots=True)
class ChecksConfig:
    """What is looked for in documents, and what happens to those in which it is found."""

    quarantine: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Kinds that make a document a bad row, where others are counted: `system_late`, `assistant_before_user`, `same_role_twice`,
    `trailing_turns`, `repeated_turn`, `empty_text`, `encoding_damage`, `control_characters`."""


UnicodeForm = StrEnum("UnicodeForm", {"none": "none", "NFC": "NFC", "NFKC": "NFKC"})


@dataclass(kw_only=True, slots=True)
class CleaningConfig:
    """What is cleaned in every text of a row. Everything is off until it is asked for."""

    fix_encoding: bool = setting(False, reach=DESCRIBES)
    """Undo UTF-8 that was read as another encoding (`schÃ¶n` becomes `schön`), line by line, with ftfy."""
    control_characters: bool = setting(False, reach=DESCRIBES)
    """Remove control, zero-width and bidirectional characters, BOM and soft hyphens; joiners that scripts need stay."""
    unicode: UnicodeForm = setting(UnicodeForm.none, reach=DESCRIBES)
    """Unicode form: `none`, `NFC` (one spelling a character) or `NFKC` (also turns `x²` into `x2`)."""


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which rows are dropped. Nothing is until a bound is set."""

    min_characters: int = number(0, least=0, advice="0 is no bound")
    """Drop rows with fewer characters, all texts of the row together."""
    max_characters: int | None = number(None, least=1, advice="null is no bound")
    """Drop rows with more characters, all texts of the row together; null is no bound."""
    min_completion_characters: int = number(0, least=0, advice="0 is no bound")
    """Drop rows whose answers (completion, or learned turns together) have fewer characters."""
    drop_echoes: bool = setting(False, reach=DESCRIBES)
    """Drop rows with an answer of 12 letters or more that only says the question again."""
    drop_phrases: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Drop rows whose learned text contains one of these phrases, such as `as an AI language model`, in any case."""
    languages: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Keep rows in these languages, as ISO 639 codes such as `en`; an empty list keeps all."""


DecontaminationPolicy = StrEnum("DecontaminationPolicy", ["report", "drop"])


@dataclass(kw_only=True, slots=True)
class DecontaminationConfig:
    """Training documents that hold text of evaluation sets, such as public benchmarks."""

    paths: Any = setting(None, reach=DESCRIBES)
    """Files of evaluation sets, in the forms of the training data; nothing is looked for where it is not given."""
    policy: DecontaminationPolicy = setting(DecontaminationPolicy.report, reach=DESCRIBES)
    """`report` counts such training documents, `drop` takes them out."""


PrivacyPreset = StrEnum("PrivacyPreset", ["none", "general", "hipaa", "gdpr"])
REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "IN", "BR")
"""Countries whose own identity numbers are known, ISO 3166-1 alpha-2. Telephone numbers: any country."""
PrivacyMode = StrEnum("PrivacyMode", ["none", "report", "redact", "pseudonymise", "drop", "fail"])
PrivacyEngine = StrEnum("PrivacyEngine", ["patterns", "presidio"])


@dataclass(kw_only=True, slots=True)
class PrivacyConfig:
    """Personal data in texts: what is looked for, and what is done about it. The default only reports."""

    mode: PrivacyMode = setting(PrivacyMode.report, reach=DESCRIBES)
    """`none`; `report` counts; `redact` puts `[TYPE]`, `pseudonymise` names made with the secret key in the environment variable
    SHARDTUNE_PSEUDONYM_KEY; `drop` takes the document out; `fail` ends the run."""
    preset: PrivacyPreset = setting(PrivacyPreset.general, reach=DESCRIBES)
    """Types looked for when `types` is empty: `general`, `hipaa` (Safe Harbor identifiers), `gdpr`, or `none`."""
    types: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Types looked for, such as EMAIL or PHONE; an empty list takes those of the preset."""
    engine: PrivacyEngine = setting(PrivacyEngine.patterns, reach=DESCRIBES)
    """`patterns` finds numbers and addresses of the net; `presidio` also names of people and places in English (extra `pii`)."""
    min_score: float = number(
        0.5, least=0, most=1, advice="0.5 as a rule; 0.35 also takes numbers that only look right"
    )
    """Findings less certain than this are ignored, 0 to 1; 0.35 also takes numbers that only look right."""
    regions: list[str] = setting(default_factory=lambda: list(REGIONS), reach=DESCRIBES)
    """Countries whose telephone and identity numbers are looked for, as two-letter ISO 3166 codes."""
    scan_documents: int = number(1000, least=0, advice="0 scans all")
    """With `mode=report`, documents scanned of each source, from its start; 0 scans all. Other modes scan all."""
    allow: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Regular expressions; what one of them matches as a whole is never a finding, e.g. `support@example\\.com`."""


DuplicatePolicy = StrEnum("DuplicatePolicy", ["none", "report", "drop"])
ComparedText = StrEnum("ComparedText", ["document", "prompt", "completion"])


@dataclass(kw_only=True, slots=True)
class DuplicatesConfig:
    """Duplicates within the training data. A kind is treated at least as strictly as the kinds below it."""

    exact: DuplicatePolicy = setting(DuplicatePolicy.report, reach=DESCRIBES)
    """Exact copies: `none`, `report` (count them) or `drop` (keep the first)."""
    normalized: DuplicatePolicy = setting(DuplicatePolicy.report, reach=DESCRIBES)
    """Documents with the same words, whatever their case, spacing and sentence punctuation."""
    near: DuplicatePolicy = setting(DuplicatePolicy.none, reach=DESCRIBES)
    """Documents whose runs of 5 words overlap by `threshold` or more; with `drop`, exact copies go as well."""
    threshold: float = number(0.8, least=0.3, most=1, advice="0.8 as a rule; lower finds looser copies and costs time")
    """Least Jaccard similarity of near duplicates (shared runs of words over all of them), 0.3 to 1."""
    text: ComparedText = setting(ComparedText.document, reach=DESCRIBES)
    """Text that is compared: the whole `document`, the `prompt` (all before the last answer) or the `completion`."""


LeakagePolicy = StrEnum("LeakagePolicy", ["report", "drop_train", "fail"])


@dataclass(kw_only=True, slots=True)
class LeakageConfig:
    """Documents that training and held-out data share."""

    policy: LeakagePolicy = setting(LeakagePolicy.report, reach=DESCRIBES)
    """`report` counts them, `drop_train` takes them out of the training data, `fail` ends the run. Prompts that both have, with
    another answer or system turn, are only ever counted."""
    near: bool = setting(False, reach=DESCRIBES)
    """Look for near duplicates too, with the threshold of the search for duplicates."""


BalanceBy = StrEnum("BalanceBy", ["none", "label", "source"])
BalanceTarget = StrEnum("BalanceTarget", ["natural", "temperature", "uniform", "shares"])


@dataclass(kw_only=True, slots=True)
class BalanceConfig:
    """Repeating and leaving out documents so that groups have the wanted shares of the training data."""

    by: BalanceBy = setting(BalanceBy.none, reach=DESCRIBES)
    """What makes a group: `label`, `source`, or `none`, which changes nothing."""
    target: BalanceTarget = setting(BalanceTarget.natural, reach=DESCRIBES)
    """Shares wanted: as found (`natural`), flattened (`temperature`), equal (`uniform`), or as set (`shares`)."""
    temperature: float = number(1.0, least=1, advice="1 is natural, 2 to 5 flattens")
    """With target `temperature`, a group of n documents gets a share in proportion to n^(1/temperature); 1 is natural."""
    shares: dict[str, float] = setting(default_factory=dict, reach=DESCRIBES)
    """With target `shares`, the share of every group, relative to the others; 0 leaves the group out."""
    cap: int | None = number(None, least=1, advice="null is no cap")
    """Most documents of a group; those beyond it are left out by a seeded draw."""
    max_repeats: int = number(4, least=1, advice="up to 4 loses little as a rule")
    """Most times one document of a group that is too small is used; a group that would need more stays short of its share. At 1
    none is repeated: documents of groups that are too large are left out instead."""


MixOver = StrEnum("MixOver", ["documents", "tokens"])
EpochEnd = StrEnum("EpochEnd", ["first", "all"])


@dataclass(kw_only=True, slots=True)
class MixingConfig:
    """How sources with weights are mixed. Without weights every document is used once an epoch."""

    over: MixOver = setting(MixOver.documents, reach=DESCRIBES)
    """What the weights are shares of: the `documents` of an epoch, or its `tokens`."""
    epoch: EpochEnd = setting(EpochEnd.first, reach=DESCRIBES)
    """An epoch ends when the `first` source has been seen once, or when `all` sources have been seen at least once."""


LearnTurns = StrEnum("LearnTurns", ["all", "last"])
Reasoning = StrEnum("Reasoning", ["learn", "context", "drop"])


@dataclass(kw_only=True, slots=True)
class LearnConfig:
    """Which turns of a conversation are learned; a message's own `"train": true` or `false` goes before `roles`."""

    turns: LearnTurns = setting(LearnTurns.all, reach=DESCRIBES)
    """`all` learns every turn of the roles below; `last` only the last turn that would be learned."""
    roles: list[str] = setting(default_factory=lambda: ["assistant"], reach=DESCRIBES)
    """Roles whose turns are learned, of `system`, `user` and `assistant`: their content and their end-of-turn token."""
    reasoning: Reasoning = setting(Reasoning.learn, reach=DESCRIBES)
    """Thoughts (`reasoning_content`, or `<think>` at the start of a content): `learn`; `context` shows them only; or `drop`."""


@dataclass(kw_only=True, slots=True)
class CardConfig:
    """What only people know about a data set, for its card (`datacard.md`). Nothing here changes the data."""

    title: str | None = setting(None, reach=DESCRIBES)
    """Name of the data set; the default is made of the names of its sources."""
    description: str | None = setting(None, reach=DESCRIBES)
    """What the data set is and what it was made for, in a few sentences."""
    source_description: str | None = setting(None, reach=DESCRIBES)
    """How, when and from whom the data was collected, and whether those people agreed."""
    licence: str | None = setting(None, reach=DESCRIBES)
    """Licence of the whole, preferably an SPDX identifier such as `CC-BY-4.0`; each source may state its own."""
    contact: str | None = setting(None, reach=DESCRIBES)
    """Who answers questions and requests for removal: a name, a team or an address."""
    intended_use: str | None = setting(None, reach=DESCRIBES)
    """What the data may be used for, and what it must not be used for."""
    languages: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Languages of the texts as ISO 639 codes; an empty list takes those that were detected, if any."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One named source of training data."""

    path: Any = setting(None, reach=DESCRIBES)
    """Its files, as in `data.path`, or `hub:<name>` for a data set of the hub."""
    weight: float | None = number(None, least=0, advice="0 leaves the source out; null for all sources mixes nothing")
    """Its share of what is trained on, relative to the other sources' weights; null for all sources mixes nothing."""
    format: DataFormat = setting(DataFormat.auto, reach=DESCRIBES)
    """How its rows are read; `auto` takes `data.format`, or recognises it."""
    columns: dict[str, str] = setting(default_factory=dict, reach=DESCRIBES)
    """Renames its columns, in place of `data.columns`."""
    subset: str | None = setting(None, reach=DESCRIBES)
    """Configuration of a hub data set."""
    split: str = setting("train", reach=DESCRIBES)
    """Split of a hub data set."""
    revision: str | None = setting(None, reach=DESCRIBES)
    """Revision of a hub data set: a tag or a commit."""
    licence: str | None = setting(None, reach=DESCRIBES)
    """Licence, for the data card."""
    replay: bool = setting(False, reach=DESCRIBES)
    """General text that keeps the model as it is beside what is learned; see `objective.forgetting`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the training data is, what is done to it, and how it becomes tokens."""

    path: Any = setting(None, reach=DESCRIBES, resume=FREE)
    """Training files (JSON, JSONL, CSV, TSV, Parquet, Arrow, text; also compressed), a directory, a glob, or a list of
    these; or `hub:<name>`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several named sources in place of `data.path`, each with its own files, format and weight."""
    eval_path: Any = setting(None, reach=DESCRIBES, resume=FREE)
    """Evaluation files, in the same forms as `data.path`; or several sets by name, as {medical: a.jsonl, general: b.jsonl}."""
    eval_share: float = number(0.0, least=0, most=0.5, advice="0.05 holds out one document in twenty")
    """Share of the training documents held out for evaluation when `data.eval_path` is not given, 0 to 0.5."""
    test_path: Any = setting(None, reach=DESCRIBES, resume=FREE)
    """Test files: never trained on, and evaluated once, when training has ended, with the weights that are exported."""
    test_share: float = number(0.0, least=0, most=0.5, advice="0.05 holds out one document in twenty")
    """Share of the training documents held out for testing when `data.test_path` is not given, 0 to 0.5."""
    group_by: str | None = setting(None, reach=DESCRIBES)
    """Column that says what rows belong to, such as a patient: no group is both in training and in a held-out share."""
    format: DataFormat = setting(DataFormat.auto, reach=DESCRIBES)
    """How rows are read; `auto` recognises it from the first row."""
    columns: dict[str, str] = setting(default_factory=dict, reach=DESCRIBES)
    """Renames columns before reading, as {expected name: name in the file}; a dot reaches into an object."""
    ignore_columns: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Columns, or keys of turns, that are knowingly not read: they are neither named nor refused."""
    remote: bool = setting(False, reach=Reach.network, resume=FREE)
    """Whether paths may be addresses (`s3://`, `gs://`, `hf://`, `https://` and so on), read over the network."""
    streaming: bool = setting(False, reach=Reach.network)
    """Read hub data sets from the hub as they are prepared, with no copy in its cache; each at the commit in its `revision`."""
    max_bad_share: float = number(
        0.0, least=0, most=1, advice="0 fails on the first bad row, 0.01 bears one in a hundred"
    )
    """Most rows that may be lost unasked (unreadable, refused by a check or the chat template, nothing left to learn), as a
    share of all; the run fails above it."""
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    """What is checked in every document, and what happens then."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """What is mended in texts."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which documents are dropped for their length, language or quality."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Copies and near copies."""
    leakage: LeakageConfig = field(default_factory=LeakageConfig)
    """Training documents that are also in the held-out splits."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Training documents that repeat given evaluation files."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Personal data."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Resampling of the training documents to target shares."""
    mixing: MixingConfig = group(MixingConfig, resume="order")
    """How the weights of `data.sources` are meant."""
    languages: bool = setting(False, reach=DESCRIBES)
    """Tell the languages of the training documents in the audit, judged on at most 1,000 of them."""
    learn: LearnConfig = field(default_factory=LearnConfig)
    """Which turns of a conversation are learned."""
    max_length: int = number(2048, least=2, advice="a next-token target needs two tokens; 2048 is usual")
    """Longest document in tokens."""
    control_tokens: ControlTokens = setting(ControlTokens.auto, reach=DESCRIBES)
    """Control tokens that prompts, turns of users and systems, and plain texts spell: encoded as ordinary characters
    (`text`), as the tokens themselves (`keep`), or `refuse` the row. Answers and learned turns keep theirs. `auto` is `text`,
    but refuses data whose texts already hold a rendered chat template."""
    over_length: OverLength = setting(OverLength.truncate, reach=DESCRIBES)
    """What happens to longer documents."""
    packing: bool = setting(False, reach=DESCRIBES, resume="order")
    """Fill rows of `data.max_length` tokens with whole documents; a pack then counts as one sample of the batch."""
    layout: Layout = setting(Layout.auto, reach=DESCRIBES, resume=FREE)
    """`padding_free` concatenates documents; `padded` pads rows; `auto` takes the first where the model allows it."""
    shuffle: bool = setting(True, reach=DESCRIBES, resume="order")
    """Draw a new order each epoch from the seed; `false` keeps the order of the files."""
    cache_dir: str = setting("~/.cache/shardtune/data", reach=Reach.place, resume=FREE)
    """Directory of prepared data sets, named by fingerprint."""
    verify: Verify = setting(Verify.sampled, reach=DESCRIBES, resume=FREE)
    """How prepared data is compared with its hashes when it is used again: sizes and blocks (`sampled`), or `all` bytes."""
    workers: int = number(0, least=0, advice="0 takes the cores this job may use", resume=FREE)
    """Processes that prepare data; 0 takes the cores this job may use. The result does not depend on it."""
    max_documents: int | None = number(None, least=1, advice="null takes all")
    """Read at most this many training rows (the first of the order of the files)."""
    min_supervised_share: float = number(0.001, least=0, most=1, advice="0 switches the check off")
    """Refuse to train when a smaller share of the tokens is supervised."""
    card: CardConfig = field(default_factory=CardConfig)
    """What only people know about the data, for its data card."""


def identifying_data_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of data, by name, as identities and fingerprints have them.

    `control_tokens=auto` prepares the same bytes as `text`, its only meaning before there was `auto`: both are one run.
    """
    if settings.get("control_tokens") == ControlTokens.auto:
        return {**settings, "control_tokens": ControlTokens.text.value}
    return settings
