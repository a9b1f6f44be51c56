"""Takes the real step on tensors without memory, to find what a run would take, hold and exchange."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from strategies.base import (
    InferenceWeights,
    OptimizerFactory,
    Precision,
    StepResult,
    StrategyConfig,
    UpdateFilter,
    plan_of,
)
from strategies.build import build_strategy
from strategies.compat.deepspeed import restore_torch_linear
from strategies.compat.dispatch import storage_key
from strategies.pinned_memory import HostTensors
from strategies.runtime import Runtime
from strategies.simulation import fake_tensors
from strategies.tensor_inventory import MemoryKind, engine_tensors
from trainer.planner.buckets import track_bucket_reductions
from trainer.planner.fake_tensors import replace_tensors_by_fakes
from trainer.planner.memory_tracker import PhasePeak, StepPhase
from trainer.planner.minimal_step import build_step_batch, minimal_trainer
from trainer.planner.model_blocks import repeated_blocks, teacher_blocks
from trainer.planner.step_recorder import Collective, SimulatedStepRecord, StepRecorder
from trainer.step import BuiltModel, TrainStep


class ShapesOnly:
    """A `ParameterSource` without values."""

    def __init__(self) -> None:
        self.frozen_sources: dict[str, Any] = {}
        """As in `WeightSource`; nothing is read of it."""

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """As many elements as the run has, without values, on the host."""
        return torch.empty(stop - start, dtype=torch.bfloat16)

    def close(self) -> None:
        """Nothing to close: there are no files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """What a step is made of: the model on meta, the strategy that shards it, the optimizer, and one rank's micro-batches."""

    built: BuiltModel
    strategy: StrategyConfig
    precision: Precision
    make_optimizer: OptimizerFactory
    max_grad_norm: float
    micro_batches: list[dict[str, Any]]
    """One rank's micro-batches of a step, on the CPU."""
    weight_source: Any = field(default_factory=ShapesOnly)
    """A `ParameterSource`: where an engine reads weights from."""
    full_trained_elements: int | None = None
    """Trained elements of the deeper model that this shallow one is simulated for; None if the model is simulated for itself.

    DeepSpeed's gradient buckets are as full as the deeper model makes them (`trainer/planner/buckets.py`)."""


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One rank's step, from the second on: the optimizer has its state."""

    peak_by_phase: dict[StepPhase, PhasePeak]
    """The most live bytes on the device in each phase, in order."""
    resting_bytes_by_kind: dict[MemoryKind, int]
    """Bytes between steps."""
    collectives: list[Collective]
    host_reads: Counter[str]
    """How often the host waited for a value of the device, by line of the code."""
    flops: float
    moved_bytes_by_phase: Counter[str]
    """Bytes on the device that operations other than products and attention read and write, by phase."""
    bytes_to_host: int
    bytes_to_device: int
    host_bytes: int
    """Bytes that the engine keeps on the host."""
    host_inputs: HostTensors
    """Inputs of recomputed blocks that wait on the host (`strategy.offload_activations`)."""

    @property
    def phase_and_peak(self) -> tuple[StepPhase, PhasePeak]:
        """The phase with the most live bytes."""
        return max(self.peak_by_phase.items(), key=lambda phase_and_peak: phase_and_peak[1].total_bytes)


class RecordedStep(NamedTuple):
    """A step that a `RecordedEngine` took."""

    peaks: dict[StepPhase, PhasePeak]
    """The most live bytes on the device in each phase, in order."""
    record: SimulatedStepRecord
    """Its collectives, copies and FLOPs."""

    def peak_operations(self) -> dict[StepPhase, int]:
        """By phase, the number of the operation after which most bytes were live, counted from 0 within the phase."""
        return {phase: peak.operation_index for phase, peak in self.peaks.items()}


def simulate(parts: StepParts, runtime: Runtime, *, num_repeats: int = 1) -> SimulatedStep:
    """Take training steps of one rank on fake tensors (which have shapes but no memory), to learn what a step of it needs.

    The first step creates the optimizer's state, the second finds after which operation the memory of each phase is highest, and
    the third counts it there by kind (parameters, activations, ...). `num_repeats`: steps after the second; with 0 no peak is
    known by kind.

    The model of `parts` is on meta, and cannot be used afterwards. Raises what the engine raises, and ConfigError for what it
    refuses.
    """
    with fake_tensors(runtime.device):
        (batches,) = replace_tensors_by_fakes(parts.built, [parts.micro_batches])  # takes and returns a list of steps
        return record_steps(replace(parts, micro_batches=batches), runtime, num_repeats=num_repeats)


def record_steps(parts: StepParts, runtime: Runtime, *, warmup_steps: int = 1, num_repeats: int = 1) -> SimulatedStep:
    """Take training steps on the tensors of `parts`, real or fake, and report what one step takes. All ranks must call.

    Tests compare real steps with simulated ones by it. The first `warmup_steps` steps do not count. Of the 1 + `num_repeats`
    steps after them, the lowest peak of each phase counts: threads of real process groups free tensors late in some steps.
    """
    with recording_engine(parts, runtime) as recorded:
        return _report_lowest_peaks(parts, recorded, warmup_steps, num_repeats)


@contextmanager
def recording_engine(parts: StepParts, runtime: Runtime) -> Iterator[RecordedEngine]:
    """A context with an engine for the model of `parts`, whose memory and collectives are recorded from its creation on.

    An engine is the sharded model with its optimizer. The model in `parts.built` becomes the engine's, and cannot be used for
    another. All ranks must call.
    """
    if "deepspeed" in sys.modules:  # ZeRO-3 simulated before leaves a linear function that casts weights anew each time
        restore_torch_linear()
    recorder = StepRecorder(runtime.device)
    with _without_garbage_collection(), recorder:
        strategy = build_strategy(parts.strategy, parts.precision, runtime)
        part_by_block = _model_part_by_block(parts.built.step_module)  # before the engine shards the blocks
        engine = strategy.prepare(
            parts.built.step_module,
            source=parts.weight_source,
            make_optimizer=parts.make_optimizer,
            max_grad_norm=parts.max_grad_norm,
        )
        # From here on it is known which memory holds parameters, and which the optimizer's state.
        for kind, tensor in engine_tensors(engine):
            recorder.track(tensor, kind)
        recorded = RecordedEngine(engine, recorder, part_by_block)
        # Hooks tell the recorder which block computes; of DeepSpeed, buffers of reductions are counted.
        with recorded.block_hooks(), track_bucket_reductions(engine, recorder, parts.full_trained_elements):
            yield recorded


def _model_part_by_block(step_module: TrainStep) -> dict[nn.Module, int | str]:
    """What `StepPhase.model_part` is while a block computes: its index, or `teacher` for all blocks of the teacher."""
    part_by_block: dict[nn.Module, int | str] = dict.fromkeys(teacher_blocks(step_module), "teacher")
    part_by_block |= {block: index for index, block in enumerate(repeated_blocks(step_module))}
    return part_by_block


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A context without garbage collection: garbage counts as live until it is collected, at a time that nobody controls."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _report_lowest_peaks(
    parts: StepParts, recorded: RecordedEngine, warmup_steps: int, num_repeats: int
) -> SimulatedStep:
    """Take 1 + `num_repeats` steps after `warmup_steps`, and report what one needs: of each phase the lowest peak memory.

    Real steps differ, because threads of process groups free tensors late in some of them. Simulated steps must all have the same
    peaks; RuntimeError otherwise. Collectives and FLOPs are those of the first counted step.
    """
    for _ in range(warmup_steps):
        recorded.take_step(parts.micro_batches)
    first_step = recorded.take_step(parts.micro_batches)
    lowest = first_step
    for _ in range(num_repeats):
        # It is known now after which operation each phase peaks: there, bytes are also told apart by kind.
        repeated = recorded.take_step(parts.micro_batches, lowest.peak_operations())
        if recorded.runtime.simulated:
            _check_same_peaks(lowest.peaks, repeated.peaks)
        for phase, peak in repeated.peaks.items():
            peak.total_bytes = min(peak.total_bytes, lowest.peaks[phase].total_bytes)
        lowest = repeated
    return recorded.step_result(RecordedStep(lowest.peaks, first_step.record))


def _check_same_peaks(peaks: dict[StepPhase, PhasePeak], repeated_peaks: dict[StepPhase, PhasePeak]) -> None:
    """Raise RuntimeError, which names the phases, if two simulated steps of one run hold different amounts of memory."""
    differing = [str(phase) for phase, peak in peaks.items() if peak.total_bytes != repeated_peaks[phase].total_bytes]
    if differing:
        raise RuntimeError(f"two steps of one run hold different amounts of memory: {', '.join(differing)}")


class RecordedEngine:
    """An engine with the calls of the training loop, which reports each phase of a step to a recorder."""

    def __init__(self, engine: Any, recorder: StepRecorder, part_by_block: dict[nn.Module, int | str]) -> None:
        """Wrap an engine, simulated or real, so that the training loop can take steps with it that `recorder` records."""
        self.engine = engine
        self.recorder = recorder
        self.part_by_block = part_by_block
        """What `StepPhase.model_part` is while a block computes: its index, or `teacher`."""
        self.runtime: Runtime = engine.runtime
        self.rank = engine.rank
        self.world_size = engine.world_size
        self.step_module = engine.step_module
        self._micro_batch_index = 0
        self._trainer = minimal_trainer(self)

    def take_step(
        self, batches: list[dict[str, Any]], operations_to_tally: dict[StepPhase, int] | None = None
    ) -> RecordedStep:
        """Take one step through the training loop, and return the peak memory of each of its phases and what else it did.

        `batches`: this rank's micro-batches. `operations_to_tally`: by phase, the number of the operation after which memory is
        counted by kind, since it is expected to be the highest there; None: after none.
        """
        if operations_to_tally is None:
            self.recorder.begin_step()
        else:
            self.recorder.begin_tallied_step(operations_to_tally, lambda: engine_tensors(self.engine))
        self.begin_step()
        # The step's plan counts inputs of recomputed blocks that wait on the host; None without `offload_activations`.
        host_inputs = plan_of(self.step_module).host_inputs
        if host_inputs is not None:
            host_inputs.begin_step()
        batch = build_step_batch(batches, self.recorder.device)
        self._trainer.train_step(batch)  # which calls `forward`, `backward` and `step` of this object
        if host_inputs is not None:
            self.recorder.record.host_inputs = host_inputs.peak
        del batch  # its tensors do not count between steps
        self.set_phase("between")
        self.recorder.note_live_bytes()
        return RecordedStep(self.recorder.peak_by_phase, self.recorder.record)

    def step_result(self, step: RecordedStep) -> SimulatedStep:
        """Complete a recorded step by the memory that stays allocated after it. Call it before the next step begins.

        On the device that memory is counted by kind; on the host, only the engine's tensors are counted.
        """
        host_bytes_by_storage = {}  # several tensors may share a storage
        resting_bytes_by_kind = self.recorder.tally_bytes_by_kind()
        for _, tensor in engine_tensors(self.engine):
            if tensor.device != self.recorder.device:
                storage = tensor.untyped_storage()
                host_bytes_by_storage[storage_key(storage)] = storage.nbytes()
        record = step.record
        return SimulatedStep(
            peak_by_phase=step.peaks,
            resting_bytes_by_kind=resting_bytes_by_kind,
            collectives=record.collectives,
            host_reads=record.host_reads,
            flops=record.flops,
            moved_bytes_by_phase=record.moved_bytes_by_phase,
            bytes_to_host=record.bytes_to_host,
            bytes_to_device=record.bytes_to_device,
            host_bytes=sum(host_bytes_by_storage.values()),
            host_inputs=record.host_inputs,
        )

    def begin_step(self) -> None:
        """Report to the recorder that the first micro-batch of a step begins."""
        self._micro_batch_index = 0
        self.set_phase("forward", "before")

    def set_phase(self, phase: str, model_part: int | str = "before") -> None:
        """Tell the recorder which part of a step computes from now on, so that it counts live bytes under this phase.

        `phase`: `forward`, `backward`, `update`, or `between` steps. `model_part`: the index of a block, `before` the blocks,
        `teacher`, `head` or `after`. Also sets the kind of memory that new tensors count as: outputs of the head are logits, all
        else in a step activations.
        """
        self.recorder.phase = StepPhase(phase, self._micro_batch_index, model_part)
        if phase == "between":
            self.recorder.kind_of_new_tensors = MemoryKind.other
        elif model_part == "head" and phase == "forward":
            self.recorder.kind_of_new_tensors = MemoryKind.logits
        else:
            self.recorder.kind_of_new_tensors = MemoryKind.activations

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        self.set_phase("forward")
        self.recorder.sum_of_squared_lengths = _squared_lengths(batch)
        return self.engine.forward(batch, last=last)

    @contextmanager
    def inference(self, weights: InferenceWeights = InferenceWeights.averaged) -> Iterator[nn.Module]:
        """A pass without gradients before the step's own: counted with the first forward pass."""
        self.set_phase("forward")
        with self.engine.inference(weights) as module:
            yield module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.set_phase("backward")
        self.engine.backward(loss, last=last)
        self._micro_batch_index += 1

    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        self._micro_batch_index -= 1  # the update belongs to the last micro-batch
        self.set_phase("update")
        return self.engine.step(lr_factor, update_filter)

    @contextmanager
    def block_hooks(self) -> Iterator[None]:
        """A context in which the recorder is told which block of the model, or its head, computes at any moment.

        Hooks on the modules do that. They keep no tensor alive, which would change the memory that is measured.
        """
        with ExitStack() as stack:
            for block, model_part in self.part_by_block.items():
                self._register_phase_hooks(stack, block, model_part)
            model = self.step_module.model
            if hasattr(model, "get_base_model"):  # peft's wrapper
                model = model.get_base_model()
            head = model.get_output_embeddings()
            if head is not None:
                self._register_phase_hooks(stack, head, "head")
            yield

    def _register_phase_hooks(self, stack: ExitStack, module: nn.Module, model_part: int | str) -> None:
        """Register hooks on a block or the head that tell the recorder when it computes, in forward and backward passes.

        `stack` removes them when it closes. `model_part`: the block's index, `teacher` for the teacher's blocks, or `head`.
        """

        def current_phase() -> str:
            return self.recorder.phase.name

        def before_forward(*_: Any) -> None:
            self.set_phase(current_phase(), model_part)

        def after_forward(_module: nn.Module, _args: Any, output: Any) -> None:
            if current_phase() != "forward":  # recomputation within a backward pass, which goes on with this block
                return
            self.set_phase("forward", "after" if model_part == "head" else model_part)
            for tensor in _tensors_in(output):
                if tensor.requires_grad:
                    # The gradient of its output comes when the module's backward pass begins.
                    tensor.register_hook(lambda _grad: self.set_phase("backward", model_part))
                    break

        stack.callback(module.register_forward_pre_hook(before_forward, prepend=True).remove)
        stack.callback(module.register_forward_hook(after_forward).remove)


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in the output of a module: itself, or those in nested tuples and lists."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for element in output:
            yield from _tensors_in(element)


def _squared_lengths(batch: dict[str, Any]) -> int:
    """Sum the squared lengths of a micro-batch's documents, to which the FLOPs of attention are proportional.

    Rows with padding count with their whole width: attention computes it.
    """
    # Borders of the documents in a row without padding, such as [0, 120, 300].
    bounds = batch.get("document_bounds")
    if bounds is None:
        rows, width = batch["input_ids"].shape
        return rows * width * width
    return sum((stop - start) ** 2 for start, stop in pairwise(bounds))
