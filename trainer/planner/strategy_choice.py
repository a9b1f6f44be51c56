"""`strategy=auto`: the fastest strategy that fits, chosen once and written into the run's configuration file.

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
from typing import Any, NamedTuple

import torch

from strategies.base import ActivationCheckpointing, AutoConfig, Precision, StrategyConfig
from strategies.errors import DoesNotFit, OutOfMemory
from strategies.hardware import gpu_of_device
from strategies.registry import common_settings
from strategies.runtime import Runtime, broadcast_object, gather_objects
from trainer.build.inputs import RunInputs
from trainer.config.parallel import dp_size_of
from trainer.config.run import AUTO, STRATEGY_KEY, RunConfig, requested_micro_batch
from trainer.config.sharding import sharding_problems
from trainer.config.validate import runnable_strategies
from trainer.data.prepare import PreparedData
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import TIMEOUT_SHARE, NotSimulated, single_step_config
from trainer.planner.hardware import GIB, Card, find_card
from trainer.planner.lengths import lengths_of_data
from trainer.planner.micro_batch import (
    needed_device_gib,
    recomputation_modes,
    runtime_of_first_rank,
    simulate_cost_model_in_process,
)
from trainer.planner.oom_probe import (
    PROBE_STEPS,
    ProbeDescription,
    available_device_gib,
    probe_runs_out_of_memory,
)
from trainer.planner.plan import PlannedChoice, PlannedJob, candidate_micro_batches, plan_choices
from trainer.planner.rank_devices import RankCounts
from trainer.planner.variants import RunVariant
from trainer.reporting.resolution import OutOfMemoryTrial, ResolvedSetting

LEAST_SHARDED_FIRST = ("single", "ddp", "zero1", "zero2", "hsdp", "fsdp2", "zero3")
"""Strategies from the one that shards nothing to the one that shards most. What is sharded must be exchanged."""
PARALLEL_SIMULATIONS = 4
"""Most processes that simulate side by side; each takes about 1 GiB of the host."""


@dataclass(frozen=True, slots=True)
class RankDevices:
    """The devices of a run's ranks."""

    world_size: int
    ranks_per_host: int
    kind: str
    """`cuda` or `cpu`."""
    memory_gib: float
    """Memory of the smallest device."""
    card: Card | None
    """The GPU's rates; None on CPUs, and for GPUs that are of several kinds or not in `conf/hardware/`."""

    @property
    def rank_counts(self) -> RankCounts:
        """How many ranks there are, and how many on each host."""
        return RankCounts(self.world_size, self.ranks_per_host)


@dataclass(frozen=True, slots=True)
class StrategyProposal:
    """A strategy to be tried, and the reason why it is the next."""

    strategy: StrategyConfig
    reason: str

    @property
    def name(self) -> str:
        """The strategy's name on the command line."""
        return str(self.strategy.name)


def resolve_strategy(
    config: RunConfig, inputs: RunInputs, announce: Callable[[str], None], write_config: Callable[[RunConfig], None]
) -> RunConfig:
    """Resolve `strategy=auto`: choose the fastest strategy that fits in memory. All ranks must call.

    - The user's own strategy stays.
    - An earlier start's choice stays, if it is possible for this number of ranks.
    - Else rank 0 plans the strategies, and all ranks try them by real steps in its order, until memory does not run out.
      `write_config` writes the choice to the run directory, so that a later start takes the same one.

    `announce` prints a line for the user. All ranks follow rank 0, which may have read an earlier start's choice. Raises
    DoesNotFit on every rank if no strategy fits; OutOfMemory if some ranks run out and others do not, after which a new start
    may take the next strategy.
    """
    runtime = inputs.runtime
    values_of_rank = (config.strategy, config.resolution(STRATEGY_KEY), _batch_for_ranks(config, runtime.world_size))
    strategy, earlier_resolution, batch = broadcast_object(values_of_rank, runtime)
    config = replace(_with_strategy(config, strategy, earlier_resolution), batch=batch)
    if not isinstance(strategy, AutoConfig):
        is_earlier_choice = earlier_resolution is not None and (
            (earlier_resolution.asked, earlier_resolution.chosen) == (AUTO, strategy.name)
        )
        is_possible = not list(sharding_problems(config, runtime.world_size))
        if not is_earlier_choice or is_possible:
            return config
        # An earlier start chose it for another number of ranks: choose again.
        config = _with_strategy(config, AutoConfig(**common_settings(strategy)), None)

    # Rank 0 plans the strategies.
    devices = gather_rank_devices(runtime)
    failed_trials = [] if earlier_resolution is None else list(earlier_resolution.tried)
    proposals_in_order: Iterator[StrategyProposal] = iter(())
    if runtime.is_main:
        simulating_note = ": simulating steps" if devices.world_size > 1 else ""
        announce(f"choosing the strategy (strategy=auto){simulating_note}")
        timeout_s = TIMEOUT_SHARE * runtime.timeout_s
        proposals_in_order = propose_strategies(config, inputs.data, inputs.precision, devices, timeout_s)

    # Try one after the other by real steps, until one does not run out of memory. A single rank needs no trial.
    while True:
        ran_out = [trial.choice for trial in failed_trials]
        # Rank 0 alone has proposals. The others learn each one from it, so that all ranks try the same.
        proposal = next((proposal for proposal in proposals_in_order if proposal.name not in ran_out), None)
        proposal = broadcast_object(proposal, runtime)
        if proposal is None:
            raise DoesNotFit(
                f"strategy=auto: a step runs out of memory under every strategy that can run this ({', '.join(ran_out)}); "
                "lower batch.micro or data.max_length, recompute (strategy.activation_checkpointing=full), take more GPUs "
                "or tuning=lora; `shardtune plan` compares them"
            )
        if devices.world_size == 1 or not _runs_out_of_memory(config, proposal, inputs):
            break
        announce(f"strategy={proposal.name} runs out of memory; trying the next")
        failed_trials.append(OutOfMemoryTrial(proposal.name))
    reason = proposal.reason
    if devices.world_size > 1:
        reason += f"; {PROBE_STEPS} steps of the longest documents held"
    resolution = ResolvedSetting(STRATEGY_KEY, AUTO, proposal.name, reason, tuple(failed_trials))
    resolved_config = _with_strategy(config, proposal.strategy, resolution)
    write_config(resolved_config)
    return resolved_config


def with_proposed_strategy(config: RunConfig, prepared: PreparedData) -> RunConfig:
    """Give a configuration with `strategy=auto` the strategy that would be tried first on devices like those of this host.

    For commands that show a run before it starts, when there are no ranks yet: steps are simulated, and no real step is taken.

    - A configuration that names a strategy is returned as it is.
    - For several GPUs, on a host without any, it gets FSDP2 (or else the first strategy that can run it), with a note that the
      real choice is made on the host with the GPUs.
    - Else it gets the first proposal of `propose_strategies`, with its reason.
    """
    if not isinstance(config.strategy, AutoConfig):
        return config
    device_kind = str(config.run.device)
    runtime = runtime_of_first_rank(config)  # as it would be; no process group is formed
    world_size = runtime.world_size
    if device_kind == "cuda" and not torch.cuda.is_available() and world_size > 1:
        return _with_placeholder_strategy(config, world_size)
    devices = RankDevices(
        world_size=world_size,
        ranks_per_host=runtime.local_world_size,
        kind=device_kind,
        memory_gib=available_device_gib(runtime),
        card=_known_card(gpu_name(runtime)),
    )
    timeout_s = TIMEOUT_SHARE * config.run.timeout_s
    # A run would go on to the next proposal if two real steps ran out of memory.
    first = next(propose_strategies(config, prepared, config.precision, devices, timeout_s))
    reason = first.reason
    if world_size > 1:  # a single rank needs no trial
        reason += f"; {PROBE_STEPS} steps of the longest documents will be tried"
    return _with_strategy(config, first.strategy, ResolvedSetting(STRATEGY_KEY, AUTO, first.name, reason))


def _with_placeholder_strategy(config: RunConfig, world_size: int) -> RunConfig:
    """Give a configuration with `strategy=auto` a strategy to show on a host without the GPUs, where none can be chosen.

    It is FSDP2, or else the first strategy that can run it, with a note that the choice is made on the host with the GPUs.
    """
    runnable = runnable_strategies(config, world_size).strategies  # never empty: the settings were validated
    strategy_by_name = {str(strategy.name): strategy for strategy in runnable}
    placeholder = strategy_by_name.get("fsdp2") or runnable[0]
    note = f"{AUTO} -> the fastest that fits, on the host with the GPUs; the figures here are for {placeholder.name}"
    return _with_strategy(config, placeholder, note)


def _batch_for_ranks(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The batch settings for this start: an earlier start's choice of `batch.micro` is dropped if it is not possible any more.

    With another number of ranks (`world_size`), it may not divide the samples of a data-parallel rank. `micro` is `auto`
    again then, and is chosen anew after the strategy. What the user has set stays. {"global": 64, "micro": "auto"}, say.
    """
    batch = config.batch
    is_earlier_choice = batch["micro"] != AUTO and requested_micro_batch(batch, config.substitutions) == AUTO
    if not is_earlier_choice:
        return batch
    is_divisor = (batch["global"] // dp_size_of(config, world_size)) % batch["micro"] == 0
    return batch if is_divisor else {**batch, "micro": AUTO}


def _with_strategy(config: RunConfig, strategy: StrategyConfig, note: ResolvedSetting | str | None) -> RunConfig:
    """Set the strategy of a run, and record why it is not what the user gave (`note`); None removes an earlier reason.

    `note`: a `ResolvedSetting` is a choice that a later start takes again; a text is a placeholder for one that is made
    elsewhere.
    """
    # By setting: what was set in place of what the user gave, and why.
    substitutions = dict(config.substitutions)
    substitutions.pop(STRATEGY_KEY, None)
    if note:
        substitutions[STRATEGY_KEY] = note
    return replace(config, strategy=strategy, substitutions=substitutions)


def gpu_name(runtime: Runtime) -> str | None:
    """The driver's name of this rank's GPU, such as `NVIDIA A100-SXM4-80GB`; None for a CPU."""
    gpu = gpu_of_device(runtime.device)
    return None if gpu is None else gpu.name


def gather_rank_devices(runtime: Runtime) -> RankDevices:
    """Learn what devices the ranks of a job have, for a plan: the memory of the smallest, and the GPU if all are alike.

    All ranks must call.
    """
    memory_and_name_by_rank = gather_objects((available_device_gib(runtime), gpu_name(runtime)), runtime)
    names = {name for _, name in memory_and_name_by_rank}
    card = _known_card(names.pop()) if len(names) == 1 else None
    least_gib = min(memory for memory, _ in memory_and_name_by_rank)
    return RankDevices(runtime.world_size, runtime.local_world_size, runtime.kind, least_gib, card)


def _known_card(name: str | None) -> Card | None:
    """The rates of a GPU by its driver's name; None for a CPU (None), and for a GPU that is not in `conf/hardware/`."""
    return None if name is None else find_card(name)


def _runs_out_of_memory(config: RunConfig, proposal: StrategyProposal, inputs: RunInputs) -> bool:
    """Try a proposed strategy by two real steps; returns whether they run out of memory on all ranks. All ranks must call.

    If `batch.micro` is `auto` too, which is resolved after the strategy, a micro-batch of one document is taken. Raises
    OutOfMemory, which names the strategy, if some ranks run out and others do not.
    """
    micro_batch = 1 if config.batch["micro"] == AUTO else config.batch["micro"]
    trial_config = replace(
        _with_strategy(config, proposal.strategy, note=None), batch={**config.batch, "micro": micro_batch}
    )
    remedy = "launcher.retry={out_of_memory: 3} would start with the next; or name a strategy that shards more"
    trial = ProbeDescription(STRATEGY_KEY, f"strategy={proposal.name}", remedy)
    try:
        return probe_runs_out_of_memory(trial_config, inputs, trial)
    except DoesNotFit as error:
        # Ranks disagree, so the job must end; a new start may try the next strategy.
        raise OutOfMemory(str(error), ran_out_with={STRATEGY_KEY: proposal.name}) from error


def propose_strategies(
    config: RunConfig, prepared: PreparedData, precision: Precision, devices: RankDevices, timeout_s: float
) -> Iterator[StrategyProposal]:
    """Yield the strategies that can run this configuration in the order in which they are to be tried, each with the reason.

    The caller takes the next one if a step runs out of memory.

    - One rank, or a single strategy that can run it: without a simulation.
    - A GPU of known speed: all are simulated at once and ordered by speed.
    - Other devices: each is simulated only when the caller asks for the next one, the one that shards least first.

    `timeout_s`: how long one simulation may take.
    """
    runnable = runnable_strategies(config, devices.world_size).strategies
    strategy_by_name = {str(strategy.name): strategy for strategy in runnable}
    least_sharded_first = [strategy_by_name[name] for name in LEAST_SHARDED_FIRST if name in strategy_by_name]
    if devices.world_size == 1 or len(least_sharded_first) == 1:
        reason = "one rank has nothing to share" if devices.world_size == 1 else "the only one that can run this"
        yield from (StrategyProposal(strategy, reason) for strategy in least_sharded_first)
        return
    planner = Planner(config, prepared, precision, devices, timeout_s)
    if planner.is_speed_known:
        yield from planner.strategies_by_speed(least_sharded_first)
    else:
        yield from planner.strategies_by_sharding(least_sharded_first)


class StrategyCost(NamedTuple):
    """A strategy, and what its step costs with the best micro-batch."""

    strategy: StrategyConfig
    best_choice: PlannedChoice
    """The memory and speed of the best micro-batch."""


class SimulatedStrategies(NamedTuple):
    """Strategies by what a simulation says of them; one that was simulated with several modes of recomputation comes as often."""

    fitting: list[StrategyCost]
    """Strategies whose step fits in memory."""
    too_large: list[StrategyCost]
    """Strategies whose step does not fit."""
    not_simulated: list[StrategyProposal]
    """Strategies that cannot be simulated, with the reason."""


class Planner:
    """Plans strategies on the devices of a run: whether a step fits in memory under each, and how fast it is."""

    def __init__(
        self, config: RunConfig, prepared: PreparedData, precision: Precision, devices: RankDevices, timeout_s: float
    ) -> None:
        """Prepare to plan; simulates nothing yet. `devices`: of the ranks. `timeout_s`: how long one simulation may take."""
        self.config = config
        self.devices = devices
        self.precision = precision
        self.timeout_s = timeout_s
        self.lengths = lengths_of_data(config, prepared.train)
        self.recomputation_modes = recomputation_modes(config.strategy.activation_checkpointing)
        self.user_micro_batch: int | None = None if config.batch["micro"] == AUTO else config.batch["micro"]
        """The micro-batch that the user set; None for `batch.micro=auto`."""

    @property
    def is_speed_known(self) -> bool:
        """Whether the speed of the device is known, so that seconds of a step can be estimated."""
        card = self.devices.card
        return card is not None and card.tflops(self.precision) > 0

    def strategies_by_sharding(self, strategies: list[StrategyConfig]) -> Iterator[StrategyProposal]:
        """Yield strategies to try on a device of unknown speed, each with the reason; `strategies`: the least sharded first.

        First those that fit according to a simulation, in the order given; then those that cannot be simulated; last, of those
        that do not fit, the one that needs least memory. Each is simulated with every mode of recomputation that is open, without
        recomputation first.
        """
        available_gib = self.devices.memory_gib
        # By name, because a strategy that fails with several modes is proposed once.
        not_simulated_by_name: dict[str, StrategyProposal] = {}
        too_large: list[tuple[float, StrategyConfig]] = []
        for mode in self.recomputation_modes:
            for strategy in strategies:
                cost_model = self.simulate_cost_model(strategy, mode)
                if isinstance(cost_model, NotSimulated):
                    proposal = StrategyProposal(strategy, f"not planned: {cost_model.reason}")
                    not_simulated_by_name[str(strategy.name)] = proposal
                    continue
                # `batch.micro=auto` is resolved after the strategy: here with one document.
                planned_gib = needed_device_gib(cost_model, self.user_micro_batch or 1, self.lengths, available_gib)
                if planned_gib > available_gib:
                    too_large.append((planned_gib, strategy))
                    continue
                # The reason does not name the mode: the run itself chooses what to recompute when it starts.
                memory = f"planned {planned_gib:.2f} of {available_gib:.2f} GiB"
                yield StrategyProposal(
                    strategy, f"{memory}; this device's rates are not known: of what fits it shards least"
                )
        yield from not_simulated_by_name.values()
        if too_large:
            planned_gib, strategy = min(too_large, key=lambda gib_and_strategy: gib_and_strategy[0])
            yield StrategyProposal(strategy, f"planned {planned_gib:.2f} of {available_gib:.2f} GiB, the least of all")

    def strategies_by_speed(self, strategies: list[StrategyConfig]) -> Iterator[StrategyProposal]:
        """Yield strategies to try on a GPU of known speed, each with the reason. The caller takes the next if memory runs out.

        First those that fit according to a simulation, the fastest first; then those that cannot be simulated; last, of those
        that do not fit, the one that lacks least memory.
        """
        assert self.devices.card is not None
        simulated = self._simulate_all(strategies)
        for strategy, choice in sorted(simulated.fitting, key=lambda fitting: -fitting.best_choice.tokens_per_s):
            speed = f"{choice.tokens_per_s:,.0f} tokens/s on {self.devices.card.name}"
            # A strategy is only asked for after all faster ones ran out of memory.
            yield StrategyProposal(
                strategy, f"planned {_gib_text(choice)} GiB and {speed}: the fastest of what fits and was not tried"
            )
        yield from simulated.not_simulated
        if simulated.too_large:
            strategy, choice = max(
                simulated.too_large, key=lambda too_large: too_large.best_choice.memory_fit.margin_bytes
            )
            yield StrategyProposal(strategy, f"planned {_gib_text(choice)} GiB, the least of all")

    def _simulate_all(self, strategies: list[StrategyConfig]) -> SimulatedStrategies:
        """Simulate every strategy with every mode of recomputation that is open, several at a time, and sort them by what fits.

        Needs the rates of the GPU.
        """
        # Each thread only waits for the process that simulates.
        combinations = [(strategy, mode) for strategy in strategies for mode in self.recomputation_modes]
        threads = min(PARALLEL_SIMULATIONS, len(combinations), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as pool:
            cost_models = list(pool.map(self.simulate_cost_model, *zip(*combinations, strict=True)))

        simulated = SimulatedStrategies(fitting=[], too_large=[], not_simulated=[])
        for (strategy, mode), cost_model in zip(combinations, cost_models, strict=True):
            if isinstance(cost_model, NotSimulated):
                simulated.not_simulated.append(StrategyProposal(strategy, f"not planned: {cost_model.reason}"))
                continue
            choice = self._best_choice(strategy, mode, cost_model)
            group = simulated.fitting if choice.fits else simulated.too_large
            group.append(StrategyCost(strategy, choice))
        return simulated

    def simulate_cost_model(self, strategy: StrategyConfig, mode: ActivationCheckpointing) -> CostModel | NotSimulated:
        """Simulate a step under a strategy in a process of its own: its memory and work at any micro-batch, or why that failed.

        `mode`: what blocks recompute, if the run leaves that open (`activation_checkpointing=auto`).
        """
        # The cost model holds for every micro-batch, whichever is configured: one document must do, since `auto` is no number.
        devices = self.devices
        config = replace(self.config, strategy=strategy, batch={**self.config.batch, "micro": 1}, substitutions={})
        step_config = single_step_config(config, devices.world_size, mode_if_auto=mode)
        step_config = replace(step_config, precision=self.precision)
        return simulate_cost_model_in_process(
            step_config, self.lengths, devices.rank_counts, devices.kind, self.timeout_s
        )

    def _best_choice(
        self, strategy: StrategyConfig, mode: ActivationCheckpointing, cost_model: CostModel
    ) -> PlannedChoice:
        """Plan a step under this strategy and mode of recomputation with its best micro-batch: its memory and speed.

        That is the configured one; for `batch.micro=auto` the fastest that fits, or the smallest if none fits. `cost_model`: the
        step's memory and work at any micro-batch.
        """
        assert self.devices.card is not None
        # What the planner of `shardtune plan` needs to know of the run.
        job = PlannedJob(
            card=replace(self.devices.card, memory_gib=self.devices.memory_gib),
            precision=self.precision,
            num_nodes=self.devices.world_size // self.devices.ranks_per_host,
            ranks_per_node=self.devices.ranks_per_host,
            global_batch=self.config.batch["global"],
            document_lengths=self.lengths,
        )
        variant_config = replace(self.config, strategy=replace(strategy, activation_checkpointing=mode))
        variant = RunVariant(variant_config, overrides=())  # there is no command line to add to
        candidates = candidate_micro_batches(job, self.user_micro_batch, self.config.parallel.sequence)
        if cost_model.needs_single_rows:  # it computes correctly only if a batch has one row
            candidates = [1]
        best, *_ = plan_choices(variant, cost_model, job, candidates)
        return best


def _gib_text(choice: PlannedChoice) -> str:
    """Memory that a rank needs, and that its device has, such as `12.30 of 79.10`."""
    return f"{choice.memory_fit.needed_bytes / GIB:.2f} of {choice.memory_fit.device_bytes / GIB:.2f}"
