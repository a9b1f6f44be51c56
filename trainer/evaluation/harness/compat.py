"""What the project uses of lm-evaluation-harness beside its public interface. Read in lm-eval 0.4.13.

tests/compat/test_lm_eval.py calls each of these functions. lm-eval's public interface is `lm_eval` itself, `lm_eval.api`,
`lm_eval.utils` and `lm_eval.tasks.TaskManager`. The harness, and the libraries that it loads its data by, are imported when a
function is called, since composing a run must not import them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch


def read_task_file(file: Path, entry_by_name: dict[str, Any]) -> None:
    """Put what one YAML of the harness declares into `entry_by_name`. Its functions stay paths: no code runs.

    Calls `load_yaml` and `TaskIndex.process_cfg` of `lm_eval.tasks._yaml_loader` and `._index`, as the public `TaskManager`
    does for every YAML under a directory. `TaskManager` itself cannot take their place: it reads all of the harness's 14,000
    files or whole directories of them, it loses members of a tag whose tasks lie in several directories, it takes no single
    file, and it passes over a file that cannot be read without saying why. Raises whatever is wrong with the file.
    """
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    TaskIndex.process_cfg(load_yaml(file, resolve_func=False), file, entry_by_name)


def filter_names(task: Any) -> list[str]:
    """The filters of a task, in order: each metric has a number for each of them.

    Reads `Task._filters` of `lm_eval.api.task`. The public configuration has no filter for a task that names none, although
    such a task has one that is called `none`.
    """
    return [task_filter.name for task_filter in task._filters]


def longest_context(config: Any, tokenizer: Any) -> int:
    """Tokens that the harness's own `hf` model takes at most, by a model's configuration and tokenizer.

    Calls `lm_eval.models.utils.resolve_max_length`. It is called, not written anew, since the numbers are to be those of `hf`.
    """
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(config, tokenizer))


def begins_with_prefix(text: str, prefix: str) -> bool:
    """Whether a text begins with a prefix token's text, so that `hf` puts no second one before it.

    Calls `lm_eval.models.utils.has_bos_prefix`.
    """
    from lm_eval.models.utils import has_bos_prefix

    return bool(has_bos_prefix(text, prefix))


def normalized_generation_kwargs(generation_kwargs: dict[str, Any], max_tokens: int = 256) -> dict[str, Any]:
    """Complete a task's `generation_kwargs` with every default, as lm-eval's own `hf` model understands them.

    `max_tokens`: most tokens of an answer if the task does not say.

    Calls `lm_eval.models.utils.normalize_gen_kwargs`.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    return dict(normalize_gen_kwargs(generation_kwargs, max_tokens))


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Around calls of the harness: it draws no progress bar over its rows.

    Replaces `tqdm` in `lm_eval.api.task`, which has no setting for it; tqdm's own variable of the environment is read once,
    when tqdm is imported.
    """
    from lm_eval.api import task

    with patch.object(task, "tqdm", lambda rows, **_: rows):
        yield


@contextmanager
def without_network() -> Iterator[None]:
    """Around calls of the harness: nothing is fetched, whatever a task asks for; what lies in the caches is read.

    Sets the public variables of the environment, for processes that are started within. huggingface_hub, datasets and evaluate
    read these once, when they are imported, so their constants are replaced too (huggingface_hub 2.4, datasets 5.2, evaluate
    0.4.6).
    """
    import datasets
    import evaluate
    import huggingface_hub

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, dict.fromkeys(names, "1")))
        stack.enter_context(patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        stack.enter_context(patch.object(datasets.config, "HF_HUB_OFFLINE", True))
        stack.enter_context(patch.object(evaluate.config, "HF_EVALUATE_OFFLINE", True))
        yield
