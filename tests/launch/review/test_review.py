"""A review of a real run: the page in a browser, what was saved there scored, its gate; and everything that cannot be scored."""

import csv
import json
import random
import re
import shutil

import pytest

from tests.helpers.launching import command_here
from tests.launch.review import site


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return site.made(tmp_path_factory.mktemp("review"))


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def key_of(run):
    return json.loads((run / "review" / "key.json").read_text())


def save(run, name, vote):
    path = run.parent / f"{name}.json"
    path.write_text(json.dumps(site.answers(run, name, vote)))
    return str(path)


def result(run):
    return json.loads((run / "review" / "result.json").read_text())


def test_review_page_shows_every_pair_and_not_which_model_wrote_it(run):
    page, key = (run / "review" / "review.html").read_text(), key_of(run)["key"]
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    rows = [json.loads(line) for line in (run / "review/answers/tuned/evaluation_rows.jsonl").read_text().splitlines()]
    written = {arm: [row["answer"] for row in rows if row["arm"] == arm] for arm in ("tuned", "base")}
    prompts = [json.loads(line)["prompt"] for line in (run / "review/answers/prompts.jsonl").read_text().splitlines()]
    assert sorted(prompts) == sorted(site.PROMPTS) and len(data["items"]) == len(key["items"]) == 15
    for item, known in zip(data["items"], key["items"], strict=True):
        assert item["id"] == known["id"] and item["prompt"] == prompts[known["prompt"]]
        assert item[known["tuned"]] == written["tuned"][known["prompt"]]
        assert item["b" if known["tuned"] == "a" else "a"] == written["base"][known["prompt"]]
    first = {item["id"]: item for item in key["items"]}
    again = [item for item in key["items"] if item["repeats"]]
    assert len(again) == 3 and all(item["tuned"] != first[item["repeats"]]["tuned"] for item in again)
    assert {item["tuned"] for item in key["items"]} == {"a", "b"}
    for secret in (key["salt"], str(run.parent), "step-0", *(item["sha256"] for item in key["items"])):
        assert secret not in page
    assert not (run / "reports").exists(), "having answers written is no evaluation of the run"


def test_rated_in_a_browser_reloaded_saved_and_scored(run, browser, capsys):
    page = browser.open(run / "review" / "review.html")
    page.tab.fill("#name", "Ada")
    page.click("#begin")
    key = {item["id"]: item for item in key_of(run)["key"]["items"]}
    order = page.evaluate("data.items.map(each => each.id)")
    for number, item in enumerate(order):  # the tuned one is always better, said with keys
        assert page.evaluate("[item().id, place]") == [item, number]
        press = "1" if key[item]["tuned"] == "a" else "3"
        page.tab.keyboard.press(press)
        page.tab.keyboard.press("2" if number % 2 else press)
        if number == 4:
            page.tab.keyboard.press("c")
            page.tab.keyboard.type("both are odd 1")
            page.tab.keyboard.press("Escape")
            page.tab.reload()  # and goes on where it was
            assert page.evaluate("place") == 5 and page.texts("#count") == ["5 of 15"]
    assert page.texts("#count") == ["15 of 15"]
    script = site.PROMPTS[-1]
    assert (
        page.evaluate(
            f"(go(data.items.findIndex(each => each.prompt === {json.dumps(script)})), $('prompt').textContent)"
        )
        == script
    )
    with page.tab.expect_download() as download:
        page.click("#save")
    saved = run.parent / "ada.json"
    download.value.save_as(saved)
    assert not page.errors and not page.requests
    given = json.loads(saved.read_text())
    assert given["items"][order[5]]["comment"] == "both are odd 1" and all(
        each["seconds"] > 0 for each in given["items"].values()
    )

    assert command_here(["review", "score", str(run), str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "tuned against" in shown and "Krippendorff's nominal alpha" in shown
    metrics = result(run)["metrics"]
    assert metrics["win_rate"]["value"] == metrics["win_rate/base"]["value"] == 1.0
    half = [number % 2 for number, item in enumerate(order) if key[item]["repeats"] is None]
    assert metrics["win_rate/kind"]["value"] == pytest.approx(1 - sum(half) / len(half) / 2)
    assert json.loads((run / "run.json").read_text())["review"]["metrics"]["win_rate"]["value"] == 1.0
    assert (
        command_here(
            [
                "export",
                str(run),
                f"to={run.parent}/to",
                "gates={review/win_rate: '>0.99', review/win_rate/kind: '>0.9'}",
            ]
        )
        == 69
    )
    said = capsys.readouterr().err
    assert "review/win_rate/kind: 0.7" in said and "1 of 2 gates failed" in said


def test_review_of_several_reviewers_has_agreement_and_outliers(run, capsys):
    drawn = random.Random(1)
    ada = save(run, "ada", lambda item: "tuned" if item["prompt"] % 3 else "other")
    bert = save(run, "bert", lambda item: "tuned" if item["prompt"] % 3 != 1 else "tie")
    dice = save(run, "dice", lambda item: "tuned" if item["tuned"] == "a" else "other")  # always the left one
    assert command_here(["review", "score", str(run), ada, bert, dice, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    means = [((n % 3 > 0) + (1 if n % 3 != 1 else 0.5) + left) / 3 for n, left in lefts(run).items()]
    assert found["metrics"]["win_rate"]["value"] == pytest.approx(sum(means) / len(means))
    low, high = found["metrics"]["win_rate"]["low"], found["metrics"]["win_rate"]["high"]
    draws = sorted(sum(drawn.choices(means, k=len(means))) / len(means) for _ in range(4000))
    assert low == pytest.approx(draws[100], abs=0.03) and high == pytest.approx(draws[3900], abs=0.03)
    assert found["disagreements"] and found["metrics"]["num_reviewers"]["value"] == 3
    assert command_here(["review", "score", str(run), ada, bert]) == 0
    lines = {int(line) for line in re.findall(r"answers/prompts\.jsonl, line (\d+)\)", capsys.readouterr().out)}
    assert lines and all(line % 3 == 1 for line in lines), "they part where a prompt's number is divisible by three"
    assert command_here(["review", "score", str(run), ada, dice, "drop=[dice]"]) == 0
    assert result(run)["metrics"]["win_rate"]["value"] == pytest.approx(sum(n % 3 > 0 for n in range(12)) / 12)


def lefts(run):
    return {item["prompt"]: item["tuned"] == "a" for item in key_of(run)["key"]["items"] if item["repeats"] is None}


def test_review_scores_are_not_shown_while_answers_are_written(made):
    said = "".join(path.read_text() for path in (made / "review" / "answers").rglob("rank-0.log"))
    assert "tuned: answers: (12 rows" in said and "exact_match" not in said


def test_review_table_filled_in_with_a_spreadsheet_counts_as_a_page_does(run):
    path, key = run / "review" / "review.csv", {item["id"]: item for item in key_of(run)["key"]["items"]}
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [row["item"] for row in rows] == [*key]
    rows[0]["reviewer"] = "Eve"
    for row in rows:
        row["overall"] = key[row["item"]]["tuned"].upper()
    filled = run.parent / "eve.csv"
    with filled.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    assert command_here(["review", "score", str(run), str(filled)]) == 0
    metrics = result(run)["metrics"]
    assert metrics["win_rate"]["value"] == 1.0 and metrics["win_rate/kind"]["value"] is None


def test_review_table_without_a_column_for_comments_keeps_its_last_question(tmp_path):
    from launch.review.answers import _parse_csv

    header = ["review", "reviewer", "item", "overall", "kind"]
    for comment, cells in (("", ""), (";comment", ";well said")):
        table = f"{';'.join(header)}{comment}\nr1;Eve;i1;a;b{cells}\n"
        reviewer = _parse_csv(tmp_path / "eve.csv", table, "r1")
        assert reviewer.judgement_by_item["i1"].choice_by_question == {"overall": "a", "kind": "b"}
        assert reviewer.judgement_by_item["i1"].comment == cells.removeprefix(";")


def test_review_files_that_cannot_be_scored_are_all_named(run, capsys):
    good = save(run, "ada", lambda item: "tuned")
    twice = run.parent / "copy.json"
    twice.write_text((run.parent / "ada.json").read_text())
    torn = run.parent / "torn.json"
    torn.write_text((run.parent / "ada.json").read_text()[:200])
    other, odd = site.answers(run, "bert", lambda item: "tie"), site.answers(run, "carl", lambda item: "tie")
    other["review"] = "f" * 64
    (run.parent / "other.json").write_text(json.dumps(other))
    odd["items"]["0" * 12] = {"answers": {"overall": "a"}}
    (run.parent / "odd.json").write_text(json.dumps(odd))
    files = [str(run.parent / f"{name}.json") for name in ("copy", "torn", "other", "odd")]
    assert command_here(["review", "score", str(run), good, *files]) == 65
    said = capsys.readouterr().err
    assert "4 of 5 files of answers cannot be used" in said and "copy.json: is by ada, as" in said
    assert "torn.json:1: is no whole JSON" in said and "other.json: is of the review ffffffffffff" in said
    assert "odd.json: item 000000000000 is none of this review" in said and not (run / "review/result.json").exists()


def test_review_key_that_was_changed_is_refused_also_with_its_own_hash(run, capsys):
    from launch.review.sheet import review_id_of_key

    good, key = save(run, "ada", lambda item: "tuned"), key_of(run)
    for item in key["key"]["items"]:
        item["tuned"] = "a"
    (run / "review" / "key.json").write_text(json.dumps(key))
    assert command_here(["review", "score", str(run), good]) == 65
    assert "was changed since review make wrote it" in capsys.readouterr().err
    (run / "review" / "key.json").write_text(json.dumps({"review": review_id_of_key(key["key"]), "key": key["key"]}))
    assert command_here(["review", "score", str(run), good]) == 65
    assert "ada.json: is of the review" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["make", "RUN", "prompts=none.jsonl"], "exists and is not empty; a review is never written over"),
        (
            ["make", "RUN", "prompts=p", "to=new", "arms=[tuned]", "n=0"],
            "needs tuned, and something to compare it with",
        ),
        (["make", "RUN", "to=new"], "prompts: not set"),
        (["make", "RUN", "prompts=p", "to=new", "data.path=x"], "data.path=x: is the run's"),
        (["score", "RUN", "none.json"], "none.json: there is no such file"),
        (["score", "RUN", "/dev/null"], "/dev/null: is no ordinary file; name the files that reviewers saved"),
        (["score", "RUN", "."], ".: is a directory; name the files that reviewers saved"),
        (["score", "RUN"], "the files that reviewers saved"),
        (["mark", "RUN"], "must be review make or review score"),
    ],
)
def test_review_refuses_words_that_cannot_be_meant(made, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert command_here(["review", *(str(made) if word == "RUN" else word for word in words)]) == 64
    assert said in capsys.readouterr().err


def test_review_prompt_that_is_none_is_named_with_its_line(made, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert command_here(["review", "make", str(made), f"prompts={tmp_path}/p.jsonl", f"to={tmp_path}/new"]) == 65
    assert "p.jsonl:2: has no prompt; it needs one of messages, prompt" in capsys.readouterr().err
