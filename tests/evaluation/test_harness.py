"""Tasks of lm-evaluation-harness: the numbers of our engine are those of the harness's own `hf` model on the same weights, on one
rank and on two, and what cannot be read here is refused before anything starts.
"""

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.building import model_dir
from tests.helpers.endpoint import as_vllm_says, serving
from tests.helpers.launching import command_here
from tests.helpers.warm import command_warm
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.registry import TASK_KINDS

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra lm_eval)")

TEXT = "a quick brown fox jumps over the lazy dog hello world you are helpful assistant"
WORDS = TEXT.split()
KEY = "evaluation.tasks"
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: ROOT/choices.jsonl, train: ROOT/shots.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: ROOT/facts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
generation_kwargs: {until: ["lazy"], max_gen_toks: 8, do_sample: false}
filter_list:
  - {name: first-word, filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: ROOT/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
BOTH = """
group: both
task: [choose, {task: fewer}]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Data, tasks, and a run that has learned some of the answers, asked them at its end."""
    root = tmp_path_factory.mktemp("harness")
    model_dir(root)
    drawn = random.Random(0)

    def some(number):
        return " ".join(drawn.choice(WORDS) for _ in range(number))

    def rows(name, made):
        (root / name).write_text("".join(f"{json.dumps(row)}\n" for row in made))

    facts = [{"question": f"{some(2)} {n}:", "answer": drawn.choice(WORDS)} for n in range(16)]
    wrong = [drawn.sample([word for word in WORDS if word != fact["answer"]], 2) for fact in facts]
    choices = [
        {"question": f["question"], "choices": [*w[: n % 3], f["answer"], *w[n % 3 :]], "answer": n % 3}
        for n, (f, w) in enumerate(zip(facts, wrong, strict=True))
    ]
    rows("facts.jsonl", facts)
    rows("choices.jsonl", choices[2:])
    rows("shots.jsonl", choices[:2])
    rows("fewer.jsonl", choices[9:])
    rows("texts.jsonl", [{"text": some(drawn.randint(5, 180))} for _ in range(5)])
    rows("train.jsonl", [{"text": f"{fact['question']} {fact['answer']} lazy"} for fact in facts])
    (root / "tasks").mkdir()
    fewer = CHOOSE.replace("task: choose", "task: fewer").replace("choices.jsonl", "fewer.jsonl")
    for name, text in {"choose": CHOOSE, "answers": ANSWERS, "texts": TEXTS, "fewer": fewer, "both": BOTH}.items():
        (root / "tasks" / f"{name}.yaml").write_text(text.replace("ROOT", str(root)))
    words = [f"model.path={root}/llama", f"data.path={root}/train.jsonl", "objective=pretrain", "tuning=full"]
    words += ["budget.steps=45", "batch.global=16", "batch.micro=16", "optim.lr=1e-2", "logging.wandb=disabled"]
    words += [f"data.cache_dir={root}/cache", f"run.dir={root}/run", "run.threads=1", f"{KEY}=[lm_eval:answers]"]
    words += [f"{KEY}.answers.path={root}/tasks", "evaluation.watch=eval/answers/exact_match_first_word"]
    assert command_here(["train", *words]) == 0
    return root


def asked(root, *more):
    named = "[lm_eval:choose,lm_eval:answers,lm_eval:texts,lm_eval:both,lm_eval:talked]"
    words = [f"{root}/run", f"{KEY}={named}", "evaluation.resamples=40", "run.threads=1", *more]
    words += [f"{KEY}.{name}.path={root}/tasks" for name in ("choose", "texts", "both", "talked")]
    words += [f"{KEY}.answers.path={root}/tasks/answers.yaml"]  # one file does as well as its directory
    return [*words, f"{KEY}.talked.options.task=choose", f"{KEY}.talked.options.chat_template=true"]


@pytest.fixture(scope="module")
def report(site):
    """The run beside its base on one rank."""
    assert command_here(["evaluate", *asked(site), "against=base", f"to={site}/one"]) == 0
    return json.loads((site / "one" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def own(site):
    """What the harness itself says of the exported weights, by its `hf` model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
        ):  # an engine of an earlier test leaves them; accelerate would wait for ranks
            patch.delenv(name, raising=False)
        model = HFLM(pretrained=str(site / "run" / "export"), device="cpu", dtype="float32", batch_size=4)
        manager = TaskManager(include_path=str(site / "tasks"), include_defaults=False)

        def results(tasks, **more):
            return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=10, **more)

        plain = results(["choose", "answers", "texts"])["results"]
        both, talked = results(["both"]), results(["choose"], apply_chat_template=True)["results"]
        return {**plain, "both": both["groups"]["both"], "talked": talked["choose"]}


def test_lm_eval_numbers_are_those_of_its_own_hf_model(report, own):
    """Accuracy and matches exactly, likelihoods to 1e-6; also with a chat template, and of a group."""
    same = 0
    for name, task in report["tasks"].items():
        for key, value in own[name].items():
            metric, _, filter_key = key.partition(",")
            ours = metric if filter_key == "none" else f"{metric}_{filter_key.replace('-', '_')}"
            if ours not in task["metrics"]:
                continue
            found = task["metrics"][ours]
            assert found["value"] == pytest.approx(value, rel=1e-6 if name == "texts" else 1e-12), (name, key)
            if "stderr" in found:
                assert found["stderr"] == pytest.approx(own[name][f"{metric}_stderr,{filter_key}"], rel=1e-9)
                same += 1
    assert same == 2 + 2 + 1 + 2
    metrics = {
        name: {m: each["value"] for m, each in task["metrics"].items()} for name, task in report["tasks"].items()
    }
    assert [*metrics["choose"]] == ["acc", "acc_norm", "mcc"] and 0 < metrics["choose"]["acc"] < 1
    assert 0 < metrics["answers"]["exact_match_first_word"] < 1 and metrics["answers"]["chrf_first_word"] > 0
    assert [*metrics["texts"]] == ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    assert {"acc", "acc/choose", "acc/fewer"} <= metrics["both"].keys()


def test_lm_eval_rows_are_paired_with_those_of_the_base(site, report):
    apart = report["against"]["tasks"]["answers"]
    metric = apart["metrics"]["exact_match_first_word"]
    assert apart["paired"] and metric["value"] == 0 and metric["verdict"] == "better" and metric["p"] < 0.05
    assert apart["changed"]["num_won"] == round(16 * metric["difference"]) > 0
    assert report["against"]["tasks"]["choose"]["metrics"]["mcc"]["low"] is not None
    assert report["tasks"]["choose"]["metrics"]["acc"]["signature"].startswith("lm-eval:0.4.")
    page = (site / "one" / "evaluation.html").read_text()
    assert "standard errors as lm-eval computes them" in page and "wrong before, right now" in page


def test_lm_eval_tasks_in_training_give_the_numbers_of_the_verb(site, report):
    last = json.loads((site / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for metric, each in report["tasks"]["answers"]["metrics"].items():
        assert last[f"eval/answers/{metric}"] == pytest.approx(each["value"], rel=1e-9)


def test_two_ranks_share_the_requests_under_fsdp2(site, report):
    words = asked(
        site, "strategy=fsdp2", "launcher.processes=2", f"to={site}/two", f"against={site}/one/evaluation.json"
    )
    assert command_warm(["evaluate", *words]) == 0
    two = json.loads((site / "two" / "evaluation.json").read_text())
    assert two["processes"] == 2 and two["tasks"]["answers"]["written"]["gathering"]["sharded"]
    assert all(each["paired"] for each in two["against"]["tasks"].values())
    for name, task in report["tasks"].items():
        for metric, each in task["metrics"].items():
            assert two["tasks"][name]["metrics"][metric]["value"] == pytest.approx(each["value"], rel=1e-6), (
                name,
                metric,
            )


def test_lm_eval_through_a_server_gives_the_numbers_of_the_same_weights_loaded_here(site, report):
    """Likelihoods and answers through /v1/completions of a stub that answers as vLLM does; texts are longer than the model."""
    words = asked(site, f"model.path={site}/run/export", f"to={site}/served")[1:]
    with serving(complete=as_vllm_says(site / "run" / "export")) as stub:
        stub.models = [{"id": "tuned", "root": str(site / "run" / "export")}]
        assert command_here(["evaluate", *words, f"evaluation.server={stub.url}"]) == 0
        bodies = stub.sent("/v1/completions")
    assert any(body.get("echo") for body in bodies) and any(body.get("stop") for body in bodies)
    served = json.loads((site / "served" / "evaluation.json").read_text())
    for name, task in report["tasks"].items():
        for metric, each in task["metrics"].items():
            assert served["tasks"][name]["metrics"][metric]["value"] == pytest.approx(each["value"], rel=1e-5), (
                name,
                metric,
            )


CASES = [
    ([f"{KEY}=[lm_eval:arc_easyy]"], "arc_easyy: lm-evaluation-harness has no such task; did you mean arc_easy"),
    ([f"{KEY}=[lm_eval:arc_easy]"], "would fetch dataset_path=allenai/ai2_arc (ARC-Easy) from a hub"),
    ([f"{KEY}=[lm_eval:choose]", f"{KEY}.choose.path=SITE/gone"], "SITE/gone: there is no such file or directory"),
    (
        [f"{KEY}=[lm_eval:choose]", f"{KEY}.choose.path=SITE/tasks", f"{KEY}.choose.limit.ac=1"],
        "has no such metric; it has acc",
    ),
    (
        [f"{KEY}=[lm_eval:answers]", f"{KEY}.answers.path=SITE/tasks", f"{KEY}.answers.write.max_new_tokens=3"],
        "how answers are written is the harness's task's to say",
    ),
    (
        [
            f"{KEY}=[lm_eval:answers]",
            f"{KEY}.answers.path=SITE/tasks",
            f"{KEY}.answers.options.generation={{nucleus: 3}}",
        ],
        "generation_kwargs has nucleus, which this engine has not",
    ),
    (
        [f"{KEY}=[lm_eval:moved]", f"{KEY}.moved.path=SITE/bad/moved.yaml"],
        "moved: dataset_kwargs.data_files=nowhere.jsonl does not exist",
    ),
    ([f"{KEY}=[lm_eval:metered]", f"{KEY}.metered.path=SITE/bad/metered.yaml"], "metric meteor is not lm-eval's"),
    ([f"{KEY}=[lm_eval:torn]", f"{KEY}.torn.path=SITE/bad/torn.yaml"], "torn.yaml: cannot be read"),
    ([f"{KEY}=[lm_eval:coded]", f"{KEY}.coded.path=SITE/bad/coded.yaml"], "runs what the model writes as code"),
]


@pytest.mark.parametrize(("words", "told"), CASES)
def test_lm_eval_task_or_data_that_is_missing_is_refused_before_a_model_is_loaded(
    site, words, told, capsys, monkeypatch
):
    monkeypatch.setattr("launch.evaluate.command.run_evaluation", lambda *_, **__: pytest.fail("was started"))
    monkeypatch.setattr(
        "trainer.evaluation.harness.task_files._full_index", lambda: {"arc_easy": None}
    )  # which takes 10 s
    bad = site / "bad"
    bad.mkdir(exist_ok=True)
    texts = {
        "moved": ANSWERS.replace("ROOT/facts.jsonl", "nowhere.jsonl").replace("task: answers", "task: moved"),
        "metered": ANSWERS.replace("metric: chrf", "metric: meteor").replace("task: answers", "task: metered"),
        "torn": "task: [torn",
        "coded": f"{ANSWERS}\nunsafe_code: true\n",
    }
    for name, text in texts.items():
        (bad / f"{name}.yaml").write_text(text.replace("ROOT", str(site)))
    here = [word.replace("SITE", str(site)) for word in words]
    assert command_here(["evaluate", f"{site}/run", *here]) == 64
    assert told.replace("SITE", str(site)) in capsys.readouterr().err


def test_a_data_set_of_a_hub_is_named_in_the_report():
    assert TASK_KINDS["lm_eval"]("arc_easy", TaskConfig(kind="lm_eval")).data_source == "hub:allenai/ai2_arc"
    several = TASK_KINDS["lm_eval"]("mine", TaskConfig(kind="lm_eval", options={"task": "ai2_arc"}))
    assert {*several.task_files.single_tasks} == {
        "arc_easy",
        "arc_challenge",
    } and several.data_source == "hub:allenai/ai2_arc"


def test_without_the_package_the_extra_is_named(site, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("trainer.evaluation.tasks.harness.find_spec", lambda name: None)
    monkeypatch.setattr("trainer.evaluation.tasks.registry.find_spec", lambda name: None)
    assert command_here(["evaluate", f"{site}/run", f"{KEY}=[lm_eval:arc_easy]"]) == 64
    assert "needs lm_eval; pip install -e '.[lm_eval]'" in capsys.readouterr().err
    assert Path(site / "run").exists()
