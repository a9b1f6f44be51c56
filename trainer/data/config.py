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
    """Checks that reject a document (it counts as a bad row). Checks that are not listed only count documents. Names:
    `system_late`, `assistant_before_user`, `same_role_twice`, `trailing_turns`, `repeated_turn`, `empty_text`,
    `encoding_damage`, `control_characters`."""


UnicodeForm = StrEnum("UnicodeForm", {"none": "none", "NFC": "NFC", "NFKC": "NFKC"})


@dataclass(kw_only=True, slots=True)
class CleaningConfig:
    """What is cleaned in every text of a row. Everything is off until it is asked for."""

    fix_encoding: bool = setting(False, reach=DESCRIBES)
    """Repair UTF-8 that was decoded with a wrong encoding (`schÃ¶n` becomes `schön`), line by line, by ftfy."""
    control_characters: bool = setting(False, reach=DESCRIBES)
    """Remove control, zero-width and bidirectional characters, byte order marks and soft hyphens. Joiners that a script needs
    are kept."""
    unicode: UnicodeForm = setting(UnicodeForm.none, reach=DESCRIBES)
    """Unicode normalisation: `none`, `NFC` (one code sequence for each character) or `NFKC` (also turns `x²` into `x2`)."""


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """Which rows are dropped. Nothing is until a bound is set."""

    min_characters: int = number(0, least=0, advice="0 is no bound")
    """Drop rows with fewer characters, counted over all texts of the row."""
    max_characters: int | None = number(None, least=1, advice="null is no bound")
    """Drop rows with more characters, counted over all texts of the row. null: no limit."""
    min_completion_characters: int = number(0, least=0, advice="0 is no bound")
    """Drop rows whose answers (the completion, or all turns that are trained on) have fewer characters."""
    drop_echoes: bool = setting(False, reach=DESCRIBES)
    """Drop rows with an answer of at least 12 letters that only repeats the question."""
    drop_phrases: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Drop rows whose answers contain one of these phrases, such as `as an AI language model`, in upper or lower case."""
    languages: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Keep only rows in these languages, as ISO 639 codes such as `en`. Empty: keep all."""


DecontaminationPolicy = StrEnum("DecontaminationPolicy", ["report", "drop"])


@dataclass(kw_only=True, slots=True)
class DecontaminationConfig:
    """Training documents that hold text of evaluation sets, such as public benchmarks."""

    paths: Any = setting(None, reach=DESCRIBES)
    """Files of evaluation sets, in the formats of the training data. Empty: no decontamination."""
    policy: DecontaminationPolicy = setting(DecontaminationPolicy.report, reach=DESCRIBES)
    """`report` counts training documents that repeat an evaluation document, `drop` removes them."""


PrivacyPreset = StrEnum("PrivacyPreset", ["none", "general", "hipaa", "gdpr"])
REGIONS = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "IN", "BR")
"""Countries whose own identity numbers are known, ISO 3166-1 alpha-2. Telephone numbers: any country."""
PrivacyMode = StrEnum("PrivacyMode", ["none", "report", "redact", "pseudonymise", "drop", "fail"])
PrivacyEngine = StrEnum("PrivacyEngine", ["patterns", "presidio"])


@dataclass(kw_only=True, slots=True)
class PrivacyConfig:
    """Personal data in texts: what is looked for, and what is done about it. The default only reports."""

    mode: PrivacyMode = setting(PrivacyMode.report, reach=DESCRIBES)
    """What happens to personal data: `none`; `report` counts it; `redact` replaces it by `[TYPE]`; `pseudonymise` replaces it
    by a name derived with the secret key in the environment variable SHARDTUNE_PSEUDONYM_KEY; `drop` drops the document; `fail`
    ends the run."""
    preset: PrivacyPreset = setting(PrivacyPreset.general, reach=DESCRIBES)
    """Types that are searched for if `types` is empty: `general`, `hipaa` (Safe Harbor identifiers), `gdpr`, or `none`."""
    types: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Types that are searched for, such as EMAIL or PHONE. Empty: those of the preset."""
    engine: PrivacyEngine = setting(PrivacyEngine.patterns, reach=DESCRIBES)
    """`patterns` finds numbers and internet addresses by rules. `presidio` also finds names of people and places in English
    (extra `pii`)."""
    min_score: float = number(
        0.5, least=0, most=1, advice="0.5 as a rule; 0.35 also takes numbers that only look right"
    )
    """Least confidence of a finding, 0 to 1. Less certain findings are ignored. 0.35 also reports numbers that only look
    right."""
    regions: list[str] = setting(default_factory=lambda: list(REGIONS), reach=DESCRIBES)
    """Countries whose telephone and identity numbers are searched for, as two-letter ISO 3166 codes."""
    scan_documents: int = number(1000, least=0, advice="0 scans all")
    """Number of documents that are scanned in each source, from its start, if `mode=report`. 0: all. Other modes scan all
    documents."""
    allow: list[str] = setting(default_factory=list, reach=DESCRIBES)
    r"""Regular expressions for texts that are never a finding, such as `support@example\.com`. The whole finding must match."""


DuplicatePolicy = StrEnum("DuplicatePolicy", ["none", "report", "drop"])
ComparedText = StrEnum("ComparedText", ["document", "prompt", "completion"])


@dataclass(kw_only=True, slots=True)
class DuplicatesConfig:
    """Duplicates within the training data. A kind is treated at least as strictly as the kinds below it."""

    exact: DuplicatePolicy = setting(DuplicatePolicy.report, reach=DESCRIBES)
    """What happens to exact copies of a document: `none`, `report` (count them) or `drop` (keep the first)."""
    normalized: DuplicatePolicy = setting(DuplicatePolicy.report, reach=DESCRIBES)
    """What happens to documents that differ only in upper and lower case, spacing and punctuation: `none`, `report` or
    `drop`."""
    near: DuplicatePolicy = setting(DuplicatePolicy.none, reach=DESCRIBES)
    """What happens to near duplicates: documents whose 5-word sequences overlap by `threshold` or more. `drop` removes exact
    copies too."""
    threshold: float = number(0.8, least=0.3, most=1, advice="0.8 as a rule; lower finds looser copies and costs time")
    """Least Jaccard similarity of near duplicates (shared 5-word sequences divided by all of both documents), 0.3 to 1."""
    text: ComparedText = setting(ComparedText.document, reach=DESCRIBES)
    """Text that is compared: the whole `document`, the `prompt` (all before the last answer) or the `completion`."""


LeakagePolicy = StrEnum("LeakagePolicy", ["report", "drop_train", "fail"])


@dataclass(kw_only=True, slots=True)
class LeakageConfig:
    """Documents that training and held-out data share."""

    policy: LeakagePolicy = setting(LeakagePolicy.report, reach=DESCRIBES)
    """What happens to training documents that are also in a held-out split: `report` counts them, `drop_train` removes them
    from the training data, `fail` ends the run. If only the prompt is the same, and the answer or system turn differs, the
    document is always only counted."""
    near: bool = setting(False, reach=DESCRIBES)
    """Also search for near duplicates of held-out documents, with the threshold of `data.duplicates`."""


BalanceBy = StrEnum("BalanceBy", ["none", "label", "source"])
BalanceTarget = StrEnum("BalanceTarget", ["natural", "temperature", "uniform", "shares"])


@dataclass(kw_only=True, slots=True)
class BalanceConfig:
    """Repeating and leaving out documents so that groups have the wanted shares of the training data."""

    by: BalanceBy = setting(BalanceBy.none, reach=DESCRIBES)
    """What defines the groups that are balanced: `label`, `source`, or `none` (no balancing)."""
    target: BalanceTarget = setting(BalanceTarget.natural, reach=DESCRIBES)
    """Target shares of the groups: as in the data (`natural`), flattened (`temperature`), equal (`uniform`), or as you set them
    (`shares`)."""
    temperature: float = number(1.0, least=1, advice="1 is natural, 2 to 5 flattens")
    """For `target=temperature`: the share of a group of n documents is proportional to n^(1/temperature). 1 is natural."""
    shares: dict[str, float] = setting(default_factory=dict, reach=DESCRIBES)
    """For `target=shares`: the share of each group, relative to the others. 0 leaves a group out."""
    cap: int | None = number(None, least=1, advice="null is no cap")
    """Largest number of documents of a group. The rest are left out, drawn at random by the seed. null: no limit."""
    max_repeats: int = number(4, least=1, advice="up to 4 loses little as a rule")
    """How often one document may be used, if its group is too small. A group that would need more repeats stays below its
    share. With 1 no document is repeated; documents of larger groups are left out instead."""


MixOver = StrEnum("MixOver", ["documents", "tokens"])
EpochEnd = StrEnum("EpochEnd", ["first", "all"])


@dataclass(kw_only=True, slots=True)
class MixingConfig:
    """How sources with weights are mixed. Without weights every document is used once an epoch."""

    over: MixOver = setting(MixOver.documents, reach=DESCRIBES)
    """What the weights are shares of: the `documents` or the `tokens` of an epoch."""
    epoch: EpochEnd = setting(EpochEnd.first, reach=DESCRIBES)
    """When an epoch ends: once the `first` source has been used up, or once `all` sources have been used up at least once."""


LearnTurns = StrEnum("LearnTurns", ["all", "last"])
Reasoning = StrEnum("Reasoning", ["learn", "context", "drop"])


@dataclass(kw_only=True, slots=True)
class LearnConfig:
    """Which turns of a conversation are learned; a message's own `"train": true` or `false` goes before `roles`."""

    turns: LearnTurns = setting(LearnTurns.all, reach=DESCRIBES)
    """Turns that the loss is computed on: `all` turns of the roles below, or only the `last` of them."""
    roles: list[str] = setting(default_factory=lambda: ["assistant"], reach=DESCRIBES)
    """Roles whose turns the loss is computed on, any of `system`, `user` and `assistant`: their content and their end-of-turn
    token."""
    reasoning: Reasoning = setting(Reasoning.learn, reach=DESCRIBES)
    """What happens to reasoning (`reasoning_content`, or `<think>` at the start of a content): `learn` trains on it; `context`
    keeps it as input without loss; `drop` removes it."""


@dataclass(kw_only=True, slots=True)
class CardConfig:
    """What only people know about a data set, for its card (`datacard.md`). Nothing here changes the data."""

    title: str | None = setting(None, reach=DESCRIBES)
    """Name of the data set. Default: made of the names of its sources."""
    description: str | None = setting(None, reach=DESCRIBES)
    """What the data set is and what it was made for, in a few sentences."""
    source_description: str | None = setting(None, reach=DESCRIBES)
    """How, when and from whom the data was collected, and whether those people agreed."""
    licence: str | None = setting(None, reach=DESCRIBES)
    """Licence of the whole data set, preferably an SPDX identifier such as `CC-BY-4.0`. Each source may name its own."""
    contact: str | None = setting(None, reach=DESCRIBES)
    """Who answers questions and requests for removal: a name, a team or an address."""
    intended_use: str | None = setting(None, reach=DESCRIBES)
    """What the data may be used for, and what it must not be used for."""
    languages: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Languages of the texts as ISO 639 codes. Empty: the detected languages, if any."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One named source of training data."""

    path: Any = setting(None, reach=DESCRIBES)
    """Files of the source, as in `data.path`, or `hub:<name>` for a data set of the Hub."""
    weight: float | None = number(None, least=0, advice="0 leaves the source out; null for all sources mixes nothing")
    """Share of this source in training, relative to the weights of the other sources. If it is null for all sources, they are
    not mixed by weight."""
    format: DataFormat = setting(DataFormat.auto, reach=DESCRIBES)
    """Format of the source's rows. `auto`: `data.format`, or recognised from the rows."""
    columns: dict[str, str] = setting(default_factory=dict, reach=DESCRIBES)
    """Renames columns of this source, instead of `data.columns`."""
    subset: str | None = setting(None, reach=DESCRIBES)
    """Configuration (subset) of a Hub data set."""
    split: str = setting("train", reach=DESCRIBES)
    """Split of a Hub data set."""
    revision: str | None = setting(None, reach=DESCRIBES)
    """Revision of a Hub data set: a tag or a commit."""
    licence: str | None = setting(None, reach=DESCRIBES)
    """Licence of the source, for the data card."""
    replay: bool = setting(False, reach=DESCRIBES)
    """Marks general text that is replayed against forgetting; see `objective.forgetting`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the training data is, what is done to it, and how it becomes tokens."""

    path: Any = setting(None, reach=DESCRIBES, resume=FREE)
    """Training files (JSON, JSONL, CSV, TSV, Parquet, Arrow or text, also compressed), a directory, a glob pattern, a list of
    these, or `hub:<name>`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several named sources instead of `data.path`, each with its own files, format and weight."""
    eval_path: Any = setting(None, reach=DESCRIBES, resume=FREE)
    """Evaluation files, in the formats of `data.path`, or several named sets: {medical: a.jsonl, general: b.jsonl}."""
    eval_share: float = number(0.0, least=0, most=0.5, advice="0.05 holds out one document in twenty")
    """Share of the training documents that is held out for evaluation if `data.eval_path` is not set, 0 to 0.5."""
    test_path: Any = setting(None, reach=DESCRIBES, resume=FREE)
    """Test files. They are never trained on, and are evaluated once, at the end of training, with the exported weights."""
    test_share: float = number(0.0, least=0, most=0.5, advice="0.05 holds out one document in twenty")
    """Share of the training documents that is held out for testing if `data.test_path` is not set, 0 to 0.5."""
    group_by: str | None = setting(None, reach=DESCRIBES)
    """Column that names what a row belongs to, such as a patient. A group is never split between training and held-out data."""
    format: DataFormat = setting(DataFormat.auto, reach=DESCRIBES)
    """Format of the rows. `auto` recognises it from the first row."""
    columns: dict[str, str] = setting(default_factory=dict, reach=DESCRIBES)
    """Renames columns, as {expected name: name in the file}. A dot selects a value inside an object."""
    ignore_columns: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Columns, or keys of turns, that are ignored on purpose. Other unread columns are reported, or are an error if they carry
    meaning."""
    remote: bool = setting(False, reach=Reach.network, resume=FREE)
    """Allow addresses (`s3://`, `gs://`, `hf://`, `https://`, ...) as paths. They are read over the network."""
    streaming: bool = setting(False, reach=Reach.network)
    """Read Hub data sets directly from the Hub during preparation, without a copy in the local cache. Each needs a commit as
    its `revision`."""
    max_bad_share: float = number(
        0.0, least=0, most=1, advice="0 fails on the first bad row, 0.01 allows one in a hundred"
    )
    """Largest share of all rows that may be lost without your asking: unreadable, rejected by a check or by the chat template,
    or without a token to train on. Above it, the run fails."""
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    """Checks of every document, and what happens if one fails."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """Repairs of the texts."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Filters that drop documents by length, language or quality."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Exact and near duplicates among the training documents."""
    leakage: LeakageConfig = field(default_factory=LeakageConfig)
    """Training documents that are also in the held-out splits."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Training documents that repeat documents of evaluation files that you name."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Personal data in the texts."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Resampling of the training documents to target shares of groups."""
    mixing: MixingConfig = group(MixingConfig, resume="order")
    """What the weights of `data.sources` are shares of, and when an epoch ends."""
    languages: bool = setting(False, reach=DESCRIBES)
    """Report the languages of the training documents in the audit, detected in at most 1,000 of them."""
    learn: LearnConfig = field(default_factory=LearnConfig)
    """Which turns of a conversation the loss is computed on."""
    max_length: int = number(2048, least=2, advice="a next-token target needs two tokens; 2048 is usual")
    """Greatest length of a document in tokens."""
    control_tokens: ControlTokens = setting(ControlTokens.auto, reach=DESCRIBES)
    """What happens if a prompt, a turn of user or system, or a plain text contains the spelling of a control token: `text`
    encodes it as ordinary characters, `keep` as the token itself, `refuse` rejects the row. Answers and turns that are trained
    on keep theirs. `auto` is `text`, but refuses data whose texts already contain a rendered chat template."""
    over_length: OverLength = setting(OverLength.truncate, reach=DESCRIBES)
    """What happens to documents longer than `data.max_length`."""
    packing: bool = setting(False, reach=DESCRIBES, resume="order")
    """Fill rows of `data.max_length` tokens with several whole documents. One pack then counts as one sample of the batch."""
    layout: Layout = setting(Layout.auto, reach=DESCRIBES, resume=FREE)
    """`padding_free` concatenates documents without padding; `padded` pads them to equal length; `auto` is `padding_free` if
    the model supports it."""
    shuffle: bool = setting(True, reach=DESCRIBES, resume="order")
    """Shuffle the documents anew for each epoch, by the seed. `false` keeps the order of the files."""
    cache_dir: str = setting("~/.cache/shardtune/data", reach=Reach.place, resume=FREE)
    """Directory of prepared data sets. Each is named by its fingerprint."""
    verify: Verify = setting(Verify.sampled, reach=DESCRIBES, resume=FREE)
    """How prepared data is checked against its checksums when it is reused: `sampled` (sizes and some blocks), or `all`
    bytes."""
    workers: int = number(0, least=0, advice="0 takes the cores this job may use", resume=FREE)
    """Number of processes that prepare data. 0: one for each core that the job may use. The result does not depend on it."""
    max_documents: int | None = number(None, least=1, advice="null takes all")
    """Largest number of training rows that are read, in the order of the files. null: all."""
    min_supervised_share: float = number(0.001, least=0, most=1, advice="0 switches the check off")
    """Least share of tokens that the loss is computed on. Below it, the run refuses to start."""
    card: CardConfig = field(default_factory=CardConfig)
    """Facts for the data card that only people know."""


def identifying_data_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of data, by name, as identities and fingerprints have them.

    `control_tokens=auto` prepares the same bytes as `text`, its only meaning before there was `auto`: both are one run.
    """
    if settings.get("control_tokens") == ControlTokens.auto:
        return {**settings, "control_tokens": ControlTokens.text.value}
    return settings
