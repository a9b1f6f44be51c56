"""Settings that are not there on purpose, each with what to do. By similarity, another meaning would be suggested for them."""

SUCCESSOR_BY_REMOVED_KEY = {
    "launcher.max_restarts": "launcher.retry={preempted:20,node_fail:3} says how often, and after what",
    "data.balance.up_sample": "documents are repeated up to data.balance.max_repeats times; 1 leaves out instead",
    "data.balance.down_sample": "data.balance.max_repeats=1 leaves documents of the large groups out",
    "data.duplicates.across": "copies are looked for in all sources together, and dropped where their kind says drop",
    "data.leakage.prompts": "shared prompts with other answers are always counted, and never dropped",
    "data.filters.min_words": "data.filters.min_characters does it",
    "data.filters.max_words": "data.filters.max_characters does it",
    "data.checks.repeat_chars": "it is always 40",
    "data.filters.min_language_chars": "it is always 60",
    "data.decontamination.min_words": "it is always 5",
    "data.decontamination.max_shared": "it is always 10",
    "data.duplicates.num_perm": "it is always 128",
    "data.duplicates.ngram": "it is always 5",
    "data.decontamination.ngram": "it is always 13",
    "data.decontamination.min_overlap": "one run of 13 words is enough; audit.json says which share of the evaluation text it is",
    "data.filters.min_language_probability": "data.filters.languages keeps what is most probably one of them",
    "data.checks.max_chars": "data.filters.max_characters drops long rows, data.over_length says what becomes of long documents",
    "data.privacy.max_findings": "data.privacy.allow names what is no finding; data.privacy.mode=report counts without failing",
    "data.privacy.key_env": "the key is always in SHARDTUNE_PSEUDONYM_KEY",
}
"""Settings that there were, and their successors."""
_DRAWN_OTHERWISE = (
    *("objective.rollout.top_p", "objective.rollout.top_k", "objective.rollout.min_p"),
    *("objective.rollout.repetition_penalty", "objective.top_p", "objective.top_k"),
)
_ONLY_TEMPERATURE = (
    "answers are drawn by the very probabilities that are learned, and only objective.rollout.temperature changes both; "
    "evaluation.generate.top_p is for evaluations"
)
REASON_BY_NOT_OFFERED_KEY = {
    **dict.fromkeys(_DRAWN_OTHERWISE, _ONLY_TEMPERATURE),
    "parallel.tensor": (
        "tensor parallelism is not offered. If the model does not fit, shard it with strategy=fsdp2 or zero3, or store its base "
        "in 4 bits with model.quantisation=nf4; if a document does not fit, set parallel.sequence (docs/choosing-a-strategy.md)"
    ),
    "parallel.pipeline": (
        "pipeline parallelism is not offered. If the model does not fit, shard it with strategy=fsdp2 or zero3; if the network "
        "between hosts is slow, strategy=hsdp keeps parameters within a host (docs/choosing-a-strategy.md)"
    ),
    "parallel.context": "attention over a row of several ranks is parallel.sequence, which exchanges slices for heads",
}
"""Settings that users of other trainers look for, and what does the same here."""
