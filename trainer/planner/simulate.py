"""Takes the real step on tensors without memory, to find what a run would take, hold and exchange."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from strategies.base import OptimizerFactory, Precision, StepResult, StrategyConfig, UpdateFilter
from strategies.build import build_strategy
from strategies.compat.deepspeed import restore_linear
from strategies.compat.dispatch import storage_key
from strategies.runtime import Runtime
from strategies.simulation import fake_tensors
from strategies.tensor_inventory import MemoryKind, engine_tensors
from trainer.planner.buckets import bucketed
from trainer.planner.fake_tensors import faked
from trainer.planner.memory_tracker import Highest, Moment
from trainer.planner.minimal_step import bare_trainer, batch_of
from trainer.planner.step_recorder import Collective, Record, Recorder
from trainer.step import Built


class ShapesOnly:
    """A `ParameterSource` without values."""

    def run(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """As many elements as are asked for, on the host."""
        return torch.empty(stop - start, dtype=torch.bfloat16)

    def close(self) -> None:
        """There is nothing to let go of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepParts:
    """What a step is made of."""

    built: Built
    strategy: StrategyConfig
    precision: Precision
    make_optimizer: OptimizerFactory
    max_grad_norm: float
    batches: list[dict[str, Any]]
    """One rank's micro-batches of a step, on the CPU."""
    source: Any = field(default_factory=ShapesOnly)
    """A `ParameterSource`."""
    whole: int | None = None
    """Trained elements of the deeper model that this one stands for; none where it stands for itself."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """One rank's step, from the second on: the optimizer has its state."""

    moments: dict[Moment, Highest]
    """The most live bytes on the device in each moment, in order."""
    resting: dict[MemoryKind, int]
    """Bytes between steps."""
    collectives: list[Collective]
    host_reads: Counter[str]
    flops: float
    moved: Counter[str]
    """Bytes on the device that operations other than products and attention read and write, by phase."""
    to_host: int
    to_device: int
    host: int
    """Bytes that the engine keeps on the host."""

    @property
    def peak(self) -> tuple[Moment, Highest]:
        """The moment with the most live bytes."""
        return max(self.moments.items(), key=lambda item: item[1].total)


def simulate(parts: StepParts, runtime: Runtime, *, repeat: int = 1) -> Simulated:
    """Take three steps on fake tensors as the rank that `runtime` says, on its device, and report the last.

    With `repeat=0` two, and bytes are told apart by kind between steps alone. The model is on meta, and is used up. Raises
    what the engine raises, and ConfigError for what it refuses.
    """
    with fake_tensors(runtime.device):
        (batches,) = faked(parts.built, [parts.batches])
        return watch(replace(parts, batches=batches), runtime, repeat=repeat)


def watch(parts: StepParts, runtime: Runtime, *, warm: int = 1, repeat: int = 1) -> Simulated:
    """`simulate` on whatever tensors there are: real ones too. All ranks must call.

    `warm` steps go before; the least of 1 + `repeat` more counts, since real process groups let go of tensors in threads of
    their own, sometimes late.
    """
    with watching(parts, runtime) as watched:
        return _steps(parts, watched, warm, repeat)


@contextmanager
def watching(parts: StepParts, runtime: Runtime) -> Iterator[WatchedEngine]:
    """The engine of `parts`, watched from its making on; `parts.built` is used up. All ranks must call."""
    if "deepspeed" in sys.modules:  # ZeRO-3 simulated before leaves a linear function that casts weights anew each time
        restore_linear()
    recorder = Recorder(runtime.device)
    with _uncollected(), recorder:
        strategy = build_strategy(parts.strategy, parts.precision, runtime)
        blocks = parts.built.step_module.shard_units()  # sharding may give their classes other names
        engine = strategy.prepare(
            parts.built.step_module,
            source=parts.source,
            make_optimizer=parts.make_optimizer,
            max_grad_norm=parts.max_grad_norm,
        )
        for kind, tensor in engine_tensors(engine):
            recorder.see(tensor, kind)
        watched = WatchedEngine(engine, recorder, blocks)
        with watched.places(), bucketed(engine, recorder, parts.whole):
            yield watched


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: when it comes depends on what ran before, and what it frees is live until then."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _steps(parts: StepParts, watched: WatchedEngine, warm: int, repeat: int) -> Simulated:
    recorder = watched.recorder
    for _ in range(warm):
        watched.take(parts.batches)
    record = watched.take(parts.batches)
    found = recorder.highest
    for _ in range(repeat):
        watched.take(parts.batches, explain=operations(found))
        again = recorder.highest
        if watched.runtime.simulated and (differ := [m for m, h in found.items() if h.total != again[m].total]):
            raise RuntimeError(f"two steps of one run hold different amounts of memory: {', '.join(map(str, differ))}")
        for moment, highest in again.items():
            highest.total = min(highest.total, found[moment].total)
        found = again
    return watched.report(found, record)


def operations(found: dict[Moment, Highest]) -> dict[Moment, int]:
    """After which of its operations each moment was highest."""
    return {moment: highest.operation for moment, highest in found.items()}


class WatchedEngine:
    """An engine that tells a recorder what it is at."""

    def __init__(self, engine: Any, recorder: Recorder, blocks: list[nn.Module]) -> None:
        self.engine, self.recorder, self.blocks = engine, recorder, blocks
        self.runtime: Runtime = engine.runtime
        self.dp_rank, self.dp_size = engine.dp_rank, engine.dp_size
        self.step_module = engine.step_module
        self._micro = 0
        self._trainer = bare_trainer(self)

    def take(self, batches: list[dict[str, Any]], explain: dict[Moment, int] | None = None) -> Record:
        """One step of these micro-batches, with nothing else counted; `explain` names operations of moments to tally after."""
        if explain is None:
            self.recorder.begin()
        else:
            self.recorder.explain(explain, lambda: engine_tensors(self.engine))
        self.start()
        batch = batch_of(batches, self.recorder.device)
        self._trainer.train_step(batch)
        del batch
        self.at("between")
        self.recorder._note()
        return self.recorder.record

    def again(
        self, batches: list[dict[str, Any]], explain: dict[Moment, int] | None = None
    ) -> tuple[dict[Moment, Highest], Record]:
        """`take`, and what was highest in it."""
        record = self.take(batches, explain)
        return self.recorder.highest, record

    def report(self, moments: dict[Moment, Highest], record: Record) -> Simulated:
        """What a step was found to take, with what rests now that it is over."""
        resting, kept = (
            self.recorder.tally(),
            [t for _, t in engine_tensors(self.engine) if t.device != self.recorder.device],
        )
        storages = [tensor.untyped_storage() for tensor in kept]
        host = {storage_key(storage): storage.nbytes() for storage in storages}
        return Simulated(
            moments=moments,
            resting=resting,
            collectives=record.collectives,
            host_reads=record.host_reads,
            flops=record.flops,
            moved=record.moved,
            to_host=record.to_host,
            to_device=record.to_device,
            host=sum(host.values()),
        )

    def start(self) -> None:
        """A step begins."""
        self._micro = 0
        self.at("forward", "before")

    def at(self, phase: str, place: int | str = "before") -> None:
        """What is at work from now on."""
        self.recorder.moment = Moment(phase, self._micro, place)
        made = MemoryKind.logits if place == "head" and phase == "forward" else MemoryKind.activations
        self.recorder.made = MemoryKind.other if phase == "between" else made

    def forward(self, batch: dict[str, Any], *, last: bool) -> dict[str, Tensor]:
        self.at("forward")
        self.recorder.squares = _squares(batch)
        return self.engine.forward(batch, last=last)

    @contextmanager
    def inference(self, *, averaged: bool = True) -> Iterator[nn.Module]:
        """A look ahead: counted with the first forward pass."""
        self.at("forward")
        with self.engine.inference(averaged=averaged) as module:
            yield module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.at("backward")
        self.engine.backward(loss, last=last)
        self._micro += 1

    def step(self, lr_factor: float, update_filter: UpdateFilter | None = None) -> StepResult:
        self._micro -= 1
        self.at("update")
        return self.engine.step(lr_factor, update_filter)

    @contextmanager
    def places(self) -> Iterator[None]:
        """Tells blocks and head apart while entered; the hooks that do so keep nothing alive."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                self._hook(stack, block, index)
            model = self.step_module.model
            plain = model.get_base_model() if hasattr(model, "get_base_model") else model
            head = plain.get_output_embeddings()
            if head is not None:
                self._hook(stack, head, "head")
            yield

    def _hook(self, stack: ExitStack, module: nn.Module, place: int | str) -> None:
        def phase() -> str:
            return self.recorder.moment.phase

        def enter(*_: Any) -> None:
            self.at(phase(), place)

        def leave(_module: nn.Module, _given: Any, out: Any) -> None:
            if phase() != "forward":  # a block that is recomputed stays at work
                return
            self.at("forward", "after" if place == "head" else place)
            first = next((t for t in _first(out) if t.requires_grad), None)
            if first is not None:
                first.register_hook(lambda _grad: self.at("backward", place))

        for handle in (
            module.register_forward_pre_hook(enter, prepend=True),
            module.register_forward_hook(leave),
        ):
            stack.callback(handle.remove)


def _first(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for each in out:
            yield from _first(each)


def _squares(batch: dict[str, Any]) -> int:
    bounds = batch.get("document_bounds")
    if bounds is None:
        rows, width = batch["input_ids"].shape
        return rows * width * width
    return sum((stop - start) ** 2 for start, stop in pairwise(bounds))
