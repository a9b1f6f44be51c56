"""Answers judged by a model behind an address: a real socket, the real client, and every way in which it goes wrong."""

import json
import re
from types import SimpleNamespace

import pytest

from strategies.errors import ConfigError, LimitReached
from tests.helpers.building import model_dir
from tests.helpers.endpoint import serving
from tests.helpers.launching import command_here
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.endpoint.client import EndpointFailed
from trainer.evaluation.endpoint.config import JudgeConfig
from trainer.evaluation.endpoint.judge import Judge
from trainer.evaluation.tasks.base import TaskCase, TaskRow, answers_by_key
from trainer.evaluation.tasks.judged import parse_grade
from trainer.evaluation.tasks.preference import PreferenceTask, pair_scores, parse_preference

ALONE = SimpleNamespace(world_size=1, is_main=True, simulated=False)


@pytest.fixture(scope="module", name="stub")
def _stub():
    with serving() as stub:
        yield stub


@pytest.fixture(autouse=True)
def _fresh(stub, monkeypatch):
    stub.requests.clear()
    stub.failures.clear()
    stub.key, stub.chat = None, lambda body: body["messages"][0]["content"].upper()
    monkeypatch.setenv("JUDGE_CREDENTIAL", "a-long-word-that-nobody-knows")


def judge(stub, cache, **settings):
    return Judge(JudgeConfig(url=stub.url, cache_dir=str(cache), **{"parallel": 1, "retries": 3, **settings}), ALONE)


def test_judge_does_not_ask_again_what_is_in_its_cache(stub, tmp_path):
    first = judge(stub, tmp_path, parallel=3)
    assert first.collect_verdicts(["a", "b", "a", "c"]) == ["A", "B", "A", "C"]
    assert (first.num_calls, first.num_tokens_used, first.num_cached) == (3, 30, 0) and len(
        stub.sent("/v1/chat/completions")
    ) == 3
    again = judge(stub, tmp_path, max_calls=0, model="judge-1")
    assert again.collect_verdicts(["c", "a"]) == ["C", "A"] and again.num_calls == 0
    other = judge(stub, tmp_path, temperature=1.0)
    other.collect_verdicts(["a"])
    assert other.num_calls == 1  # another setting is another question


def test_judge_retries_busy_servers_and_never_shows_its_key(stub, tmp_path):
    stub.key = "a-long-word-that-nobody-knows"
    stub.failures = [(429, {"error": {"message": "slow down"}}), (503, {})]
    asked = judge(stub, tmp_path, key_env="JUDGE_CREDENTIAL", model="judge-1")
    assert asked.collect_verdicts(["a"]) == ["A"] and len(stub.requests) == 3
    stub.key = "another one"
    with pytest.raises(
        ConfigError, match=r"evaluation.judge.key_env=JUDGE_CREDENTIAL: .*does not take the key \(401"
    ) as told:
        asked.collect_verdicts(["b"])
    assert "nobody-knows" not in str(told.value) and "[secret]" in str(told.value)
    stored = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert stored and "nobody-knows" not in stored


@pytest.mark.parametrize(
    ("failures", "kind", "told"),
    [
        ([(429, {"error": {"message": "quota"}})] * 4, EndpointFailed, r"answered 429 4 times \(quota\)"),
        ([(400, {"error": {"message": "too long"}})], ConfigError, r"refuses a request \(400: too long\)"),
        ([(404, {"error": {"message": "no such model"}})], ConfigError, r"404: no such model\); mend it, or"),
    ],
)
def test_judge_reports_what_a_server_refuses_in_its_words(stub, tmp_path, failures, kind, told):
    stub.failures = [*failures]  # it takes them out
    with pytest.raises(kind, match=told):
        judge(stub, tmp_path, model="judge-1").collect_verdicts(["a"])


def test_judge_at_an_address_where_nobody_listens_fails(tmp_path):
    lost = Judge(JudgeConfig(url="http://127.0.0.1:9/v1", model="x", retries=0, cache_dir=str(tmp_path)), ALONE)
    with pytest.raises(EndpointFailed, match="no answer after 1 attempts"):
        lost.collect_verdicts(["a"])


def test_judge_stops_at_its_budget_and_keeps_the_verdicts(stub, tmp_path):
    with pytest.raises(
        LimitReached, match=r"max_calls=2: 3 questions are to be asked, 0 were, and 0 are in the cache; nothing"
    ):
        judge(stub, tmp_path, max_calls=2).collect_verdicts(["a", "b", "c"])
    assert not stub.sent("/v1/chat/completions")
    with pytest.raises(LimitReached, match=r"max_tokens=15: used up \(20\), with 1 questions left"):
        judge(stub, tmp_path, max_tokens=15).collect_verdicts(["a", "b", "c"])
    rest = judge(stub, tmp_path, max_tokens=15)
    assert rest.collect_verdicts(["a", "b", "c"]) == ["A", "B", "C"] and rest.num_calls == 1


def said(content, **more):
    message = {"role": "assistant"} if content is None else {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "created": 1, "model": "judge-1", "object": "chat.completion", "choices": [choice], **more}


NO_TEXT = [said(None), {**said("x"), "choices": []}, {**said("x"), "choices": None}, {}, ["no", "object"], said([1])]


def test_judge_replies_without_tokens_or_text_end_no_run(stub, tmp_path):
    usages = [said("A", usage={}), said("A"), said("A", usage=None), said("A", usage={"total_tokens": None})]
    for number, body in enumerate([*usages, *NO_TEXT]):
        stub.failures = [(200, body)]
        asked = judge(stub, tmp_path, model="judge-1")
        assert asked.collect_verdicts([f"question {number}"]) == ["A" if number < len(usages) else ""]
        assert asked.num_tokens_used == 0
    stub.failures = [(200, said("A", usage={}))]
    with pytest.raises(ConfigError, match=r"max_tokens=15: the server at .* does not tell the tokens .* leave"):
        judge(stub, tmp_path, model="judge-1", max_tokens=15).collect_verdicts(["with a limit"])


def test_judge_server_of_several_models_needs_one_named(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(stub, "models", [{"id": "one"}, {"id": "two"}])
    with pytest.raises(ConfigError, match=r"evaluation.judge.model: not set, and .* serves one, two; name it"):
        judge(stub, tmp_path).collect_verdicts(["a"])


@pytest.mark.parametrize(
    ("verdict", "grade"),
    [
        ("It is right. Grade: 8", 8.0),
        ("Grade: 8.", 8.0),
        ("**Grade: 10.**", 10.0),
        ("Grade: 3, or rather:\nGrade: 4/10", 4.0),
        ("Grade: 7.5", None),
        ("Grade: 80", None),
        ("Grade: 10.5", None),
        ("It is right.", None),
    ],
)
def test_judge_grade_is_a_whole_number_that_a_full_stop_may_follow(verdict, grade):
    assert parse_grade(verdict) == grade


def test_judge_win_needs_the_same_verdict_in_both_orders():
    assert (
        parse_preference("Verdict: B, no\n**Verdict: A**") == 1 and parse_preference("verdict: A", swapped=True) == -1
    )
    assert parse_preference("Verdict: tie") == 0 and parse_preference("both are good") is None
    assert pair_scores(1, 1) == {"won": 1, "tied": 0, "swayed": 0, "read": 1}
    assert pair_scores(1, -1) == {"won": 0.5, "tied": 1, "swayed": 1, "read": 1}  # prefers whatever stands first
    assert pair_scores(-1, -1)["won"] == 0 and pair_scores(None, 1)["read"] == 0


def test_opponent_of_each_row_of_a_json_list_on_one_line_is_its_own():
    """They all have the same location, `rows.json:1`."""
    preferred = PreferenceTask("preferred", TaskConfig(kind="preference", options={"opponent": "other"}))
    cases = [TaskCase("rows.json:1"), TaskCase("rows.json:1"), TaskCase("more.json:1")]
    rows = [TaskRow(case.location, "?", answer, "", {}) for case, answer in zip(cases, "abc", strict=True)]
    preferred.opponent_answers = answers_by_key(rows)
    assert preferred._opponent_answers(cases) == ["a", "b", "c"]
    preferred.opponent_answers = answers_by_key([rows[0], rows[2]])
    with pytest.raises(ConfigError, match=r"has not answered rows\.json:1; ask it the same rows"):
        preferred._opponent_answers(cases)


def between(text, tag):
    return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL)[1]


def by_length(body):
    """A judge that grades by length, prefers the longer answer, and says nonsense of one request."""
    text = body["messages"][0]["content"]
    if "nonsense" in between(text, "request"):
        return "I would rather not say."
    if "<answer>" in text:
        return f"It is long.\n**Grade: {min(10, 1 + len(between(text, 'answer')))}**"
    one, two = len(between(text, "answer_A")), len(between(text, "answer_B"))
    return f"Compared.\nVerdict: {'tie' if one == two else 'A' if one > two else 'B'}"


def test_judge_answers_the_tasks_that_need_one(stub, tmp_path, monkeypatch, capsys):
    stub.chat = by_length
    model_dir(tmp_path)
    prompts = [f"question {n}?\n" for n in range(6)] + ["nonsense\n"]
    rows = [{"prompt": prompt, "completion": "hello world " * (n % 3)} for n, prompt in enumerate(prompts, 1)]
    for row in rows:
        row["completion"] = row["completion"] or "a"
    (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = [f"model.path={tmp_path}/llama", f"to={tmp_path}/out", "run.threads=1", f"evaluation.judge.url={stub.url}"]
    words += [f"evaluation.judge.cache_dir={tmp_path}/cache", "evaluation.judge.parallel=2"]
    for name, kind in (("graded", "judge"), ("preferred", "preference")):
        key = f"evaluation.tasks.{name}"
        words += [f"{key}.kind={kind}", f"{key}.path={tmp_path}/asked.jsonl", f"{key}.write.max_new_tokens=4"]
    assert command_here(["evaluate", *words]) == 0
    sent = len(stub.sent("/v1/chat/completions"))
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = {"graded": [], "preferred": []}
    for line in (tmp_path / "out" / "evaluation_rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        found[row["task"]].append(row)
    graded = [row for row in found["graded"] if row["scores"]["read"]]
    assert len(graded) == 6 and "rather not say" in found["graded"][-1]["note"]
    by_hand = [min(10, 1 + len(row["answer"])) for row in graded]
    assert [row["scores"]["grade"] for row in graded] == by_hand
    metrics = report["tasks"]["graded"]["metrics"]
    assert metrics["grade"]["value"] == pytest.approx(sum(by_hand) / 6) and metrics["read"]["value"] == pytest.approx(
        6 / 7
    )
    assert "judge:judge-1|temperature:0" in metrics["grade"]["signature"]
    pairs = [row for row in found["preferred"] if row["scores"]["read"]]
    won = [(len(r["answer"]) > len(r["reference"])) + 0.5 * (len(r["answer"]) == len(r["reference"])) for r in pairs]
    assert [row["scores"]["won"] for row in pairs] == won
    assert sent == 7 + 2 * 7  # each pair in both orders
    assert command_here(["evaluate", *words, "evaluation.judge.max_calls=0", "evaluation.judge.model=judge-1"]) == 0
    assert len(stub.sent("/v1/chat/completions")) == sent  # a second time costs nothing
    capsys.readouterr()
    assert command_here(["evaluate", *words, "evaluation.tasks.preferred.options.opponent=other"]) == 64
    assert "opponent=other: there is none; compare with against=base" in capsys.readouterr().err
    assert command_here(["evaluate", *words, "evaluation.judge.key_env=sk-123"]) == 64
    told = capsys.readouterr().err
    assert "is no name of an environment variable" in told and "sk-123" not in told.replace(
        "evaluation.judge.key_env=sk-123", ""
    )
    # the same model as its own opponent: every answer is the same, which nobody is asked about
    other = [
        *words,
        "evaluation.tasks.preferred.options.opponent=other",
        f"against={tmp_path}/llama",
        "evaluation.judge.max_calls=0",
    ]
    assert command_here(["evaluate", *other, "evaluation.judge.model=judge-1"]) == 0
    # Rows of a JSON list on one line share a location, and still meet their own answers.
    (tmp_path / "asked.json").write_text(json.dumps(rows))
    one_line = [word.replace("asked.jsonl", "asked.json") for word in other if ".graded." not in word]
    assert command_here(["evaluate", *one_line, "evaluation.judge.model=judge-1"]) == 0
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["tasks"]["preferred"]["metrics"]["win_rate"]["value"] == 0.5
