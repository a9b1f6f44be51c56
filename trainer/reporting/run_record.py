"""The record of a run, `run.json`: what the run is made of, what it was expected to take, and how it ended.

A field has the name of its key in the file. Those that gather the facts from a live run stand elsewhere and fill a `RunRecord`;
everybody who reads a run directory gets one back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from strategies import atomic_io
from trainer.reporting.file_version import FILE_VERSION, version_of

RUN_RECORD = "run.json"
MOST_BYTES = 2**24
"""Bytes of a record that are read at most: somebody else may have written the file."""
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
ELEMENT_NAMES = {int: "whole numbers", float: "numbers", str: "text", dict: "objects"}


@dataclass(kw_only=True, slots=True)
class TuningStart:
    """The adapter that `tuning.from` names."""

    path: str = ""
    sha256: str = ""
    """Of its tensors."""


@dataclass(kw_only=True, slots=True)
class Sharding:
    """Elements of parameters, as measured on the built engine."""

    parameters: int = 0
    trainable_parameters: int = 0
    exchange: str = ""
    """What the ranks exchange through: `nccl`, `gloo` or `shared memory`."""
    held_per_rank: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class PredictedCost:
    """What a run was expected to take, reckoned as it starts. Sizes are those of a rank."""

    memory_gib: float | None = None
    memory_by: str | None = None
    """How it was reckoned."""
    state_gib: float | None = None
    activations_gib: float | None = None
    device_gib: float | None = None
    """Memory of the device."""
    step_s: float | None = None
    step_by: str | None = None
    checkpoint_bytes: float | None = None
    exchanged_bytes: dict[str, float] | None = None
    """Bytes that rank 0 exchanges in a step, by collective."""


@dataclass(kw_only=True, slots=True)
class MeasuredCost:
    """What the last attempt took; None if it did not get so far. Sizes are those of a rank."""

    memory_gib: float | None = None
    memory_reserved_gib: float | None = None
    device_name: str | None = None
    memory_of: str | None = None
    step_s: float | None = None
    exchanged_bytes: dict[str, float] | None = None
    """Bytes that rank 0 exchanged in a step, by collective."""
    exposed_s: float | None = None
    """Seconds of that step in which rank 0 waited for the exchange."""
    start_s: float | None = None
    """From the start of the attempt to its first step."""
    evaluation_before_s: float | None = None
    checkpoint_bytes: float | None = None
    checkpoint_s: float | None = None
    checkpoint_stall_s: float | None = None


@dataclass(kw_only=True, slots=True)
class Receipt:
    """What a run was expected to take beside what it took."""

    predicted: PredictedCost | None = None
    measured: MeasuredCost | None = None


@dataclass(kw_only=True, slots=True)
class MemoryCheck:
    """What `run.must_fit` simulated of the longest micro-batch, in GiB of a rank."""

    live_gib: float = 0.0
    """Tensors alone."""
    needed_gib: float = 0.0
    """With the allocator and libraries."""
    device_gib: float = 0.0
    when: str = ""
    """The part of the step that takes most."""


@dataclass(kw_only=True, slots=True)
class RunOutcome:
    """How training ended."""

    progress: dict[str, Any] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step."""
    after: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at the last evaluation."""
    last_row: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    experts: list[dict[str, Any]] = field(default_factory=list)
    slow_ranks: list[dict[str, Any]] = field(default_factory=list)
    stopped_early: bool = False


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """What `run.json` says. Of a file that was read, what it does not say, or says as null, has its default."""

    version: int = FILE_VERSION
    """Of the file (`trainer/reporting/file_version.py`); 0 for a file of before there was one."""

    # What was asked for.
    config_sha256: str = ""
    strategy: str = ""
    tuning: str = ""
    objective: str = ""
    precision: str = ""
    advice: str | None = None
    """What the device would do better with another precision."""
    attention: str = ""
    layout: str = ""

    # The arithmetic of a step and of the run.
    world_size: int = 0
    sequence_size: int = 1
    """Ranks that share each row of documents (`parallel.sequence`)."""
    global_batch: int = 0
    micro_batch: int = 0
    accumulation: int = 0
    total_steps: int = 0
    epochs: float = 0.0
    tokens_per_step: int = 0

    @property
    def readers(self) -> str:
        """Who reads documents of their own, as the arithmetic of a batch names them: `4 ranks`, `2 groups of 4 ranks`."""
        plural = "s" if self.world_size > self.sequence_size else ""
        if self.sequence_size == 1:
            return f"{self.world_size} rank{plural}"
        return f"{self.world_size // self.sequence_size} group{plural} of {self.sequence_size} ranks"

    # Where it runs.
    host: str = ""
    device: str = ""
    device_name: str | None = None
    resumed_from: str | None = None
    """Name of the checkpoint."""

    # The model, and what its weights were made from.
    base_model: str | None = None
    base_commit: str | None = None
    quantisation: str | None = None
    quantised_experts: int = 0
    folded_adapters: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each adapter that is merged into the base, by its directory."""
    tuning_from: TuningStart | None = None

    # The data.
    data_fingerprint: str = ""
    data_directory: str = ""
    data_report: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None

    # The model as it was built.
    sharding: Sharding = field(default_factory=Sharding)
    initialised: list[str] = field(default_factory=list)
    """Weights that the checkpoint of the base did not have."""
    weights_read_bytes: list[int] = field(default_factory=list)
    """Bytes that each rank read."""
    packed_weights: dict[str, Any] | None = None
    weights_left_out: dict[str, Any] | None = None
    routers: list[str] = field(default_factory=list)
    substitutions: dict[str, str] = field(default_factory=dict)
    """How settings that were left open were resolved, by their key: sentences for people."""
    base_parameters: int = 0
    flops_per_token: float = 0.0
    reference_tflops: float | None = None
    """Of a device; None if unknown, so that there is no MFU."""
    reference_tflops_source: str = ""

    # What it was computed with.
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    slurm_job_id: str | None = None
    command: str = ""
    energy: dict[str, Any] | None = None
    """What the hosts measured, as the run ended; None if they measured nothing."""

    # From here on a key is in the file once there is something to say.
    identity: dict[str, Any] | None = None
    from_environment: dict[str, str] | None = None
    """Settings that a variable such as WANDB_ENTITY decided, and their values, by key (`logging.entity`)."""
    accepted: list[str] | None = None
    """Differences from the run that is resumed which the user accepted."""
    must_fit: MemoryCheck | None = None
    staged: dict[str, Any] | None = None
    receipt: Receipt | None = None
    challenges: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    not_exported: list[str] | None = None
    """Files of the base that changed, so that nothing was exported."""
    exports: list[dict[str, Any]] | None = None
    outcome: RunOutcome | None = None
    jobs: list[dict[str, Any]] | None = None
    """Starts under SLURM, and what each used."""

    other: dict[str, Any] = field(default_factory=dict)
    """Content of the file under keys that this version does not know."""
    keys: frozenset[str] = frozenset()
    """Keys of the file that could be read, also those with null; empty for a record that was made here."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read: there was no file, or no key of it could be read."""
        return not self.keys

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values by key. Of a record that was read, what the file does not say stays out."""
        tree = asdict(self)
        keys_in_file = tree.pop("keys")
        unknown_to_us = tree.pop("other")
        defaults = asdict(RunRecord(version=self.version))
        for key in tree.keys() - keys_in_file:
            # A record that was made here says all its keys but those of `SAID_LATER`; one that was read, those of its file.
            may_be_left_out = key in SAID_LATER or bool(keys_in_file)
            if may_be_left_out and tree[key] == defaults[key]:
                del tree[key]
        return unknown_to_us | tree


SAID_LATER = (
    *("identity", "from_environment", "accepted", "must_fit", "staged", "receipt", "challenges", "gates"),
    *("not_exported", "exports", "outcome", "jobs"),
)
"""Keys that are in the file once there is something to say. Every other key is there from the start, with null for None."""
NOT_IN_FILE = ("other", "keys")
"""Fields that say how the file was read, and are no keys of it."""


def read_run_record(run_dir: Path) -> RunRecord:
    """The record of a run directory. Raises OSError or ValueError, which say what is wrong, without the file's name."""
    tree = json.loads(atomic_io.read_bytes(run_dir / RUN_RECORD, most=MOST_BYTES))
    if not isinstance(tree, dict):
        raise ValueError("it holds no object")
    version_of(tree)
    wrong: list[str] = []
    record = record_of(tree, wrong)
    if wrong:
        raise ValueError("; ".join(wrong))
    return record


def readable_run_record(run_dir: Path) -> RunRecord:
    """What can be read of the record of a run directory, also of a later version.

    It is an empty record if there is no file, or nothing in it can be read.
    """
    try:
        tree = json.loads(atomic_io.read_bytes(run_dir / RUN_RECORD, most=MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return RunRecord()
    return record_of(tree, []) if isinstance(tree, dict) else RunRecord()


def record_of(tree: Mapping[str, Any], wrong: list[str]) -> RunRecord:
    """The record that JSON values by key make. `wrong` gets a line for each value of another type; its field has its default."""
    arguments = _fields_of(RunRecord, tree, "", wrong)
    keys = get_type_hints(RunRecord).keys() - {*NOT_IN_FILE}
    unknown_to_us = {key: content for key, content in tree.items() if key not in keys}
    # A key whose content is of another type counts as absent: nobody takes its default for what the file says.
    readable = {key for key, content in tree.items() if content is None or key in arguments or key in unknown_to_us}
    return RunRecord(**{"version": 0, **arguments}, other=unknown_to_us, keys=frozenset(readable))


def _fields_of(kind: type, tree: Mapping[str, Any], prefix: str, wrong: list[str]) -> dict[str, Any]:
    """Arguments for the dataclass `kind` out of the JSON values in `tree`; what is null or of a wrong type is left out."""
    arguments = {}
    for name, hint in get_type_hints(kind).items():
        content = tree.get(name)
        if content is None or (kind is RunRecord and name in NOT_IN_FILE):
            continue
        needed = _without_none(hint)
        is_nested = is_dataclass(needed)
        if is_nested and isinstance(content, Mapping):
            arguments[name] = needed(**_fields_of(needed, content, f"{prefix}{name}.", wrong))
        elif not is_nested and _fits(content, needed):
            arguments[name] = content
        else:
            wrong.append(f"{prefix}{name} is not {_name_of(needed)}")
    return arguments


def _name_of(hint: Any) -> str:
    name = TYPE_NAMES.get(get_origin(hint) or hint, TYPE_NAMES[dict])
    if not get_args(hint):
        return name
    element = get_args(hint)[-1]
    elements = ELEMENT_NAMES.get(get_origin(element) or element)
    return f"{name} of {elements}" if elements else name


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    (needed,) = (part for part in get_args(hint) if part is not NoneType)
    return needed


def _fits(content: Any, hint: Any) -> bool:
    """Whether JSON content is of a type; inside lists and objects null always is, since it stands for a number not finite."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is list:
        (element,) = get_args(hint)
        return isinstance(content, list) and all(part is None or _fits(part, element) for part in content)
    if origin is dict:
        element = get_args(hint)[1]
        return isinstance(content, dict) and all(part is None or _fits(part, element) for part in content.values())
    if isinstance(content, bool):
        return hint is bool
    return isinstance(content, int | float if hint is float else hint)
