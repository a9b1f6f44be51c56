"""Which files each kind of evaluation task reads, for `shardtune evaluate --help`.

The tasks say the same (`Task.reads`), but importing them imports torch, which takes seconds. A test compares the two.
"""

KINDS_READ = {
    "loss": "any format that the objective learns from",
    "bits_per_byte": "any format that the objective learns from",
    "token_accuracy": "any format that the objective learns from",
    "exact_match": (
        'a prompt and its answer in any format of data.path, perhaps with "references": a list of other right answers'
    ),
    "f1": (
        'a prompt and its answer in any format of data.path, perhaps with "references": a list of other right answers'
    ),
    "translation": "a text and its translation in any format of data.path",
    "summarisation": "a text and its summary in any format of data.path",
    "classification": '"text" and "label": a name, a whole number or true/false',
    "multiple_choice": (
        '"question", "choices": a list of texts, and "answer": the right one\'s number from 0, its letter'
        " or its text (or ARC's form of choices, texts with labels)"
    ),
    "tool_calls": (
        'conversations ("messages") with "tools", whose last assistant turn has the right "tool_calls", or none'
    ),
    "json_schema": (
        '"prompt" (a text) or "messages", and "schema": a JSON schema (or one for all rows in options.schema, a file)'
    ),
    "maths": ("a problem and its solution in any format of data.path; the result is found in it as in an answer"),
    "judge": (
        "a prompt and its answer in any format of data.path; the judge (evaluation.judge) sees the answer as reference"
    ),
    "preference": (
        "a prompt and its answer in any format of data.path; the answer is the opponent's, or that of against=..."
    ),
    "memorisation": (
        "training rows in any format that a language model learns from; without a path those of the run,"
        " drawn by a seed"
    ),
    "canary": (
        'rows that were put into the training data, with "secret": a text that stands once in what is '
        "learned of the row"
    ),
    "membership": (
        "training rows (the run's, or a path) and others (the run's evaluation documents, or options.others)"
    ),
    "personal_data": (
        "a prompt and its answer in any format of data.path; what is written is searched, the answer is not read"
    ),
    "counterfactual": (
        '"template" with slots as {person} and "attribute", or "texts": {group: text}; a "completion" '
        "behind either is judged in its place; without a path the shipped templates"
    ),
    "subgroups": '"text", "label" and "group": the group of the row, such as a gender',
    "stereotype": (
        '"sent_more" and "sent_less" (CrowS-Pairs); StereoSet\'s dev.json, or its rows with "sentences"; '
        'WinoBias\'s files, named pro... and anti....txt; or "stereotype" and "anti_stereotype", perhaps '
        'with "unrelated", "context", "bias_type" and "target"'
    ),
    "bbq": (
        '"context", "question", "ans0" to "ans2", "label", "answer_info", "context_condition", '
        '"question_polarity", and "target_loc" or "additional_metadata" with "stereotyped_groups"'
    ),
    "toxicity": (
        'a "prompt" (or "goal", "behavior", "question", "instruction", "text"); RealToxicityPrompts\' form too'
    ),
    "refusal": (
        "a prompt (prompt, goal, behavior, question, instruction, text), and whether it should be "
        'refused: "should_refuse", "label" or XSTest\'s "type"; rows with "goal" or "behavior" (AdvBench,'
        " HarmBench, JailbreakBench) are harmful without it"
    ),
    "lm_eval": (
        "a task of lm-evaluation-harness whose data is on this machine; path: a YAML of one's own, or a "
        "directory of such"
    ),
}
