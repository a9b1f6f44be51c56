"""The rows that each kind of evaluation task reads, for `shardtune evaluate --help`.

The tasks say the same (`Task.rows_description`), but importing them imports torch, which takes seconds. A test compares the two.
"""

KINDS_READ = {
    "loss": "rows in any format that the run's objective can train on, such as conversations",
    "bits_per_byte": "rows in any format that the run's objective can train on, such as conversations",
    "token_accuracy": "rows in any format that the run's objective can train on, such as conversations",
    "exact_match": (
        'rows with a prompt and the right answer, in any format that data.path takes; a column "references" can list '
        "further right answers"
    ),
    "f1": (
        'rows with a prompt and the right answer, in any format that data.path takes; a column "references" can list '
        "further right answers"
    ),
    "translation": "rows with a text and its translation, in any format that data.path takes",
    "bleu": "rows with a text and its translation, in any format that data.path takes",
    "summarisation": "rows with a text and its summary, in any format that data.path takes",
    "rouge": "rows with a text and its summary, in any format that data.path takes",
    "classification": 'rows with "text" and "label"; a label is a name, a whole number or true/false',
    "multiple_choice": (
        'rows with "question", "choices" (a list of texts) and "answer": the right choice by its text, its letter (A is '
        "the first) or its number (0 is the first); the rows of ARC work as they are"
    ),
    "tool_calls": (
        'rows with a conversation ("messages") and its "tools"; the last assistant turn holds the right "tool_calls", or '
        "none if no tool should be called"
    ),
    "json_schema": (
        'rows with a "prompt" or a conversation ("messages"), and "schema": the JSON schema that the answer must fit; '
        "options.schema names a file with one schema for all rows"
    ),
    "maths": (
        "rows with a problem and its solution, in any format that data.path takes; the last number of the solution, or "
        "what stands in \\boxed{} or behind ####, is the right result"
    ),
    "judge": (
        "rows with a prompt and a good answer, in any format that data.path takes; the judge model (evaluation.judge) "
        "sees this answer when it grades the model's"
    ),
    "preference": (
        "rows with a prompt and an answer, in any format that data.path takes; the judge model compares the model's "
        "answer with this one, or with that of the model in against="
    ),
    "memorisation": "training rows in any format for language models; without a path, a random sample of the run's training rows",
    "canary": (
        'rows that were planted in the training data, each with a "secret": a text that occurs exactly once in the part '
        "that the model learns"
    ),
    "membership": (
        "rows that were trained on (the path, or the run's training data) and rows that were not (options.others, or the "
        "run's evaluation documents)"
    ),
    "personal_data": (
        "rows with a prompt and an answer, in any format that data.path takes; what the model writes is searched for "
        "personal data, and the row's own answer is not used"
    ),
    "counterfactual": (
        'rows with a "template" that has slots such as {person} and an "attribute" such as gender, or with "texts" (one '
        'for each group); if a row has a "completion", only that is scored; without a path, the templates that shardtune '
        "ships"
    ),
    "subgroups": 'rows with "text", "label" and "group": the group of people that a row belongs to, such as a gender',
    "stereotype": (
        'rows with two sentences, "stereotype" and "anti_stereotype", and if you like "unrelated", "context", '
        '"bias_type" and "target"; the files of CrowS-Pairs, StereoSet and WinoBias (two files whose names begin with '
        "pro and anti) work as they are"
    ),
    "bbq": (
        'rows of the BBQ benchmark: "context", "question", "ans0" to "ans2", "label", "answer_info", '
        '"context_condition", "question_polarity", and "target_loc" or "additional_metadata" with "stereotyped_groups"'
    ),
    "toxicity": (
        'rows with a "prompt"; the column can also be called "goal", "behavior", "question", "instruction" or "text"; '
        "RealToxicityPrompts works as it is"
    ),
    "refusal": (
        'rows with a prompt (column "prompt", "goal", "behavior", "question", "instruction" or "text") and whether the '
        'model should refuse it: "should_refuse", "label" or XSTest\'s "type"; AdvBench, HarmBench and JailbreakBench, '
        "whose prompts are all harmful, work as they are"
    ),
    "lm_eval": (
        "a task of lm-evaluation-harness whose data is on this machine; path names your own task: a YAML file, or a "
        "directory with such files"
    ),
}
"""What stands in each row of a task's file, by kind. Columns are in quotes."""
