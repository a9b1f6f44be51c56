"""Loads tasks of lm-evaluation-harness with their data, without a network."""

from __future__ import annotations

from typing import Any

from strategies.errors import ConfigError, DataError
from trainer.evaluation.harness.compat import normalized_generation_kwargs, without_network
from trainer.evaluation.harness.isolation import collect_warnings, harness_seeds
from trainer.evaluation.harness.task_files import TaskFiles, data_origin


def load_tasks(task_files: TaskFiles, options: dict[str, Any]) -> dict[str, Any]:
    """Load lm-eval tasks with their data, from files and caches of this machine; returns lm-eval's Task objects by name.

    `options`: those of our task (`num_fewshot`, `generation` ...), which override the YAML. Raises ConfigError for data that
    would be fetched from a hub, for tasks that run code or show pictures, and for settings that this engine cannot meet;
    DataError for data that cannot be read.
    """
    from lm_eval.tasks import TaskManager

    problems = _problems_of_data_and_metrics(task_files)
    if problems:
        raise ConfigError("; ".join(problems[:5]))  # a group may have hundreds of tasks
    # Without the harness's own index, which takes ten seconds to build.
    manager = TaskManager(include_defaults=False)
    manager.task_index.update(task_files.index)
    # With the harness's own seeds, a task that draws at random while it loads gets the rows that lm-eval's command gives it.
    with collect_warnings(), harness_seeds(), without_network():
        try:
            loaded: dict[str, Any] = dict(manager.load([task_files.name])["tasks"])
        except Exception as error:  # noqa: BLE001  what a task's own functions and `datasets` raise
            hub_data_sets = _hub_data_sets(task_files)
            if hub_data_sets:  # most likely a data set is not in the cache
                raise ConfigError(_would_fetch_message(task_files, hub_data_sets)) from None
            one_line = " ".join(str(error).split())[:400]
            raise DataError(
                f"{task_files.name}: its data cannot be read ({type(error).__name__}: {one_line})"
            ) from None
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{name}: runs what the model writes as code, which is not done here; leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"{name}: shows pictures or sounds, and these models read text; leave it out")
        _apply_task_options(name, task, options)
    return loaded


def _hub_data_sets(task_files: TaskFiles) -> list[str]:
    """The data sets of a hub that the lm-eval tasks read, each once: ["cais/mmlu (law)"]. Tasks with local files have none."""
    origins = [data_origin(yaml_settings) for yaml_settings in task_files.single_tasks.values()]
    return list(dict.fromkeys(origin.hub_data_set for origin in origins if origin.hub_data_set))


def _problems_of_data_and_metrics(task_files: TaskFiles) -> list[str]:
    """Check before loading that nothing is missing: a message for each missing file of rows, and each metric of a hub."""
    problems = []
    # Groups are expanded into their tasks here, each with the settings of its YAML.
    for name, yaml_settings in task_files.single_tasks.items():
        origin = data_origin(yaml_settings)
        if origin.problem:
            problems.append(f"{name}: {origin.problem}")
        hub_metrics = _metrics_of_hub(yaml_settings)
        if hub_metrics:
            problems.append(
                f"{name}: metric {', '.join(hub_metrics)} is not lm-eval's and would be fetched from a hub; name one of its "
                "own, or compute it in a function (process_results)"
            )
    return problems


def _metrics_of_hub(yaml_settings: dict[str, Any]) -> list[str]:
    """Which metrics of an lm-eval task the harness would fetch from a hub, where they are code; we refuse these.

    They are metrics that the YAML marks with `hf_evaluate`, and names that are not lm-eval's own. `yaml_settings`: of the
    task.
    """
    import lm_eval.api.metrics  # noqa: F401  fills the registry
    from lm_eval.api.registry import metric_registry

    scores_by_own_code = yaml_settings.get("process_results") or yaml_settings.get("class")
    if scores_by_own_code:  # the metrics are then only names of what that code returns
        return []
    hub_metrics = []
    for metric_settings in yaml_settings.get("metric_list") or []:
        metric = metric_settings.get("metric")
        if not isinstance(metric, str):  # a function of the YAML
            continue
        is_path = "/" in metric  # of a metric's file on this machine
        is_unknown_name = not is_path and metric not in metric_registry
        if metric_settings.get("hf_evaluate") or is_unknown_name:
            hub_metrics.append(metric)
    return hub_metrics


def _would_fetch_message(task_files: TaskFiles, hub_data_sets: list[str]) -> str:
    """The error message for tasks whose data would be fetched from a hub, with what to do instead."""
    more = f" and {len(hub_data_sets) - 5} more" if len(hub_data_sets) > 5 else ""
    return (
        f"{task_files.name}: would fetch dataset_path={', '.join(hub_data_sets[:5])}{more} from a hub, and nothing is fetched "
        "here; give its data as files in a YAML of your own (dataset_path: json, dataset_kwargs: {data_files: {test: "
        "rows.jsonl}}) and name it with path, or load the data set once with `datasets` where there is a network, into the "
        "cache of this machine"
    )


def _apply_task_options(name: str, task: Any, options: dict[str, Any]) -> None:
    """Set few-shot examples and generation of an lm-eval task to our options, in place, as the harness's own command does.

    `name`: the task's name, for errors. `options`: {"num_fewshot": 5 or None, "generation": {"max_gen_toks": 64}, ...}. Raises
    ConfigError for settings that this engine cannot meet.
    """
    # Few-shot examples.
    yaml_shots = task.get_config("num_fewshot")
    wanted_shots = options["num_fewshot"]
    if wanted_shots is not None and yaml_shots == 0 and wanted_shots != 0:
        raise ConfigError(
            f"{name}: options.num_fewshot={wanted_shots}: its YAML says num_fewshot: 0, which lm-eval keeps to"
        )
    # Without either number, no examples are shown.
    if wanted_shots is not None or yaml_shots is None:
        task.set_config(key="num_fewshot", value=wanted_shots or 0)

    # Generation, of tasks whose answers are written.
    if task.get_config("output_type") != "generate_until":
        return
    if options["generation"]:
        task.set_config(key="generation_kwargs", value=dict(options["generation"]), update=True)
    with collect_warnings():  # which are dropped: the harness warns again when it generates
        settings = normalized_generation_kwargs(task.get_config("generation_kwargs") or {})
    unknown = sorted(settings.keys() - KNOWN_GENERATION_SETTINGS)
    if unknown:
        raise ConfigError(
            f"{name}: generation_kwargs has {', '.join(unknown)}, which this engine has not; it has "
            f"{', '.join(sorted(KNOWN_GENERATION_SETTINGS))}"
        )
    beams = int(settings.get("num_beams") or 1)
    if beams > 1 and settings["do_sample"]:
        raise ConfigError(f"{name}: generation_kwargs num_beams={beams} with do_sample: a beam search draws nothing")


KNOWN_GENERATION_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
"""Settings of generation that a task may have."""
