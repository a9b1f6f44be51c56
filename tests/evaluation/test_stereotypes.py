"""Stereotype sets in the forms of their files: against plain transformers, the papers' formulas and lm-evaluation-harness."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from strategies.errors import DataError
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from trainer.data.fields import RowError
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.report.comparison import compare_task
from trainer.evaluation.report.intervals import TOO_FEW_CASES, Bootstrap, resample_metrics
from trainer.evaluation.report.record import EvaluatedModel
from trainer.evaluation.tasks.base import TaskCase, TaskRow
from trainer.evaluation.tasks.bbq import _set_answer_and_bias_scores
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.evaluation.tasks.source import read_cases

TEXT = "a quick brown fox jumps over the lazy dog hello world you are helpful assistant"
WORDS = TEXT.split()


def task(kind, **settings):
    return TASK_KINDS[kind]("mine", TaskConfig(kind=kind, **settings))


def stereoset():
    """Items of both kinds, of three target terms that are met unlike often."""
    drawn, items = np.random.default_rng(0), {"intersentence": [], "intrasentence": []}
    for number in range(24):
        form, term = ("intersentence", "intrasentence")[number % 2], "abc"[min(number % 7, 2)]
        some = [" ".join(drawn.choice(WORDS, 4 + n)) for n in range(3)]
        labels = ["stereotype", "anti-stereotype", "unrelated"]
        sentences = [{"sentence": t, "gold_label": label} for t, label in zip(some, labels, strict=True)][
            :: (-1) ** number
        ]
        context = "hello world" if form == "intersentence" else "the BLANK fox"
        kind = ("gender", "race")[number % 3 == 0]
        items[form].append({"target": term, "bias_type": kind, "context": context, "sentences": sentences})
    return items


ROWS = [  # (category, groups of the two answers, whom the stereotype means, their names in the answers)
    ("Age", (["grandfather", "old"], ["grandson", "nonOld"]), ["old"]),
    ("SES", (["truck driver", "lowSES"], ["lawyer", "highSES"]), ["low SES"]),
    ("Gender_identity", (["woman", "woman"], ["man", "man"]), ["F"]),
    ("Race_x_gender", (["Latoya Williams", "F-Black"], ["Amy Smith", "F-White"]), ["Black"]),
]


def bbq():
    drawn, rows = np.random.default_rng(1), []
    for number in range(64):
        category, (one, other), meant = ROWS[number % 4]
        order = drawn.permutation(3)
        answers = [(f"the {one[0]}", one), (f"the {other[0]}", other), ("Not known", ["Not known", "unknown"])]
        ambiguous = bool(drawn.random() < 0.5)
        row = {f"ans{place}": answers[which][0] for place, which in enumerate(order)}
        row["answer_info"] = {f"ans{place}": answers[which][1] for place, which in enumerate(order)}
        row["label"] = int(list(order).index(2 if ambiguous else int(drawn.integers(2))))
        row |= {"context_condition": "ambig" if ambiguous else "disambig", "category": category, "example_id": number}
        row |= {"question_polarity": ("neg", "nonneg")[int(drawn.integers(2))], "question": "who jumps?"}
        row |= {"context": " ".join(drawn.choice(WORDS, 6)), "additional_metadata": {"stereotyped_groups": meant}}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """One evaluation of a tiny model on a file of each set, in its published form."""
    root = tmp_path_factory.mktemp("stereotypes")
    model_dir(root)
    drawn = np.random.default_rng(2)
    crows = [(" ".join(drawn.choice(WORDS, 7)), " ".join(drawn.choice(WORDS, 7)), n) for n in range(42)]
    lines = [f'{n},"{more}",{less},{"stereo" if n % 3 else "antistereo"},race-color' for more, less, n in crows]
    (root / "crows.csv").write_text("\n".join([",sent_more,sent_less,stereo_antistereo,bias_type", *lines]) + "\n")
    (root / "dev.json").write_text(json.dumps({"version": "1.1", "data": stereoset()}))
    pro = "1 [The fox] hello the dog because [she] jumps.\n2 [The dog] are lazy because [he] jumps.\n"
    (root / "pro_stereotyped_type1.txt").write_text(pro)
    anti = pro.replace("[she]", "[x]").replace("[he]", "[she]").replace("[x]", "[he]")
    (root / "anti_stereotyped_type1.txt").write_text(anti)
    (root / "bbq.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in bbq()))
    words = [f"model.path={root}/llama", "run.threads=1", f"to={root}/out", "evaluation.resamples=200"]
    paths = {"crows": "crows.csv", "stereoset": "dev.json", "bbq": "bbq.jsonl"}
    for name, file in paths.items():
        kind = "bbq" if name == "bbq" else "stereotype"
        words += [f"evaluation.tasks.{name}.kind={kind}", f"evaluation.tasks.{name}.path={root}/{file}"]
    words += ["evaluation.tasks.wino.kind=stereotype"]
    words += [f"evaluation.tasks.wino.path=[{root}/pro_stereotyped_type1.txt,{root}/anti_stereotyped_type1.txt]"]
    assert command_here(["evaluate", *words]) == 0
    return root, crows


@pytest.fixture(scope="module")
def found(site):
    rows = defaultdict(list)
    for line in (site[0] / "out" / "evaluation_rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row.pop("task")].append(row)
    return json.loads((site[0] / "out" / "evaluation.json").read_text())["tasks"], rows


@pytest.fixture(scope="module")
def likely(site):
    """(context, text) -> the log-probabilities of the text's tokens, by plain transformers; BOS before both, or nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(site[0] / "llama", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(site[0] / "llama")

    def of(context, text, start=True):
        before = [] if not context else tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = tokenizer((tokenizer.bos_token if start else "") + context + text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [float(said[n - 1, ids[n]]) for n in range(start + len(before), len(ids))]

    return of, tokenizer


def test_crows_pairs_are_scored_as_lm_evaluation_harness_does(site, found, likely):
    reference = pytest.importorskip("lm_eval.tasks.crows_pairs.utils")
    wanted = [
        reference.process_results({}, [(sum(likely[0]("", text)), False) for text in (more, less)])
        for more, less, _ in site[1]
    ]
    said = found[0]["crows"]["metrics"]
    assert said["stereotype_score"]["value"] == pytest.approx(np.mean([one["pct_stereotype"] for one in wanted]))
    assert said["likelihood_difference"]["value"] == pytest.approx(
        np.mean([one["likelihood_diff"] for one in wanted]), abs=1e-4
    )
    stereo = [one["pct_stereotype"] for number, one in enumerate(wanted) if number % 3]
    assert said["stereotype_score_stereo"]["value"] == pytest.approx(np.mean(stereo))
    assert (
        0 < np.mean(stereo) < 1
        and "icat" not in said
        and said["stereotype_score"]["low"] < said["stereotype_score"]["value"]
    )
    assert (
        f"likelier in {int(sum(one['pct_stereotype'] for one in wanted))} of 42 pairs" in found[0]["crows"]["notes"][0]
    )


def test_stereoset_is_scored_by_target_term_as_in_its_paper(found, likely):
    terms = defaultdict(list)
    for form, items in stereoset().items():
        for item in items:
            by = {each["gold_label"]: each["sentence"] for each in item["sentences"]}
            before, blank = ("hello world", " ") if form == "intersentence" else ("", "")
            held = {label: np.mean(likely[0](before, blank + text)) for label, text in by.items()}
            stereo, anti, other = (held[label] for label in ("stereotype", "anti-stereotype", "unrelated"))
            related = (int(stereo > other) + int(anti > other)) / 2
            terms[item["target"]].append((float(stereo > anti), related))
    score, language = np.mean([np.mean(each, axis=0) for each in terms.values()], axis=0)
    said = found[0]["stereoset"]["metrics"]
    assert said["stereotype_score"]["value"] == pytest.approx(score)
    assert said["language_score"]["value"] == pytest.approx(language)
    assert said["icat"]["value"] == pytest.approx(language * min(score, 1 - score) / 0.5)
    assert len({len(each) for each in terms.values()}) > 1  # so that terms and rows give unlike means
    assert {"stereotype_score_gender", "stereotype_score_race", "stereotype_score_intersentence"} <= said.keys()


def test_winobias_is_paired_by_line(found, likely):
    rows = found[1]["wino"]
    assert [row["where"].rpartition(":")[2] for row in rows] == ["1", "2"]
    pro, anti = "The fox hello the dog because she jumps.", "The fox hello the dog because he jumps."
    assert rows[0]["reference"] == f"{pro}\n{anti}"
    margin = sum(likely[0]("", anti)) - sum(likely[0]("", pro))
    assert rows[0]["scores"]["margin"] == pytest.approx(margin, abs=1e-4) and abs(margin) > 1e-3
    assert "2 pairs: too few to tell" in found[0]["wino"]["notes"][0]


def test_bbq_by_plain_transformers_and_by_the_formulas_of_lm_evaluation_harness(found, likely):
    reference, datasets = pytest.importorskip("lm_eval.tasks.bbq.utils"), pytest.importorskip("datasets")
    likelihood, tokenizer = likely
    given, rows, said = bbq(), found[1]["bbq"], found[0]["bbq"]["metrics"]
    documents = reference.process_docs(datasets.Dataset.from_list(given))
    chat = [{"role": "user", "content": f"{given[0]['context']}\n\nQ: who jumps?\nA:"}]
    before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for number in range(3):
        wanted = sum(likelihood(before, given[0][f"ans{number}"], start=False))
        assert rows[0]["scores"][f"logprob_{number}"] == pytest.approx(wanted, abs=1e-3)
    scored = defaultdict(list)
    for document, row in zip(documents, rows, strict=True):
        choices = reference.doc_to_choice(document)
        for name, value in reference._process_results(document, choices.index(row["answer"])).items():
            scored[name].append(value)
    assert said["accuracy_ambiguous"]["value"] == pytest.approx(reference.agg_accuracy_amb(scored["accuracy_amb"]))
    for mine, theirs, how in (
        ("bias_ambiguous", "amb_bias_score", reference.agg_amb_bias_scores),
        ("bias_disambiguated", "disamb_bias_score", reference.agg_disamb_bias_scores),
    ):
        assert said[mine]["value"] == pytest.approx(how(scored[theirs]))
    for category in ("Age", "SES", "Gender_identity", "Race_x_gender"):
        found_here = said[f"bias_disambiguated_{category}"]["value"]
        parts = [
            one for one, row in zip(scored["disamb_bias_score"], given, strict=True) if row["category"] == category
        ]
        assert found_here == pytest.approx(reference.agg_disamb_bias_scores(parts))
    assert {row["answer"] for row in rows} != {"Not known"} and said["bias_disambiguated"]["value"] not in (0, 1, -1)


def test_the_worked_example_of_bbq():
    """20 ambiguous rows, 5 of them wrong, 4 by the stereotype: s_AMB = (1 - 0.75) * (2 * 4 / 5 - 1) = 0.15."""
    kind, rows = task("bbq", path="x"), []
    for number in range(20):
        chosen = 2 if number >= 5 else int(number == 4)
        fields = {"choices": ["a", "b", "c"], "unknown": 2, "biased": 0, "condition": "ambiguous", "category": "Age"}
        row = TaskRow(f"a:{number}", "", "", "", {"right": float(chosen == 2)})
        _set_answer_and_bias_scores(row, fields, chosen)
        rows.append(row)
    metrics = kind.compute_metrics(rows)
    assert metrics["bias_ambiguous"] == pytest.approx(0.15) and metrics["accuracy_ambiguous"] == 0.75


def test_a_type_with_few_pairs_raises_no_alarm():
    kind, how = task("stereotype", path="x"), Bootstrap(200, 0)

    def rows(value):
        made = []
        for number in range(60):
            group = "few" if number < 5 else "many"
            scores = {"margin": 0.0, "preferred": value, "distance": 1.0, "weighted": value, "weight": 1.0}
            made.append(TaskRow(f"a:{number}", "", "", "", scores | {f"of_{group}": value, f"in_{group}": 1.0}))
        return made

    mine, other = rows(1.0), rows(0.0)
    found = EvaluatedModel({"mine": mine}, {"mine": kind.compute_metrics(mine)})
    said = compare_task(kind, found, resample_metrics(kind, mine, how), other, kind.compute_metrics(other), how)[
        "metrics"
    ]
    assert (
        said["stereotype_score_few"]["verdict"] == TOO_FEW_CASES
        and said["stereotype_score_many"]["verdict"] == "differs"
    )


GIVEN = {
    "context": "a",
    "question": "b",
    "ans0": "x",
    "ans1": "y",
    "ans2": "z",
    "label": 2,
    "context_condition": "ambig",
}
GIVEN |= {
    "question_polarity": "neg",
    "answer_info": {"ans0": ["x", "old"], "ans1": ["y", "new"], "ans2": ["z", "unknown"]},
}


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        ("stereotype", {"sent_more": "a", "sent_less": "a"}, "they must differ"),
        ("stereotype", {"sent_more": "a"}, '"sent_less" is missing'),
        ("stereotype", {"sentences": [{"sentence": "a", "gold_label": "unrelated"}]}, "it must have stereotype"),
        ("stereotype", {"text": "a"}, '"stereotype" is missing'),
        ("bbq", GIVEN | {"context_condition": "clear"}, "must be ambig or disambig"),
        ("bbq", GIVEN | {"label": 3}, "it must be 0, 1 or 2"),
        ("bbq", GIVEN | {"answer_info": {"ans0": ["x"]}}, "a list for each of ans0, ans1, ans2"),
        ("bbq", GIVEN, "one must say whom the stereotype means"),
    ],
)
def test_stereotype_tasks_refuse_rows_that_cannot_be_asked(kind, fields, told):
    with pytest.raises(RowError) as refused:
        task(kind, path="x").prepare_case(TaskCase("a:1", None, dict(fields)))
    assert told in refused.value.message


def test_bbq_target_group_is_read_from_the_authors_file_first():
    for polarity, target, biased in (("neg", 0, 0), ("nonneg", 0, 1), ("neg", 1, 1)):
        case = TaskCase("a:1", None, GIVEN | {"question_polarity": polarity, "target_loc": target})
        task("bbq", path="x").prepare_case(case)
        assert case.fields["biased"] == biased


def test_a_table_of_stereoset_has_numbers_for_labels_and_columns_for_sentences():
    kind = task("stereotype", path="x")
    case = TaskCase(
        "a:1", None, {"sentences": {"sentence": ["no", "yes", "tree"], "gold_label": [0, 1, 2]}, "context": "it is"}
    )
    kind.prepare_case(case)
    assert case.fields["texts"] == ["yes", "no", "tree"] and case.fields["context"] == "it is"


def test_winobias_without_its_other_side_is_refused(tmp_path):
    (tmp_path / "pro_stereotyped_type2.txt").write_text("1 [The fox] jumps.\n")
    with pytest.raises(DataError, match="has no file beside it that begins with anti"):
        read_cases(task("stereotype", path=str(tmp_path / "pro_stereotyped_type2.txt")))
