"""`strategy=auto`: the fastest strategy that fits, chosen once and frozen into the configuration.

If the ranks' GPU is in `conf/hardware/`, all strategies are planned on it as by `shardtune plan`, and tried in order
of speed. The rates of other devices are unknown: there the strategy that shards least is taken of those that fit,
because what is sharded must be exchanged. Two real steps of the longest documents, on all ranks, decide. If memory
runs out, the next strategy is tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, AutoConfig, Precision, StrategyConfig
from strategies.errors import DoesNotFit, OutOfMemory
from strategies.hardware import gpu_of
from strategies.registry import common_settings
from strategies.runtime import Runtime, broadcast_object, gather_objects
from trainer.config.run import AUTO, STRATEGY, RunConfig, asked_micro
from trainer.config.sharding import problems as sharding_problems
from trainer.config.validate import candidates
from trainer.data.prepare import Prepared
from trainer.objectives.registry import reading_of
from trainer.planner.cost_model import Form
from trainer.planner.fit_check import PATIENCE, answered_apart, one_step
from trainer.planner.hardware import GIB, Card, card_named
from trainer.planner.lengths import Lengths, drawn
from trainer.planner.micro_batch import needed_gib, simulated_form
from trainer.planner.oom_probe import STEPS, Trial, TrialInputs, memory_gib, runs_out
from trainer.planner.plan import Choice, PlannedRun, Way, choices, micro_batches
from trainer.reporting.resolution import OutOfMemoryTrial, Resolution

LEAST_FIRST = ("single", "ddp", "zero1", "zero2", "hsdp", "fsdp2", "zero3")
"""From what shards nothing to what shards most."""
AT_ONCE = 4
"""Most processes that simulate side by side; each takes about 1 GiB of the host."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What the ranks of a run have."""

    world: int
    local: int
    """Ranks of a host."""
    kind: str
    memory_gib: float
    """Of the rank that has least."""
    card: Card | None
    """What is known of it; None where that is nothing, and on CPUs."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A strategy to be tried, and why it is the next."""

    strategy: StrategyConfig
    why: str

    @property
    def name(self) -> str:
        """As it is typed."""
        return str(self.strategy.name)


def settle_strategy(
    config: RunConfig, given: TrialInputs, say: Callable[[str], None], freeze: Callable[[RunConfig], None]
) -> RunConfig:
    """The run with its strategy: that of the configuration, or the one that is chosen here and handed to `freeze`.

    All ranks must call; they follow rank 0, which may have read what was chosen before. Raises DoesNotFit on every rank where
    none holds; OutOfMemory where some ranks alone run out, after which a new start may take the next.
    """
    runtime = given.runtime
    batch = _batch_for_ranks(config, runtime.world_size)
    strategy, earlier, batch = broadcast_object((config.strategy, config.resolution(STRATEGY), batch), runtime)
    config = replace(_with(config, strategy, earlier), batch=batch)
    if not isinstance(strategy, AutoConfig):
        was_open = earlier is not None and (earlier.asked, earlier.chosen) == (AUTO, strategy.name)
        if not (was_open and list(sharding_problems(config, runtime.world_size))):
            return config
        config = _with(config, AutoConfig(**common_settings(strategy)), None)  # it is not for so many ranks
    devices = devices_of(runtime)
    tried = [] if earlier is None else list(earlier.tried)
    order: Iterator[Proposal] = iter(())
    if runtime.is_main:
        say("choosing the strategy (strategy=auto)" + (": simulating steps" if devices.world > 1 else ""))
        order = proposals(config, given.data, given.precision, devices, PATIENCE * runtime.timeout_s)
    while True:
        ran_out = [trial.choice for trial in tried]
        proposal = next((proposal for proposal in order if proposal.name not in ran_out), None)
        proposal = broadcast_object(proposal, runtime)
        if proposal is None:
            raise DoesNotFit(
                f"strategy=auto: a step runs out of memory under every strategy that can run this ({', '.join(ran_out)}); "
                "lower batch.micro or data.max_length, recompute (strategy.activation_checkpointing=full), take more GPUs "
                "or tuning=lora; `shardtune plan` compares them"
            )
        if devices.world == 1 or not _runs_out(config, proposal, given):
            break
        say(f"strategy={proposal.name} runs out of memory; trying the next")
        tried.append(OutOfMemoryTrial(proposal.name))
    trials = "" if devices.world == 1 else f"; {STEPS} steps of the longest documents held"
    resolution = Resolution(STRATEGY, AUTO, proposal.name, f"{proposal.why}{trials}", tuple(tried))
    settled = _with(config, proposal.strategy, resolution)
    freeze(settled)
    return settled


def would_choose_strategy(config: RunConfig, data: Prepared) -> RunConfig:
    """The run with the strategy that it would try first on devices like those of this host; for a run without ranks yet."""
    if not isinstance(config.strategy, AutoConfig):
        return config
    kind, local = str(config.run.device), config.launcher.per_node
    world = local * config.launcher.nodes
    if kind == "cuda" and not torch.cuda.is_available() and world > 1:
        legal = {str(each.name): each for each in candidates(config, world)[0]}
        stands = legal.get("fsdp2") or next(iter(legal.values()))
        note = f"{AUTO} -> the fastest that fits, on the host with the GPUs; the figures here are for {stands.name}"
        return _with(config, stands, note)
    runtime = Runtime(0, world, 0, local, torch.device("cuda" if kind == "cuda" else "cpu"), None)
    devices = Devices(world, local, kind, memory_gib(runtime), _card(gpu_name(runtime)))
    first = next(proposals(config, data, config.precision, devices, PATIENCE * config.run.timeout_s))
    trials = "" if world == 1 else f"; {STEPS} steps of the longest documents will be tried"
    return _with(config, first.strategy, Resolution(STRATEGY, AUTO, first.name, f"{first.why}{trials}"))


def _batch_for_ranks(config: RunConfig, ranks: int) -> dict[str, Any]:
    """`batch`, with `micro` open again if the run itself chose one that is not for so many ranks.

    The steps on trial could not be cut into it. `settle_micro`, which comes after the strategy, chooses it anew.
    """
    batch = config.batch
    if batch["micro"] == AUTO or asked_micro(batch, config.substitutions) != AUTO:
        return batch
    is_divisor = (batch["global"] // ranks) % batch["micro"] == 0
    return batch if is_divisor else {**batch, "micro": AUTO}


def _with(config: RunConfig, strategy: StrategyConfig, note: Resolution | str | None) -> RunConfig:
    kept = {key: text for key, text in config.substitutions.items() if key != STRATEGY}
    return replace(config, strategy=strategy, substitutions=kept | ({STRATEGY: note} if note else {}))


def gpu_name(runtime: Runtime) -> str | None:
    """What the driver calls this rank's card; None for a CPU."""
    gpu = gpu_of(runtime.device)
    return None if gpu is None else gpu.name


def devices_of(runtime: Runtime) -> Devices:
    """The devices of all ranks, as they are for the one with least memory. All ranks must call."""
    found = gather_objects((memory_gib(runtime), gpu_name(runtime)), runtime)
    (name, *others) = {name for _, name in found}
    least = min(memory for memory, _ in found)
    return Devices(runtime.world_size, runtime.local_world_size, runtime.kind, least, None if others else _card(name))


def _card(name: str | None) -> Card | None:
    return None if name is None else card_named(name)


def _runs_out(config: RunConfig, found: Proposal, given: TrialInputs) -> bool:
    """Whether two steps run out of memory on all ranks, of one document each where `batch.micro` is open too."""
    micro = 1 if config.batch["micro"] == AUTO else config.batch["micro"]
    remedy = "launcher.retry={out_of_memory: 3} would start with the next; or name a strategy that shards more"
    trial = Trial(STRATEGY, f"strategy={found.name}", remedy)
    try:
        return runs_out(
            replace(_with(config, found.strategy, None), batch={**config.batch, "micro": micro}), given, trial
        )
    except DoesNotFit as error:
        raise OutOfMemory(str(error), ran_out_with={STRATEGY: found.name}) from error


def proposals(
    config: RunConfig, data: Prepared, precision: Precision, devices: Devices, patience_s: float
) -> Iterator[Proposal]:
    """Strategies in the order in which they are to be tried; what comes later is simulated when it is asked for, if it can be."""
    legal = {str(each.name): each for each in candidates(config, devices.world)[0]}
    in_order = [legal[name] for name in LEAST_FIRST if name in legal]
    if devices.world == 1 or len(in_order) == 1:
        alone = "one rank has nothing to share" if devices.world == 1 else "the only one that can run this"
        yield from (Proposal(each, alone) for each in in_order)
        return
    planner = Planner(config, data, precision, devices, patience_s)
    yield from (planner.fastest if planner.rates_known else planner.least_sharded)(in_order)


class Planner:
    """Plans strategies on the devices of a run."""

    def __init__(
        self, config: RunConfig, data: Prepared, precision: Precision, devices: Devices, patience_s: float
    ) -> None:
        self.config, self.devices, self.precision, self.patience_s = config, devices, precision, patience_s
        per = reading_of(config.objective).sequences_per_document
        self.lengths: Lengths = drawn(config, data.train, per).lengths(config.data, per)
        asked = config.strategy.activation_checkpointing
        auto = asked is ActivationCheckpointing.auto
        # What may be recomputed as memory allows is, where nothing fits without.
        self.modes = (ActivationCheckpointing.none, ActivationCheckpointing.full) if auto else (asked,)
        self.micro: int | None = None if config.batch["micro"] == AUTO else config.batch["micro"]

    @property
    def rates_known(self) -> bool:
        """Whether seconds can be reckoned."""
        card = self.devices.card
        return card is not None and card.tflops(self.precision) > 0

    def least_sharded(self, strategies: list[StrategyConfig]) -> Iterator[Proposal]:
        """Those that fit, as they are ordered; then those that cannot be planned; then the one that needs least."""
        memory, unplanned = self.devices.memory_gib, {}
        tight: list[tuple[float, StrategyConfig]] = []
        for mode in self.modes:
            for strategy in strategies:
                form = self.form(strategy, mode)
                if isinstance(form, str):
                    unplanned[str(strategy.name)] = Proposal(strategy, f"not planned: {form}")
                    continue
                needed = needed_gib(form, self.micro or 1, self.lengths, memory)
                if needed > memory:
                    tight.append((needed, strategy))
                    continue
                rates = "this device's rates are not known"
                yield Proposal(
                    strategy, f"planned {needed:.2f} of {memory:.2f} GiB; {rates}: of what fits it shards least"
                )
        yield from unplanned.values()
        if tight:
            needed, strategy = min(tight, key=lambda one: one[0])
            yield Proposal(strategy, f"planned {needed:.2f} of {memory:.2f} GiB, the least of all")

    def fastest(self, strategies: list[StrategyConfig]) -> Iterator[Proposal]:
        """Those that fit, the fastest first; then those that cannot be planned; then the one that needs least."""
        asked = [(strategy, mode) for strategy in strategies for mode in self.modes]
        at_once = min(AT_ONCE, len(asked), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(at_once) as pool:  # of threads that wait for processes
            forms = list(pool.map(lambda one: self.form(*one), asked))
        planned = [(s, self._best(s, m, f)) for (s, m), f in zip(asked, forms, strict=True) if not isinstance(f, str)]
        fitting = sorted((one for one in planned if one[1].fits), key=lambda one: -one[1].tokens_per_s)
        assert self.devices.card is not None
        of = f"{self.devices.card.name}: the fastest of what fits and was not tried"
        for strategy, choice in fitting:
            yield Proposal(strategy, f"planned {_gib(choice)} GiB and {choice.tokens_per_s:,.0f} tokens/s on {of}")
        for (strategy, _), form in zip(asked, forms, strict=True):
            if isinstance(form, str):
                yield Proposal(strategy, f"not planned: {form}")
        if tight := [one for one in planned if not one[1].fits]:
            strategy, choice = max(tight, key=lambda one: one[1].fit.margin)
            yield Proposal(strategy, f"planned {_gib(choice)} GiB, the least of all")

    def form(self, strategy: StrategyConfig, mode: ActivationCheckpointing) -> Form | str:
        """The step under a strategy, simulated by a process of its own, or why it cannot be."""
        devices = self.devices
        config = replace(self.config, strategy=strategy, batch={**self.config.batch, "micro": 1}, substitutions={})
        step = replace(one_step(config, devices.world, auto=mode), precision=self.precision)
        length = int(self.lengths.longest[0]) // self.lengths.per
        asked = (step, length, (devices.world, devices.local), devices.kind)
        found: Form | str = answered_apart(simulated_form, asked, self.patience_s)
        return found

    def _best(self, strategy: StrategyConfig, mode: ActivationCheckpointing, form: Form) -> Choice:
        """The strategy with the micro-batch that is typed, or the fastest that fits."""
        assert self.devices.card is not None
        job = PlannedRun(
            card=replace(self.devices.card, memory_gib=self.devices.memory_gib),
            precision=self.precision,
            nodes=self.devices.world // self.devices.local,
            per_node=self.devices.local,
            global_batch=self.config.batch["global"],
            lengths=self.lengths,
        )
        way = Way(replace(self.config, strategy=replace(strategy, activation_checkpointing=mode)), ())
        return choices(way, form, job, [1] if form.alone else micro_batches(job, self.micro))[0]


def _gib(choice: Choice) -> str:
    return f"{choice.fit.total / GIB:.2f} of {choice.fit.limit / GIB:.2f}"
