"""Loads tasks of lm-evaluation-harness with their data, without a network."""

from __future__ import annotations

from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.evaluation.harness.compat import generation_settings, without_network
from trainer.evaluation.harness.isolation import collect_warnings, harness_seeds
from trainer.evaluation.harness.task_files import TaskFiles, missing_data


def load_tasks(what: TaskFiles, options: dict[str, Any]) -> dict[str, Any]:
    """The harness's Task objects by name, with their data.

    Errors: ConfigError naming the data sets that would be fetched, and for settings that cannot be met; DataError.
    """
    from lm_eval.tasks import TaskManager

    hub = _hub_data_sets(what)
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(what.index)
    with collect_warnings(), harness_seeds(), without_network():
        try:
            loaded: dict[str, Any] = dict(manager.load([what.name])["tasks"])
        except Exception as error:  # noqa: BLE001  what a task's own functions and `datasets` raise
            if hub:
                raise ConfigError(_would_fetch(what, hub)) from None
            said = " ".join(str(error).split())[:400]
            raise DataError(f"{what.name}: its data cannot be read ({type(error).__name__}: {said})") from None
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{name}: runs what the model writes as code, which is not done here; leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"{name}: shows pictures or sounds, and these models read text; leave it out")
        _apply_options(name, task, options)
    return loaded


def _hub_data_sets(what: TaskFiles) -> dict[str, str]:
    """The data sets of a hub that tasks read, by task. Raises ConfigError for files and metrics that are not here."""
    hub, wrong = {}, []
    for name, settings in what.single_tasks.items():
        fault, fetched = missing_data(settings)
        wrong += [f"{name}: {fault}"] if fault else []
        if fetched:
            hub[name] = fetched
        if metrics := _hub_metrics(settings):
            wrong.append(
                f"{name}: metric {', '.join(metrics)} is not lm-eval's and would be fetched from a hub; name one of its own, or "
                "reckon it in a function (process_results)"
            )
    if wrong:
        raise ConfigError("; ".join(wrong[:5]))
    return hub


def _hub_metrics(settings: dict[str, Any]) -> list[str]:
    import lm_eval.api.metrics  # noqa: F401  fills the registry
    from lm_eval.api.registry import metric_registry

    if settings.get("process_results") or settings.get("class"):
        return []
    asked = [each for each in settings.get("metric_list") or [] if isinstance(each.get("metric"), str)]
    return [
        each["metric"]
        for each in asked
        if each.get("hf_evaluate") or ("/" not in each["metric"] and each["metric"] not in metric_registry)
    ]


def _would_fetch(what: TaskFiles, hub: dict[str, str]) -> str:
    sets = list(dict.fromkeys(hub.values()))
    more = f" and {len(sets) - 5} more" if len(sets) > 5 else ""
    return (
        f"{what.name}: would fetch dataset_path={', '.join(sets[:5])}{more} from a hub, and nothing is fetched here; give its "
        "data as files in a YAML of your own (dataset_path: json, dataset_kwargs: {data_files: {test: rows.jsonl}}) and name it "
        "with path, or load the data set once with `datasets` where there is a network, into the cache of this machine"
    )


def _apply_options(name: str, task: Any, options: dict[str, Any]) -> None:
    """Set what the harness's own command sets before it asks a model. Raises ConfigError."""
    there, asked = task.get_config("num_fewshot"), options["num_fewshot"]
    if asked is not None and there == 0 and asked != 0:
        raise ConfigError(f"{name}: options.num_fewshot={asked}: its YAML says num_fewshot: 0, which lm-eval keeps to")
    if asked is not None or there is None:
        task.set_config(key="num_fewshot", value=asked or 0)
    if task.get_config("output_type") != "generate_until":
        return
    if options["generation"]:
        task.set_config(key="generation_kwargs", value=dict(options["generation"]), update=True)
    with collect_warnings():
        how = generation_settings(task.get_config("generation_kwargs") or {})
    if unknown := sorted(how.keys() - KNOWN_GENERATION_SETTINGS):
        raise ConfigError(
            f"{name}: generation_kwargs has {', '.join(unknown)}, which this engine has not; it has "
            f"{', '.join(sorted(KNOWN_GENERATION_SETTINGS))}"
        )
    beams = int(how.get("num_beams") or 1)
    if beams > 1 and how["do_sample"]:
        raise ConfigError(f"{name}: generation_kwargs num_beams={beams} with do_sample: a beam search draws nothing")


KNOWN_GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
"""Settings of generation that tasks may have."""
