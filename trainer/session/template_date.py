"""The date that a chat template writes as today's, chosen at a run's first start and kept at every later one.

Otherwise data prepared on another day would differ, and a resumed run, another host or another point of a comparison
would learn something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from strategies.errors import StorageError
from strategies.rendezvous import Rendezvous
from strategies.runtime import Runtime, first_rank_error
from trainer.config.run import TEMPLATE_DATE_KEY, RunConfig, settled_template_date
from trainer.data.tokens.clock import TemplateDate
from trainer.reporting.shared_choice import agree_on_shared_choice

ReadCacheDate = Callable[[], TemplateDate]
"""Returns the date on which the data was first prepared into the cache of this host."""


def choose_template_date(
    config: RunConfig,
    run_dir: Path | None,
    rendezvous: Rendezvous,
    stop: Callable[[], bool],
    read_cache_date: ReadCacheDate,
) -> TemplateDate:
    """Choose the date that chat templates write as today's, the same on every rank and at every start of the run.

    Called while data is prepared, before there is a process group, so all ranks must call. Rank 0 chooses, and the others wait,
    until `stop` says that the ranks stop (Preempted). `read_cache_date`: gives the day on which data was first prepared into the
    cache. Errors: StorageError.
    """

    def choose_on_rank_0() -> str:
        return _date_by_history(settled_template_date(config), run_dir, read_cache_date)

    return TemplateDate.parse(rendezvous.chosen_by_rank_0(TEMPLATE_DATE_KEY, choose_on_rank_0, stop))


def _date_by_history(recorded_date: TemplateDate | None, run_dir: Path | None, read_cache_date: ReadCacheDate) -> str:
    """Choose the date as text, such as `2026-03-01`, from the first of these that has one:

    - `recorded_date`: what an earlier start of this run recorded in its configuration;
    - the comparison to which the run directory belongs; its first run that gets here decides, by its cache;
    - the data cache of this host.
    """
    if recorded_date is not None:
        return str(recorded_date)
    cache_date = str(read_cache_date())
    if run_dir is None:
        return cache_date
    return str(agree_on_shared_choice(run_dir, TEMPLATE_DATE_KEY, cache_date))


def record_template_date(
    config: RunConfig,
    date: TemplateDate | None,
    run_dir: Path,
    runtime: Runtime,
    write_config: Callable[[Path, RunConfig], None],
) -> RunConfig:
    """Keep the date that chat templates wrote among the configuration's substitutions, so that later starts use it.

    All ranks must call.

    - `date` is None, on all ranks, if the template writes no date: an earlier date is removed from the substitutions. Nothing is
      written, since the next start would remove it again.
    - The configuration has another date, or none: rank 0 also calls `write_config(run_dir, config)`, which writes `config.yaml`.

    Returns the new configuration. Raises StorageError on every rank.
    """
    substitutions = {key: note for key, note in config.substitutions.items() if key != TEMPLATE_DATE_KEY}
    if date is None:
        return replace(config, substitutions=substitutions)
    dated_config = replace(config, substitutions={**substitutions, TEMPLATE_DATE_KEY: str(date)})
    # An error of rank 0 is raised on all ranks, which would otherwise wait for it.
    error = None
    is_new_date = settled_template_date(config) != date
    if runtime.is_main and is_new_date:
        try:
            write_config(run_dir, dated_config)
        except StorageError as caught:
            error = caught
    failure = first_rank_error(error, runtime)
    if failure is not None:
        raise StorageError(failure.text)
    return dated_config
