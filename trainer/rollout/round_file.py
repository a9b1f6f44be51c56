"""A round in a checkpoint: what its remaining steps learn from, in one file that any strategy reads at any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from strategies.errors import StorageError
from trainer.rollout.round import Round
from trainer.rollout.types import Answer, AnswerGroup, GroupScores, Prompt, all_answers

ROUND_FILE = "round.safetensors"


def serialize_round(rollout_round: Round) -> bytes:
    """Write a round as the content of a checkpoint's `ROUND_FILE`, so that a resumed run learns from the same answers.

    It has tokens, rewards, advantages, log-probabilities and metrics, but no texts. Sequences of unequal length are stored as one
    array and one of lengths: prompts [5, 6] and [7] are `prompt_ids` [5, 6, 7] and `prompt_lengths` [2, 1]. `deserialize_round`
    is the inverse. The names of arrays are older than some names in the code, and stay readable for earlier checkpoints: "places"
    are the numbers of the prompts.
    """
    from safetensors.numpy import save

    answers = all_answers(rollout_round.groups)
    prompts = [group.prompt for group in rollout_round.groups]
    prompt_ids = [prompt.ids for prompt in prompts]
    answer_ids = [answer.ids for answer in answers]
    arrays = {
        "numbers": np.array(
            [rollout_round.first_sample, rollout_round.num_prompts, rollout_round.group_size], np.int64
        ),
        "prompt_lengths": _lengths(prompt_ids),
        "prompt_ids": _concatenate(prompt_ids, np.int32),
        "answer_lengths": _lengths(answer_ids),
        "answer_ids": _concatenate(answer_ids, np.int32),
        "rewards": np.stack([scores.total for scores in rollout_round.scores]),
        "advantages": rollout_round.advantages,
        "is_learned": rollout_round.is_learned.astype(np.uint8),
    }
    # Metrics of the answers, which `metrics.jsonl` gets at each remaining step. A file of arrays holds no texts: the names are
    # the bytes of a JSON list.
    names = json.dumps(list(rollout_round.metrics)).encode()
    arrays["fact_names"] = np.frombuffer(names, np.uint8)
    arrays["facts"] = np.array([*rollout_round.metrics.values()], np.float64)
    arrays["places"] = np.array([prompt.prompt_number for prompt in prompts], np.int64)
    arrays["ended"] = np.array([answer.has_ended for answer in answers], np.uint8)
    arrays["writer_logps"] = _concatenate([answer.logprobs for answer in answers], np.float32)
    # Log-probabilities of the answers that have any, in the order of the answers' numbers.
    for name, logps_by_answer in (("old", rollout_round.old_logps), ("reference", rollout_round.reference_logps)):
        numbers = sorted(logps_by_answer)
        arrays[f"{name}_answers"] = np.array(numbers, np.int64)
        arrays[f"{name}_logps"] = _concatenate([logps_by_answer[number] for number in numbers], np.float32)
    return save(arrays)


def deserialize_round(content: bytes, where: str) -> Round:
    """Read a round back from the content of a checkpoint's file; the texts of its prompts and answers are empty.

    `where`: the file, for the error. Raises StorageError if the content is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(content)
        first_sample, num_prompts, group_size = arrays["numbers"].tolist()

        # Prompts with their answers.
        answer_lengths = arrays["answer_lengths"]
        answer_ids = _split(arrays["answer_ids"], answer_lengths)
        generation_logps = _split(arrays["writer_logps"], answer_lengths)
        has_ended = arrays["ended"].astype(bool).tolist()
        prompt_ids = _split(arrays["prompt_ids"], arrays["prompt_lengths"])
        groups = []
        prompt_numbers = arrays["places"].tolist()
        for group_index, (prompt_number, ids) in enumerate(zip(prompt_numbers, prompt_ids, strict=True)):
            answers = []
            for sample_index in range(group_size):
                answer_number = group_index * group_size + sample_index
                answers.append(
                    Answer(
                        sample_index,
                        answer_ids[answer_number].tolist(),
                        logprobs=generation_logps[answer_number],
                        text="",
                        has_ended=has_ended[answer_number],
                    )
                )
            prompt = Prompt(prompt_number, ids.tolist(), text="", columns={}, origin="")
            groups.append(AnswerGroup(prompt, answers))

        # By "old" and "reference": log-probabilities of each token, by the answer's number in the round.
        logps: dict[str, dict[int, np.ndarray]] = {}
        for name in ("old", "reference"):
            numbers = arrays[f"{name}_answers"]
            logps_of_answers = _split(arrays[f"{name}_logps"], answer_lengths[numbers])
            logps[name] = dict(zip(numbers.tolist(), logps_of_answers, strict=True))
        metrics: dict[str, float] = {}
        if "facts" in arrays:  # not in checkpoints of earlier versions
            names = json.loads(arrays["fact_names"].tobytes())
            metrics = dict(zip(names, arrays["facts"].tolist(), strict=True))
        return Round(
            first_sample=first_sample,
            num_prompts=num_prompts,
            groups=groups,
            scores=[GroupScores(total) for total in arrays["rewards"]],
            advantages=arrays["advantages"],
            is_learned=arrays["is_learned"].astype(bool),
            old_logps=logps["old"],
            reference_logps=logps["reference"],
            metrics=metrics,
        )
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise StorageError(f"{where}: holds no round of answers ({error}); it is damaged") from error


def _lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.int64)


def _concatenate(rows: Sequence[Sequence[int] | np.ndarray], dtype: type) -> np.ndarray:
    """The values of all rows in one array; an empty array if there are no rows."""
    return np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.zeros(0, dtype)


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The rows of these lengths that `_concatenate` joined in `flat`. Raises ValueError if the lengths do not fit."""
    if int(lengths.sum()) != len(flat):
        raise ValueError(f"{len(flat)} numbers for rows of {int(lengths.sum())}")
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
