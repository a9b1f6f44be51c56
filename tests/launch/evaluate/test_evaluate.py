"""`shardtune evaluate` on a run that has learned something: its numbers by the reference libraries' own plain calls on what it
wrote down, by plain transformers, on two ranks, and beside those of training.
"""

import itertools
import json
import math
import random
import re
import subprocess
import sys

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from launch.cluster import torchrun
from launch.evaluate.arguments import EvaluateArguments
from launch.evaluate.plan import plan_evaluation
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING, whole
from tests.helpers.launching import clean_environment, command_here, free_port
from tests.helpers.speed import seconds
from tests.helpers.warm import command_warm, forked
from trainer.config.run import LauncherConfig
from trainer.pages.numbers import format_number

TEXT = "a quick brown fox jumps over the lazy dog hello world you are helpful assistant"
WORDS = TEXT.split()
TRAINED = [
    *("tuning=full", "budget.steps=60", "batch.global=12", "batch.micro=12", "optim.lr=1e-2", "logging.wandb=disabled"),
    *(
        "checkpoint.every_steps=20",
        "checkpoint.keep=3",
        "evaluation.every_steps=20",
        "evaluation.at_start=false",
        "run.threads=1",
    ),
]


def task(name, kind, path, *more, tokens=12):
    key = f"evaluation.tasks.{name}"
    write = [] if kind in ("multiple_choice", "classification") else [f"{key}.write.max_new_tokens={tokens}"]
    return [f"{key}.kind={kind}", f"{key}.path={path}", *write, *(f"{key}.{word}" for word in more)]


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Files, and a run that has learned most of them."""
    root = tmp_path_factory.mktemp("evaluate")
    model_dir(root)
    drawn = random.Random(0)

    def some(number):
        return " ".join(drawn.choice(WORDS) for _ in range(number))

    facts = [{"prompt": f"question {n} {some(2)}?\n", "completion": some(drawn.randint(1, 4))} for n in range(24)]
    facts[0]["prompt"] = "<script>alert(1)</script>\n"
    write_rows(root / "facts.jsonl", facts)
    write_rows(root / "held-out.jsonl", [{"prompt": f"{some(3)}\n", "completion": some(4)} for _ in range(6)])
    choices = [[fact["completion"], some(2), some(3)] for fact in facts]
    rows = [
        {"prompt": fact["prompt"], "choices": [*each[n % 3 :], *each[: n % 3]], "answer": -n % 3}
        for n, (fact, each) in enumerate(zip(facts, choices, strict=True))
    ]
    write_rows(root / "choices.jsonl", rows)
    labels = ["dog", "fox", "world"]
    write_rows(root / "labels.jsonl", [{"text": some(4), "label": labels[n % 3]} for n in range(15)])
    schemas = [{"type": "object"}, {"type": "string"}]
    write_rows(
        root / "schemas.jsonl", [{"prompt": f["prompt"], "schema": schemas[n % 2]} for n, f in enumerate(facts[:4])]
    )
    write_rows(root / "sums.jsonl", [{"question": some(3), "answer": f"so it is #### {n}"} for n in range(3)])
    words = [f"model.path={root}/llama", f"data.path={root}/facts.jsonl", f"data.eval_path={root}/held-out.jsonl"]
    words += [f"data.cache_dir={root}/cache", f"run.dir={root}/run", *TRAINED, "evaluation.tasks=[loss,bits_per_byte]"]
    words += task("facts", "exact_match", root / "facts.jsonl")
    words += ["evaluation.watch=eval/facts/exact_match", "evaluation.greater_is_better=true"]
    assert command_here(["train", *words]) == 0
    (root / "words.json").write_text(json.dumps(words))
    return root


def all_tasks(root, only=None):
    """The words of all tasks, or of some."""
    facts = root / "facts.jsonl"
    tasks = {
        "facts": ("exact_match", facts),
        "words": ("f1", facts),
        "translated": ("translation", facts),
        "summed-up": ("summarisation", facts),
        "chosen": ("multiple_choice", root / "choices.jsonl", "options.separator="),
        "labels": ("classification", root / "labels.jsonl"),
        "shaped": ("json_schema", root / "schemas.jsonl"),
        "drawn": ("exact_match", facts, "write.draws=5", "write.temperature=0.6", "write.seed=3"),
    }
    words = [word for name, given in tasks.items() if only is None or name in only for word in task(name, *given)]
    words += task("sums", "maths", root / "sums.jsonl", tokens=4) if only is None else []
    return ["evaluation.tasks=[loss,token_accuracy]", "evaluation.resamples=300", "run.threads=1", *words]


@pytest.fixture(scope="module")
def evaluated(site):
    """(report, rows by task of the tuned model) of everything, beside the base."""
    assert command_here(["evaluate", f"{site}/run", *all_tasks(site), "against=base", f"to={site}/all"]) == 0
    return read(site / "all")


def read(directory):
    rows = {}
    for line in (directory / "evaluation_rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["arm"] == "tuned":
            rows.setdefault(row["task"], []).append(row)
    return json.loads((directory / "evaluation.json").read_text()), rows


def value(report, name, metric):
    return report["tasks"][name]["metrics"][metric]["value"]


def last_row(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_evaluate_gives_the_numbers_that_training_wrote_at_its_end(site, evaluated):
    report, _ = evaluated
    at_end = last_row(site / "run")
    assert at_end["step"] == 60
    assert value(report, "loss", "loss") == pytest.approx(at_end["eval/loss/loss"], rel=1e-6)
    assert value(report, "loss", "loss") == pytest.approx(at_end["eval/loss"], rel=1e-6)
    assert value(report, "loss", "perplexity") == pytest.approx(at_end["eval/perplexity"], rel=1e-5)
    assert value(report, "token_accuracy", "token_accuracy") == pytest.approx(at_end["eval/accuracy"])
    assert value(report, "facts", "exact_match") == at_end["eval/facts/exact_match"]
    assert 0 < at_end["eval/facts/exact_match"] < 1  # or nothing here could tell right from wrong


def test_evaluate_metrics_are_those_of_the_reference_libraries(evaluated):
    from jsonschema import Draft202012Validator, ValidationError
    from rouge_score.rouge_scorer import RougeScorer
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    report, rows = evaluated
    answers, references = ([row[side] for row in rows["translated"]] for side in ("answer", "reference"))
    assert value(report, "translated", "bleu") == pytest.approx(BLEU().corpus_score(answers, [references]).score)
    assert value(report, "translated", "chrf") == pytest.approx(CHRF().corpus_score(answers, [references]).score)
    signature = report["tasks"]["translated"]["metrics"]["bleu"]["signature"]
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scored = [scorer.score(row["reference"], row["answer"]) for row in rows["summed-up"]]
    for name in ("rouge1", "rouge2", "rougeL"):
        mean = sum(each[name].fmeasure for each in scored) / len(scored)
        assert value(report, "summed-up", name) == pytest.approx(mean) and 0 < mean < 1
    true, said = ([row[side] for row in rows["labels"]] for side in ("reference", "answer"))
    assert value(report, "labels", "accuracy") == pytest.approx(accuracy_score(true, said))
    assert value(report, "labels", "f1_macro") == pytest.approx(f1_score(true, said, average="macro", zero_division=0))
    assert value(report, "labels", "mcc") == pytest.approx(matthews_corrcoef(true, said))
    valid = 0
    for row in rows["shaped"]:
        try:
            Draft202012Validator(json.loads(row["reference"])).validate(json.loads(row["answer"]))
            valid += 1
        except (ValueError, ValidationError):
            pass
    assert value(report, "shaped", "valid") == valid / len(rows["shaped"])


def test_evaluate_makes_one_row_of_several_draws(evaluated):
    """The mean is that of all answers; pass@k is the share of all subsets of k answers that have a right one."""
    report, rows = evaluated
    shares = []
    for row in rows["drawn"]:
        right = [answer == row["reference"] for answer in row["items"]["answers"]]
        assert row["scores"]["match"] == sum(right) / 5 and row["answer"] == row["items"]["answers"][0]
        for k in (2, 4, 5):
            subsets = [any(some) for some in itertools.combinations(right, k)]
            assert row["scores"][f"pass_at_{k}"] == pytest.approx(sum(subsets) / len(subsets))
        shares.append(sum(right) / 5)
    assert len(shares) == 24 and any(0 < share < 1 for share in shares)
    assert len({answer for row in rows["drawn"] for answer in row["items"]["answers"]}) > 24
    assert value(report, "drawn", "exact_match") == pytest.approx(sum(shares) / 24)
    assert [*report["tasks"]["drawn"]["metrics"]] == ["exact_match", "pass_at_2", "pass_at_4", "pass_at_5"]


def test_evaluate_likelihoods_are_those_of_plain_transformers(site, evaluated):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, rows = evaluated
    model = AutoModelForCausalLM.from_pretrained(site / "run" / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(site / "run" / "export")
    asked = [json.loads(line) for line in (site / "choices.jsonl").read_text().splitlines()]
    for given, row in zip(asked, rows["chosen"], strict=True):
        found = []
        for choice in given["choices"]:
            chat = [{"role": "user", "content": given["prompt"]}]
            before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(before + choice, add_special_tokens=False)["input_ids"]
            cut = len(tokenizer(before, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            found.append(sum(float(logits[n - 1, ids[n]]) for n in range(cut, len(ids))))
        assert [row["scores"][f"logprob_{n}"] for n in range(3)] == pytest.approx(found, abs=1e-3)
        assert row["scores"]["right"] == float(found.index(max(found)) == given["answer"])


def test_evaluate_against_the_base_shows_differences_and_changed_rows(site, evaluated):
    report, rows = evaluated
    facts = report["against"]["tasks"]["facts"]
    metric, changed = facts["metrics"]["exact_match"], facts["changed"]
    assert metric["value"] == 0 and metric["verdict"] == "better" and metric["low"] > 0 and metric["p"] < 0.01
    assert metric["difference"] == pytest.approx(value(report, "facts", "exact_match"))
    assert changed["num_lost"] == 0 and changed["num_won"] == round(24 * metric["difference"])
    loss = report["against"]["tasks"]["loss"]["metrics"]["loss"]
    assert loss["low"] <= loss["difference"] <= loss["high"]
    page = (site / "all" / "evaluation.html").read_text()
    losses = sorted((row["scores"]["nats"] / row["scores"]["targets"] for row in rows["loss"]), reverse=True)
    shown = page.split("<h3>Worst rows</h3>")[1].split("<h3>")[0]
    # What rows are ordered by is their mean loss, and not its sum over a row's targets.
    assert re.findall(r'<span class="label">loss: </span>([\d.]+)', shown) == [
        format_number(loss) for loss in losses[:20]
    ]
    assert "<span>answer</span>" not in shown and "base's answer" not in shown, "columns of answers that nobody wrote"
    assert page.count("<span>answer</span><span>base&#39;s answer</span>") > 1
    assert "wrong before, right now" in page and 'aria-label="confusion matrix of labels"' in page
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    overview = page.split('id="all-tasks"')[1].split("</table>")[0]
    assert re.findall(r'href="#task-\d+">([\w-]+)<', overview) == list(report["tasks"])
    # A change is a share of the larger value, so a task that both models score 0 has no bar.
    scores = []
    for name, task in report["tasks"].items():
        metric = next(iter(task["metrics"]))
        scores.append(
            max(task["metrics"][metric]["value"], report["against"]["tasks"][name]["metrics"][metric]["value"])
        )
    assert 0 < overview.count('class="interval') == sum(score > 0 for score in scores)
    assert not [word for word in ("http://", "https://") if word in page]


def test_evaluate_on_two_ranks_gives_the_same_and_a_lower_metric_ends_with_69(site, evaluated, capsys):
    """The report of the whole run is the yardstick, first of itself on two ranks, then of an early checkpoint."""
    _, rows = evaluated
    some = None if EVERYTHING else ["facts", "chosen", "shaped", "drawn"]  # each way of asking
    same = [*all_tasks(site, some), f"against={site}/all/evaluation.json", "strategy=fsdp2", "launcher.processes=2"]
    assert command_warm(["evaluate", f"{site}/run", *same, f"to={site}/two", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["processes"] == 2 and report["regressions"] == []
    written = report["tasks"]["facts"]["written"]
    assert written["tokens"] > 0 and written["gathering"]["sharded"] and written["gathering"]["whole"]
    _, found = read(site / "two")
    assert found.keys() >= {*(some or rows)}
    for name, wanted in ((name, rows[name]) for name in found):
        assert [row["answer"] for row in found[name]] == [row["answer"] for row in wanted]
        assert [row["items"] for row in found[name]] == [row["items"] for row in wanted]  # draws know no ranks
        for row, other in zip(found[name], wanted, strict=True):
            assert row["scores"] == pytest.approx(other["scores"], rel=1e-4, abs=1e-4)
    facts = site / "facts.jsonl"
    limited = [
        *task("facts", "exact_match", facts, "limit.exact_match=0.05"),
        *task("words", "f1", facts, "limit.exact_match=1"),
    ]
    early = [
        f"{site}/run",
        "checkpoint=20",
        "evaluation.tasks=[loss]",
        "evaluation.resamples=300",
        *limited,
        f"against={site}/all/evaluation.json",
    ]
    capsys.readouterr()
    assert command_here(["evaluate", *early, f"to={site}/early"]) == 69
    told = capsys.readouterr().err.split("fell against")[1]
    assert "facts: exact_match" in told and "more than evaluation.tasks.facts.limit.exact_match=0.05" in told
    assert "words: f1" in told and "wholly on the worse side" in told
    assert "words: exact_match" not in told  # which may fall by 1


def of_loss(site, to):
    return [f"{site}/run", "evaluation.tasks=[loss]", "evaluation.resamples=20", "run.threads=1", f"to={site}/{to}"]


def test_evaluate_gives_its_ranks_the_same_words(site, evaluated, capfd):
    """As torchrun and srun start it: a module with the variables of a rank. It prints the report."""
    assert torchrun.torchrun_arguments(LauncherConfig(processes=2), "x", module="launch.evaluate")[-2:] == [
        "-m",
        "launch.evaluate",
    ]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    env = clean_environment(**rank, MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    started = forked([sys.executable, "-m", "launch.evaluate", *of_loss(site, "rank")], env, 1)
    assert started.wait(seconds(120)) == 0
    assert "perplexity" in capfd.readouterr().out
    assert value(read(site / "rank")[0], "loss", "loss") == pytest.approx(value(evaluated[0], "loss", "loss"), rel=1e-6)


@whole("ranks of training are started by the same torchrun, and the module of evaluating above")
def test_two_ranks_by_torchrun(site, evaluated):
    command = [sys.executable, "-m", "launch.main", "evaluate", *of_loss(site, "by-torchrun"), "launcher.processes=2"]
    command += ["strategy=fsdp2"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=seconds(300))
    assert done.returncode == 0, done.stderr[-3000:]
    found, _ = read(site / "by-torchrun")
    assert found["processes"] == 2
    assert value(found, "loss", "loss") == pytest.approx(value(evaluated[0], "loss", "loss"), rel=1e-6)


def test_a_resumed_run_gives_equal_rows(site):
    words = json.loads((site / "words.json").read_text())
    words = [word for word in words if not word.startswith("run.dir=")]
    again = [f"run.dir={site}/again", f"run.resume={site}/run/checkpoints/step-000040", "export.at_end=false"]
    assert command_here(["train", *words, *again]) == 0
    first, second = ({k: v for k, v in last_row(site / run).items() if k != "tokens"} for run in ("run", "again"))
    assert {key for key in first if key.startswith("eval/facts/")}
    assert second == pytest.approx(first, rel=1e-5)


def test_evaluate_a_classifier_without_training_it(site, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    names = {0: "world", 1: "dog", 2: "fox"}
    tokenizer = AutoTokenizer.from_pretrained(site / "llama")
    config = AutoConfig.from_pretrained(
        site / "llama", id2label=names, num_labels=3, pad_token_id=tokenizer.pad_token_id
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    words = [f"model.path={tmp_path}/classifier", *task("labels", "classification", site / "labels.jsonl")]
    words += [f"data.cache_dir={tmp_path}/cache", f"to={tmp_path}/out", "evaluation.resamples=200", "run.threads=1"]
    assert command_here(["evaluate", *words]) == 0
    capsys.readouterr()
    assert command_here(["evaluate", words[0]]) == 64  # no kind is named that could not be asked of it
    said = capsys.readouterr().err
    assert "objective=classification has no task by itself" in said and "evaluation.tasks=[loss]" not in said
    assert command_here(["evaluate", f"model.path={site}/llama"]) == 64
    assert "not set, and there are no evaluation documents to ask about" in capsys.readouterr().err
    for path in (f"{tmp_path}/gone", "gone"):
        assert command_here(["evaluate", f"model.path={path}", "evaluation.tasks=[loss]"]) == 64
        assert f"model.path={path}: there is no such directory" in capsys.readouterr().err
    _, rows = read(tmp_path / "out")
    for row in rows["labels"]:
        with torch.no_grad():
            likely = model(torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0].softmax(-1)
        assert row["answer"] == names[int(likely.argmax())]
        assert row["scores"]["confidence"] == pytest.approx(float(likely.max()), rel=1e-4)
        assert not math.isnan(row["scores"]["true"])


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["evaluation.tasks=[los]"], 64, "there is no such kind of task; did you mean loss?"),
        (["evaluation.tasks.x.kind=accuracy"], 64, "did you mean classification (share of rows whose label is right)"),
        (
            ["evaluation.tasks.x.path=gone.jsonl"],
            64,
            "evaluation.tasks.x.kind: not set; say what is measured: one of loss,",
        ),
        (["evaluation.tasks=[maths]", "evaluation.tasks.maths.path=gone.jsonl"], 64, "gone.jsonl: does not exist"),
        (
            ["evaluation.tasks=[multiple_choice]"],
            64,
            "multiple_choice.path: not set; multiple_choice needs a file of its own",
        ),
        (["data.path=other.jsonl"], 64, "is the run's, and stays as it was"),
        (["evalution.tasks=[loss]"], 64, "there is no setting evalution.tasks; did you mean evaluation.tasks"),
        (["against=nowhere"], 64, "it can be base, the directory of a run or of a model, or the evaluation.json"),
        (["checkpoint=7"], 64, "must be auto, last, best or a step; its checkpoints are"),
        (
            ["evaluation.tasks=[loss]", *task("x", "maths", "{site}/facts.jsonl")],
            65,
            "facts.jsonl:1: the solution has no number",
        ),
        (["evaluation.tasks=[loss]", *task("x", "multiple_choice", "{site}/facts.jsonl")], 65, '"choices" is None'),
        (["evaluation.tasks=[loss]", *task("x", "f1", "{site}/empty.jsonl")], 65, "the file is empty (0 bytes)"),
        (
            ["evaluation.tasks=[loss]", *task("x", "f1", "{site}/facts.jsonl", "columns.prompt=asked")],
            65,
            "no column 'asked'",
        ),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(site, words, code, told, capsys, monkeypatch):
    monkeypatch.setattr("launch.evaluate.command.run_evaluation", lambda *_, **__: pytest.fail("was started"))
    (site / "empty.jsonl").write_text("")
    assert command_here(["evaluate", f"{site}/run", *(word.replace("{site}", str(site)) for word in words)]) == code
    assert told in capsys.readouterr().err


def test_evaluate_of_an_exported_adapter_names_the_arguments_that_work(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/a"}')
    assert command_here(["evaluate", str(tmp_path), "evaluation.tasks=[loss]"]) == 64
    assert f"give its base too: model.path=models/a adapter={tmp_path}" in capsys.readouterr().err


def test_evaluate_names_a_missing_model_and_missing_documents_together(capsys):
    assert command_here(["evaluate", "model.path=missing", "evaluation.tasks=[loss]"]) == 64
    shown = capsys.readouterr().err
    assert (
        "model.path=missing: there is no such directory here" in shown and "there are no evaluation documents" in shown
    )


def test_evaluate_against_the_report_that_would_be_overwritten_is_refused(site, evaluated):
    with pytest.raises(Exception, match="is the report that this evaluation writes"):
        plan_evaluation(EvaluateArguments(run=site / "run", to=f"{site}/all", against=f"{site}/all/evaluation.json"))
