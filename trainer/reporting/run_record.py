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
from trainer.reporting.file_version import FILE_VERSION, readable_file_version
from trainer.reporting.metric_names import FIRST_NAMES_EDITION
from trainer.reporting.numbers import format_dp_ranks

RUN_RECORD = "run.json"
MAX_RECORD_BYTES = 2**24
"""A larger `run.json` is not read, since somebody else may have written the file."""
REFERENCE_TFLOPS_KEY = "logging.reference_tflops"
"""Setting of the peak that MFU is measured against, and the source of a peak that it gave."""
NAME_BY_TYPE = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
PLURAL_NAME_BY_TYPE = {int: "whole numbers", float: "numbers", str: "text", dict: "objects"}


@dataclass(kw_only=True, slots=True)
class TuningStart:
    """The adapter that `tuning.from` names."""

    path: str = ""
    sha256: str = ""
    """Hash of the tensors of the adapter."""


@dataclass(kw_only=True, slots=True)
class Sharding:
    """How many parameters the ranks hold, as measured on the built engine."""

    parameters: int = 0
    trainable_parameters: int = 0
    exchange: str = ""
    """What the ranks exchange through: `nccl`, `gloo` or `shared memory`."""
    held_per_rank: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class PredictedCost:
    """Memory, time and bytes that a run was predicted to take when it started. Sizes are those of one rank."""

    memory_gib: float | None = None
    memory_by: str | None = None
    """How `memory_gib` was computed."""
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
    """Memory, time and bytes that the last attempt took; None for what it did not reach. Sizes are those of one rank."""

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
    """The predicted cost of a run beside its measured cost."""

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
    answers: list[dict[str, str]] = field(default_factory=list)
    """Two questions with the answers of base and tuned model: `question`, `base`, `tuned`."""
    closing: str = ""
    """Whether the run overfits, and whether more steps would help (`trainer/session/closing.py`)."""
    watch: str | None = None
    """Metric that decides the best checkpoint."""
    greater_is_better: bool | None = None
    """Whether a larger value of it is better; None in records of earlier versions."""


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """The content of `run.json`. For a record that was read, a key that the file lacks, or has as null, has its default here."""

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
    hosts: int = 0
    """How many hosts the ranks are on; 0 in records of early versions."""
    sequence_size: int = 1
    """Ranks that share each row of documents (`parallel.sequence`)."""
    global_batch: int = 0
    micro_batch: int = 0
    accumulation: int = 0
    total_steps: int = 0
    epochs: float = 0.0
    tokens_per_step: int = 0
    learning_rate: dict[str, Any] = field(default_factory=dict)
    """The highest rate of the run, the usual one, steps of warm-up, and the schedule."""

    @property
    def dp_ranks_text(self) -> str:
        """The data-parallel ranks in words, as in the arithmetic of a batch: `4 ranks`, `2 groups of 4 ranks`."""
        return format_dp_ranks(self.world_size // self.sequence_size, self.sequence_size)

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
    """Of a device; None if unknown."""
    reference_tflops_source: str = ""

    @property
    def mfu_tflops(self) -> float | None:
        """Peak TFLOP/s that MFU is measured against; None: no MFU.

        The peak of a CPU is one matrix product at the start. Others may have used the processor then, so that the MFU of two
        runs could not be compared, and could be above 100 %.
        """
        is_measured = self.device.startswith("cpu") and self.reference_tflops_source != REFERENCE_TFLOPS_KEY
        return None if is_measured else self.reference_tflops

    # What it was computed with.
    versions: dict[str, str] = field(default_factory=dict)
    git_revision: str | None = None
    slurm_job_id: str | None = None
    command: str = ""
    energy: dict[str, Any] | None = None
    """What the hosts measured, as the run ended; None if they measured nothing."""

    # From here on a key is in the file once there is something to say.
    identity: dict[str, Any] | None = None
    metric_names: int = FIRST_NAMES_EDITION
    """Edition of the names of metrics in trackers (`trainer/reporting/metric_names.py`)."""
    from_environment: dict[str, str] | None = None
    """Settings that a variable such as WANDB_ENTITY decided, and their values, by key (`logging.entity`)."""
    dealt_experts: list[str] | None = None
    """What the start screen says of experts that are distributed over ranks (`parallel.experts`)."""
    accepted: list[str] | None = None
    """Differences from the run that is resumed which the user accepted."""
    must_fit: MemoryCheck | None = None
    staged: dict[str, Any] | None = None
    receipt: Receipt | None = None
    challenges: dict[str, Any] | None = None
    exported_checkpoint: dict[str, Any] | None = None
    """Which checkpoint leaves the run, and why (`trainer/export/exported_checkpoint.py`); None before its training has ended."""
    test: dict[str, Any] | None = None
    """Metrics of the test documents, and how often they were looked at (`trainer/session/looks_at_test_set.py`)."""
    gates: dict[str, Any] | None = None
    not_exported: list[str] | None = None
    """Files of the base that changed, so that nothing was exported."""
    export_problem: str | None = None
    """Why the checkpoint could not be exported; None if it was, or if something else forbade it."""
    exports: list[dict[str, Any]] | None = None
    outcome: RunOutcome | None = None
    jobs: list[dict[str, Any]] | None = None
    """Starts under SLURM, and what each used."""

    other: dict[str, Any] = field(default_factory=dict)
    """Content of the file under keys that this version of shardtune does not know."""
    keys: frozenset[str] = frozenset()
    """Keys of the file that could be read, also those with null; empty for a record that was made here."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read: there was no file, or no key of it could be read."""
        return not self.keys

    def as_json(self) -> dict[str, Any]:
        """The content of `run.json`, to be written: the record as JSON values by key.

        - A record of a live run: every key, but keys of `OPTIONAL_KEYS` only if their value is not the default.
        - A record that was read from a file: the keys of that file, also those that this version does not know, and keys whose
          value was set since.
        """
        content = asdict(self)
        # Two fields are no keys of the file (`FIELDS_NOT_IN_FILE`): they say how it was read.
        keys_in_file = content.pop("keys")
        unknown_content = content.pop("other")
        was_read = bool(keys_in_file)
        defaults = asdict(RunRecord(version=self.version))
        for key in content.keys() - keys_in_file:
            may_be_left_out = key in OPTIONAL_KEYS or was_read
            if may_be_left_out and content[key] == defaults[key]:
                del content[key]
        return unknown_content | content


OPTIONAL_KEYS = (
    *("identity", "from_environment", "accepted", "must_fit", "staged", "receipt", "challenges", "gates"),
    *("exported_checkpoint", "test", "not_exported", "export_problem", "exports", "outcome", "jobs"),
)
"""Keys that are written into the file only once they have a value. Every other key is there from the start, null for None."""
FIELDS_NOT_IN_FILE = ("other", "keys")
"""Fields of `RunRecord` that are no keys of the file: they say how it was read."""


def read_run_record(run_dir: Path) -> RunRecord:
    """Read the record of a run strictly: raises if `run.json` is missing, or if anything in it cannot be read.

    Raises OSError; ValueError for wrong content or a later version; RecursionError for content that is nested too deep. The
    texts do not name the file.
    """
    content = json.loads(atomic_io.read_bytes(run_dir / RUN_RECORD, max_bytes=MAX_RECORD_BYTES))
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    readable_file_version(content)  # raises ValueError for a later version
    type_errors: list[str] = []
    record = parse_run_record(content, type_errors)
    if type_errors:
        raise ValueError("; ".join(type_errors))
    return record


def readable_run_record(run_dir: Path) -> RunRecord:
    """Read as much of a run's record as can be read, where a part of it is better than an error.

    Also of a record that a later version wrote. Empty (`is_empty`) if there is no file, or nothing in it can be read.
    """
    try:
        content = json.loads(atomic_io.read_bytes(run_dir / RUN_RECORD, max_bytes=MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return RunRecord()
    if not isinstance(content, dict):
        return RunRecord()
    return parse_run_record(content, type_errors=[])  # what has another type is left out, and nobody is told


def parse_run_record(content: Mapping[str, Any], type_errors: list[str]) -> RunRecord:
    """Turn the content of a `run.json`, such as {"version": 1, "strategy": "ddp", ...}, into a record.

    If a value has another type than its field, the field keeps its default, and a line is appended to `type_errors`.
    """
    arguments = _arguments_of_right_type(RunRecord, content, "", type_errors)
    known_keys = get_type_hints(RunRecord).keys() - {*FIELDS_NOT_IN_FILE}
    unknown = {key: value for key, value in content.items() if key not in known_keys}
    # A key whose content is of another type counts as absent: nobody takes its default for what the file says.
    readable_keys = set()
    for key, value in content.items():
        if value is None or key in arguments or key in unknown:
            readable_keys.add(key)
    # A file without a version is of before there were versions: 0, not the version of a new record.
    return RunRecord(**{"version": 0, **arguments}, other=unknown, keys=frozenset(readable_keys))


def _arguments_of_right_type(
    record_class: type, content: Mapping[str, Any], prefix: str, type_errors: list[str]
) -> dict[str, Any]:
    """Check JSON values against the fields of a dataclass of this module; returns the keyword arguments to make one.

    - A value that is null is left out.
    - An object for a field that is a dataclass itself, such as `outcome`, becomes an instance of that dataclass.
    - A value of the type of its field is taken as it is.
    - Any other value is left out, and a line is appended to `type_errors`, such as "outcome.closing is not text".

    `prefix`: keys that lead to `content`, such as `outcome.`.
    """
    arguments = {}
    for name, hint in get_type_hints(record_class).items():
        value = content.get(name)
        if value is None or (record_class is RunRecord and name in FIELDS_NOT_IN_FILE):
            continue
        field_type = _type_without_none(hint)
        is_nested = is_dataclass(field_type)
        if is_nested and isinstance(value, Mapping):
            nested_arguments = _arguments_of_right_type(field_type, value, f"{prefix}{name}.", type_errors)
            arguments[name] = field_type(**nested_arguments)
        elif not is_nested and _is_of_type(value, field_type):
            arguments[name] = value
        else:
            type_errors.append(f"{prefix}{name} is not {_type_in_words(field_type)}")
    return arguments


def _type_in_words(hint: Any) -> str:
    """A field's type for people: `a list of whole numbers` for list[int]."""
    name = NAME_BY_TYPE.get(get_origin(hint) or hint, NAME_BY_TYPE[dict])
    if not get_args(hint):
        return name
    element_type = get_args(hint)[-1]  # of a list its only argument, of a dict the type of its values
    plural_name = PLURAL_NAME_BY_TYPE.get(get_origin(element_type) or element_type)
    return f"{name} of {plural_name}" if plural_name else name


def _type_without_none(hint: Any) -> Any:
    """The type X of a hint `X | None`; any other hint as it is."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    (type_besides_none,) = (alternative for alternative in get_args(hint) if alternative is not NoneType)
    return type_besides_none


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value in `run.json` has the type of its field, such as `list[int]`: [1, null] has, ["a"] has not.

    `hint`: Any, list[X], dict[str, X], or a class such as `str`; no union.
    Inside lists and objects null is of any type, since it stands for a number that is not finite.
    """
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is list:
        (element_type,) = get_args(hint)
        return isinstance(value, list) and all(
            element is None or _is_of_type(element, element_type) for element in value
        )
    if origin is dict:
        _, element_type = get_args(hint)
        if not isinstance(value, dict):
            return False
        return all(element is None or _is_of_type(element, element_type) for element in value.values())
    if isinstance(value, bool):  # to Python, True is an int as well
        return hint is bool
    if hint is float:  # JSON may write 1.0 as 1
        return isinstance(value, int | float)
    return isinstance(value, hint)
