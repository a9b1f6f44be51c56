"""Simulates several ways to run in parallel processes, and sorts them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from strategies.errors import ConfigError
from strategies.parent_death import die_with_parent
from trainer.config.run import RunConfig
from trainer.planner.cost_model import Form
from trainer.planner.fit_check import simulable, unsimulated
from trainer.planner.plan import Choice, PlanConfig, PlannedRun, Way, choices

Tell = Callable[[int, int, str], None]
"""Told (done, all, the way that was done)."""
KILLED = "its simulation was killed; the host may lack memory, set plan.workers=1"


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """Every way with its best micro-batch, in order: those that fit, the fastest first; then those that do not."""

    job: PlannedRun
    found: list[Choice]
    """The best of each way."""
    all: list[Choice]
    """Of every way, every micro-batch."""
    refused: list[tuple[Way, str]]
    """Ways that were ruled out or could not be simulated, and why."""
    form: Form
    """Of the first in order: what is known of the model."""

    @property
    def best(self) -> Choice | None:
        """The fastest that fits."""
        return next((choice for choice in self.found if choice.fits), None)


def sweep(
    found: list[Way],
    refused: list[tuple[Way, str]],
    job: PlannedRun,
    micros: list[int],
    settings: PlanConfig,
    tell: Tell,
) -> PlanAnswer:
    """Simulate each of `found`, for all of these micro-batches. Raises ConfigError where none could be simulated.

    `refused`: ways that were ruled out before, and why.
    """
    forms = simulate_ways(found, job, 2 if job.global_batch // (job.world * micros[0]) > 1 else 1, settings, tell)
    refused = list(refused)
    made: dict[int, list[Choice]] = {}
    simulated: dict[int, Form] = {}
    for index, way in enumerate(found):
        form = forms[index]
        if isinstance(form, str):
            refused.append((way, form))
        else:
            simulated[index] = form
            made[index] = choices(way, form, job, micros, settings.theirs)
    if not made:
        alike = len({why for _, why in refused}) == 1
        raise ConfigError([refused[0][1]] if alike else [f"{' '.join(way.words)}: {why}" for way, why in refused])
    best = sorted(made, key=lambda index: _order(made[index][0]))
    every = [choice for all_of in made.values() for choice in all_of]
    return PlanAnswer(job, [made[index][0] for index in best], sorted(every, key=_order), refused, simulated[best[0]])


def _order(choice: Choice) -> tuple[bool, float]:
    return not choice.fits, -choice.tokens_per_s if choice.fits else -choice.fit.margin


def simulate_ways(
    found: list[Way], job: PlannedRun, accumulation: int, settings: PlanConfig, tell: Tell
) -> list[Form | str]:
    """The form of each way, or why it cannot be simulated."""
    length = int(job.lengths.longest[0])
    out: list[Form | str] = [""] * len(found)
    workers = settings.workers or len(os.sched_getaffinity(0))
    # Once, before there are processes that would each import all that and build each model.
    import trainer.planner.simulation  # noqa: F401
    from trainer.planner.model_blocks import blocks_of

    for way in found:
        blocks_of(way.config.model)
    gc.freeze()  # what is there is looked through by no child's collections, which are many
    # Forked, so that what takes seconds to import is there; ZeRO first, which takes longest.
    context = multiprocessing.get_context("fork")
    num = min(workers, max(1, len(found)))
    with ProcessPoolExecutor(num, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        order = sorted(range(len(found)), key=lambda i: -_cost(found[i]))
        running: dict[Future[Form | str], int] = {
            pool.submit(_simulate, found[i].config, length, accumulation, job, settings.exact): i for i in order
        }
        try:
            for done, future in enumerate(as_completed(running), 1):
                index = running[future]
                try:
                    out[index] = future.result()
                except BrokenProcessPool:  # one of its processes was killed: none of the others answers any more
                    out[index] = KILLED
                tell(done, len(found), " ".join(found[index].words))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return out


def _cost(way: Way) -> int:
    return 2 if way.name == "zero3" else int(way.name.startswith("zero"))


def _begin(parent: int) -> None:
    """In a new process: end with the parent. What libraries say while they are simulated concerns nobody."""
    import torch

    die_with_parent(parent)
    torch.set_num_threads(1)
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _simulate(config: RunConfig, length: int, accumulation: int, job: PlannedRun, exact: bool) -> Form | str:
    from trainer.planner.simulation import simulate_form

    # Left by ways before, and by what they imported: each simulation collects garbage, and need not look through it again.
    gc.collect()
    gc.freeze()
    # What gradients that wait whole would add is known without.
    config = replace(config, strategy=simulable(config.strategy), precision=job.precision)
    per = job.lengths.per
    try:
        return simulate_form(
            config,
            length // per,
            accumulation=accumulation,
            world_size=job.world,
            local_world_size=job.per_node,
            exact=exact,
        )
    except ConfigError as error:
        return error.problems[0]
    except Exception as error:  # noqa: BLE001 - whatever an architecture does that cannot be simulated is told, not raised
        return unsimulated(error)
