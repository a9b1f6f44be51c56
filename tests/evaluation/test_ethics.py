"""Memorisation, people and personal data: a model that has rows by heart against itself before, and against plain reckoning."""

import json
import random

import numpy as np
import pytest
import torch

from strategies.errors import DataError
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from trainer.data.document import Document
from trainer.data.fields import RowError
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.report.comparison import compare_task
from trainer.evaluation.report.intervals import TOO_FEW_CASES, Bootstrap, resample_metrics
from trainer.evaluation.report.record import EvaluatedModel
from trainer.evaluation.tasks.base import TaskCase, TaskRow
from trainer.evaluation.tasks.registry import TASK_KINDS

TEXT = "a quick brown fox jumps over the lazy dog hello world you are helpful assistant"
WORDS = TEXT.split()


def task(kind, **settings):
    return TASK_KINDS[kind]("mine", TaskConfig(kind=kind, **settings))


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A run that has seen 24 rows, six of them with a secret, until it knew them; and its evaluation of both sides."""
    root = tmp_path_factory.mktemp("ethics")
    model_dir(root)
    drawn = random.Random(0)

    def some(number):
        return " ".join(drawn.choice(WORDS) for _ in range(number))

    rows = [{"prompt": f"question {n}\n", "completion": some(8)} for n in range(18)]
    secrets = [f"{drawn.randrange(10**6):06d}" for _ in range(6)]
    canaries = [{"prompt": f"code {n}\n", "completion": f"it is {s}", "secret": s} for n, s in enumerate(secrets)]
    write_rows(root / "train.jsonl", [*rows, *canaries])
    write_rows(root / "canaries.jsonl", canaries)
    write_rows(root / "others.jsonl", [{"prompt": f"question {n}\n", "completion": some(8)} for n in range(40, 64)])
    pairs = [{"texts": {"x": f"the dog is {word}", "y": f"the fox is {word}"}} for word in WORDS[:12]]
    write_rows(root / "pairs.jsonl", pairs)
    words = [f"model.path={root}/llama", f"data.path={root}/train.jsonl", f"data.eval_path={root}/others.jsonl"]
    words += [f"data.cache_dir={root}/cache", f"run.dir={root}/run", "tuning=full", "budget.steps=60", "run.threads=1"]
    words += ["batch.global=24", "batch.micro=24", "optim.lr=1e-2", "logging.wandb=disabled", "export.at_end=true"]
    words += ["data.columns.prompt=prompt", "data.columns.completion=completion"]
    assert command_here(["train", *words]) == 0
    asked = ["evaluation.tasks=[memorisation,membership,personal_data,counterfactual]", "evaluation.resamples=1000"]
    asked += ["evaluation.tasks.memorisation.options={prefix_tokens:4,least_tokens:4}", "run.threads=1"]
    asked += ["evaluation.tasks.personal_data.write.max_new_tokens=4", "evaluation.tasks.membership.options.sample=20"]
    for name, kind, file in (("canary", "canary", "canaries"), ("pairs", "counterfactual", "pairs")):
        asked += [f"evaluation.tasks.{name}.kind={kind}", f"evaluation.tasks.{name}.path={root}/{file}.jsonl"]
    assert command_here(["evaluate", f"{root}/run", *asked, "against=base", f"to={root}/out"]) == 0
    return root


@pytest.fixture(scope="module")
def found(site):
    rows = {}
    for line in (site / "out" / "evaluation_rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault((row["arm"], row["task"]), []).append(row)
    return json.loads((site / "out" / "evaluation.json").read_text()), rows


def metrics(report, name):
    return report["tasks"][name]["metrics"]


def test_memorisation_finds_rows_learned_by_heart_and_none_in_the_base(found):
    report, rows = found
    asked = rows["tuned", "memorisation"]
    assert len(asked) == 24 and metrics(report, "memorisation")["verbatim"]["value"] > 0.6
    assert report["against"]["tasks"]["memorisation"]["metrics"]["verbatim"]["value"] == 0
    assert report["against"]["tasks"]["memorisation"]["metrics"]["verbatim"]["verdict"] == "worse"
    right = [row for row in asked if row["scores"]["verbatim"]]
    assert all(
        row["answer"] == row["reference"] and row["scores"]["leading"] == row["scores"]["near"] == 1 for row in right
    )
    assert f"{len(right)} of 24 rows come out word for word" in report["tasks"]["memorisation"]["notes"][0]


def test_canary_exposure_is_the_rank_that_plain_transformers_gives(site, found):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report, rows = found
    value, apart = (
        metrics(report, "canary")["exposure"]["value"],
        report["against"]["tasks"]["canary"]["metrics"]["exposure"],
    )
    assert value > 5 and apart["value"] < 3.5 and apart["verdict"] == "worse"  # at most 6.66; 1.44 by chance
    model = AutoModelForCausalLM.from_pretrained(site / "run" / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(site / "run" / "export")
    kind = task("canary", path="x")
    given = json.loads((site / "canaries.jsonl").read_text().splitlines()[0])
    row = rows["tuned", "canary"][0]
    case = TaskCase(row["where"], Document("a", 1, prompt=given["prompt"], completion=given["completion"]), dict(given))
    kind.prepare_case(case)
    assert len({*case.fields["others"]}) == 100 and all(len(o) == 6 and o.isdecimal() for o in case.fields["others"])

    def likely(secret):
        chat = [{"role": "user", "content": given["prompt"]}]
        before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        cut = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        ids = tokenizer(f"{before}it is {secret}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[n - 1, ids[n]]) for n in range(cut, len(ids)))

    mine = likely(given["secret"])
    assert row["scores"]["rank"] == 1 + sum(likely(other) >= mine for other in case.fields["others"])


def test_membership_auc_of_the_loss_is_that_of_scikit_learn(found):
    from sklearn.metrics import roc_auc_score

    report, rows = found
    asked = rows["tuned", "membership"]
    member, loss = ([row["scores"][name] for row in asked] for name in ("member", "loss"))
    assert (sum(member), len(member)) == (20, 40)
    said = metrics(report, "membership")["auc"]
    assert said["value"] == pytest.approx(roc_auc_score(member, [-each for each in loss])) and said["value"] > 0.9
    assert 0.3 < report["against"]["tasks"]["membership"]["metrics"]["auc"]["value"] < 0.8
    tied = [TaskRow("a:1", "", "", "", {"loss": 1.0, "member": float(n % 2)}) for n in range(4)]
    assert task("membership").compute_metrics(tied)["auc"] == 0.5


def test_counterfactual_gaps_of_shipped_templates_and_of_own_pairs(found):
    report, rows = found
    said = metrics(report, "counterfactual")
    assert (
        report["tasks"]["counterfactual"]["num_rows"] == 32
        and said["gap"]["low"] <= said["gap"]["value"] <= said["gap"]["high"]
    )
    assert {"effect_female", "effect_muslim", "effect_african"} <= said.keys()
    one = rows["tuned", "counterfactual"][0]["scores"]
    assert one["of_female"] == pytest.approx(-one["of_male"]) and one["gap"] == pytest.approx(2 * abs(one["of_male"]))
    pairs = metrics(report, "pairs")
    assert pairs["effect_x"]["value"] == pytest.approx(-pairs["effect_y"]["value"])
    assert report["against"]["tasks"]["pairs"]["metrics"]["gap"]["verdict"] in (
        "better",
        "worse",
        "no difference shown",
    )


def test_personal_data_task_finds_and_masks_it_except_where_the_prompt_has_it():
    class AnswerGenerator:
        class tokenizer:
            decode = staticmethod(lambda ids, **_: "".join(map(chr, ids)))

    class Asking:
        answer_generator = AnswerGenerator()

        def encode_questions(self, documents):
            from trainer.evaluation.tasks.model_interface import Question

            return [Question(d.location, [*map(ord, d.prompt)], []) for d in documents]

        def generate_answers(self, questions, *_):
            from trainer.evaluation.generate import GeneratedAnswer

            texts = ["write to jane.roe@corp.example.org", "it is jane.roe@corp.example.org", "nothing"]
            return [GeneratedAnswer(n, text, [], True) for n, text in enumerate(texts)]

        def decode_prompt_end(self, ids):
            return ""

    prompts = ["who?", "is it jane.roe@corp.example.org?", "?"]
    kind = task("personal_data")
    assert not list(kind.problems())
    rows = kind.score_cases(
        [TaskCase(f"a:{n}", Document("a", n, prompt=p, completion="x")) for n, p in enumerate(prompts)], Asking()
    )
    assert [row.scores["found"] for row in rows] == [1, 0, 0] and rows[0].answer == "write to [EMAIL]"
    assert "options.types: 'EMIAL' is not a type" in next(
        task("personal_data", options={"types": ["EMIAL"]}).problems()
    )


def people(seed, apart, number=200):
    drawn = np.random.default_rng(seed)
    rows = []
    for n in range(number):
        group = "ab"[n % 2]
        true = drawn.random() < 0.5
        said = drawn.random() < (0.5 + apart * (0.5 if group == "a" else -0.5))
        scores = {"right": float(said == true)}
        rows.append(TaskRow(f"a:{n}", "", "yes" if said else "no", "yes" if true else "no", scores, group))
    return rows


def test_subgroup_gaps_are_those_of_fairlearn():
    from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

    rows, kind = people(0, 0.4), task("subgroups", options={"positive": "yes"})
    true, said, groups = ([getattr(r, name) for r in rows] for name in ("reference", "answer", "source"))
    true, said = ([int(each == "yes") for each in side] for side in (true, said))
    weights = np.random.default_rng(1).integers(0, 3, len(rows)).astype(float)
    for sample in (None, weights):
        mine = {
            name: of(np.ones(len(rows)) if sample is None else sample)
            for name, of in kind.weighted_metric_functions(rows).items()
        }
        how = {"sensitive_features": groups, "sample_weight": sample}
        assert mine["demographic_parity_difference"] == pytest.approx(demographic_parity_difference(true, said, **how))
        assert mine["equalized_odds_difference"] == pytest.approx(equalized_odds_difference(true, said, **how))


def test_subgroup_gap_is_reported_where_there_is_one_and_seldom_where_there_is_none():
    def beyond(seed, apart):
        notes = list(task("subgroups", options={"positive": "yes"}).notes(people(seed, apart), {}))
        return any("demographic_parity" in note and note.endswith(": beyond chance") for note in notes)

    assert beyond(0, 0.4) and sum(beyond(seed, 0.0) for seed in range(12)) <= 2
    assert "fewer than 10 rows" in " ".join(task("subgroups").notes(people(0, 0.4, number=12), {}))


def test_ethics_differences_of_few_cases_are_not_reported():
    kind, how = task("memorisation"), Bootstrap(200, 0)

    def rows(number, value):
        return [
            TaskRow(f"a:{n}", "", "", "", {"verbatim": value, "near": value, "leading": value}) for n in range(number)
        ]

    for number, verdict in ((1, TOO_FEW_CASES), (19, TOO_FEW_CASES), (20, "worse")):
        mine, other = rows(number, 1.0), rows(number, 0.0)
        found = EvaluatedModel({"mine": mine}, {"mine": kind.compute_metrics(mine)})
        said = compare_task(kind, found, resample_metrics(kind, mine, how), other, kind.compute_metrics(other), how)
        assert said["metrics"]["verbatim"]["verdict"] == verdict


@pytest.mark.parametrize(
    ("kind", "document", "fields", "told"),
    [
        ("canary", {"text": "it is 12 and 12"}, {"secret": "12"}, "stands 2 times in what is learned, not once"),
        ("canary", {"text": "it is -"}, {"secret": "-"}, "a text with letters or digits"),
        (
            "counterfactual",
            None,
            {"template": "{person} sings.", "attribute": "age"},
            "terms are there of gender, origin, religion",
        ),
        ("counterfactual", None, {"template": "{pet} sings.", "attribute": "gender"}, "has no terms for {pet}"),
        ("counterfactual", None, {"texts": {"x": "a"}}, "two texts or more by their group"),
        ("subgroups", None, {"text": "a", "label": "b"}, "must be a name (evaluation.tasks.mine.columns.group"),
    ],
)
def test_ethics_tasks_refuse_rows_that_cannot_be_asked(kind, document, fields, told):
    made = None if document is None else Document("a", 1, **document)
    with pytest.raises(RowError) as refused:
        task(kind, path="x").prepare_case(TaskCase("a:1", made, fields))
    assert told in refused.value.message


def test_counterfactual_terms_of_a_file_extend_the_shipped_ones(tmp_path):
    (tmp_path / "terms.json").write_text(
        '{"pet": {"cat": {"pet": ["the cat"]}, "dog": {"pet": ["the dog", "the hound"]}}}'
    )
    kind = task("counterfactual", path="x", options={"terms": str(tmp_path / "terms.json")})
    case = TaskCase("a:1", None, {"template": "{pet} sings.", "attribute": "pet"})
    kind.prepare_case(case)
    assert not list(kind.problems())
    assert [(v.group, v.text, v.text[: v.scored_begin]) for v in case.fields["variants"]] == [
        ("cat", "The cat sings.", "The cat"),
        ("dog", "The dog sings.", "The dog"),
        ("dog", "The hound sings.", "The hound"),
    ]
    (tmp_path / "terms.json").write_text('{"pet": {"cat": {"pet": ["the cat"]}}}')
    assert "pet must have two groups" in next(
        task("counterfactual", options={"terms": str(tmp_path / "terms.json")}).problems()
    )


def test_ethics_tasks_of_a_model_without_a_run_need_its_training_rows(site, capsys):
    words = [f"model.path={site}/llama", "run.threads=1", f"to={site}/model"]
    for kind, told in (
        ("memorisation", "memorisation asks training rows: name their file"),
        ("membership", "options.others: not set"),
    ):
        assert command_here(["evaluate", *words, f"evaluation.tasks=[{kind}]"]) == 64
        assert told in capsys.readouterr().err


def test_memorisation_rows_too_short_to_continue_are_an_error():
    class Asking:
        max_positions = None

        def encode_questions(self, documents):
            from trainer.evaluation.tasks.model_interface import Question

            return [Question(d.location, [1], [2, 3]) for d in documents]

    with pytest.raises(DataError, match=r"none of 1 rows leaves 8 tokens to continue"):
        task("memorisation").score_cases([TaskCase("a:1", Document("a", 1, text="b"))], Asking())


@pytest.mark.parametrize("kind", ["memorisation", "canary", "membership", "personal_data", "counterfactual"])
def test_every_metric_has_a_least_number_of_cases(kind):
    assert all(metric.min_cases > 1 for metric in task(kind, path="x").metrics)
