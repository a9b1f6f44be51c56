"""Answers by a server: what it is sent, and that its answers and likelihoods give the numbers of the model loaded here."""

import json

import pytest

from strategies.errors import ConfigError
from tests.helpers.building import model_dir
from tests.helpers.endpoint import as_vllm_says, serving
from tests.helpers.launching import command_here
from trainer.evaluation.base import DecodingConfig
from trainer.evaluation.endpoint.client import Client
from trainer.evaluation.endpoint.config import EndpointConfig
from trainer.evaluation.served import ServedAnswerGenerator, find_served_model


@pytest.fixture(scope="module", name="site")
def _site(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    model_dir(root)
    facts = [{"prompt": f"question {n}?\n", "completion": "hello world"} for n in range(5)]
    choices = [{"question": f"what {n}?", "choices": ["a dog", "the fox", "you"], "answer": n % 3} for n in range(5)]
    for name, rows in (("facts", facts), ("choices", choices)):
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


@pytest.fixture(scope="module", name="stub")
def _stub(site):
    with serving(complete=as_vllm_says(site / "llama")) as stub:
        stub.models = [{"id": "other", "root": "/models/other"}, {"id": "tuned", "root": str(site / "llama")}]
        yield stub


def test_served_model_gives_the_numbers_of_the_same_model_loaded_here(site, stub, capsys):
    words = [f"model.path={site}/llama", "run.threads=1", "evaluation.resamples=100"]
    for name, kind in (("facts", "f1"), ("choices", "multiple_choice")):
        words += [f"evaluation.tasks.{name}.kind={kind}", f"evaluation.tasks.{name}.path={site}/{name}.jsonl"]
    words += ["evaluation.tasks.facts.write.max_new_tokens=6"]
    reports = {}
    for name, more in (("here", []), ("there", [f"evaluation.server={stub.url}"])):
        assert command_here(["evaluate", *words, *more, f"to={site}/{name}"]) == 0
        lines = (site / name / "evaluation_rows.jsonl").read_text().splitlines()
        reports[name] = [(row["answer"], row["scores"]) for row in map(json.loads, lines)]
    for (answer, scores), (other, theirs) in zip(reports["here"], reports["there"], strict=True):
        assert answer == other and scores == pytest.approx(theirs, abs=1e-3)
    assert {body["model"] for body in stub.sent("/v1/completions")} == {"tuned"}
    assert "written by tuned at http://" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["evaluation.tasks=[loss]", "data.eval_path={site}/facts.jsonl"],
            "asks for losses or tokens that no server tells",
        ),
        (
            [
                "evaluation.tasks.x.kind=f1",
                "evaluation.tasks.x.path={site}/facts.jsonl",
                "evaluation.server.model=mine",
            ],
            "serves other, tuned; name one",
        ),
        (
            ["evaluation.tasks.x.kind=f1", "evaluation.tasks.x.path={site}/facts.jsonl", "against={site}/llama"],
            "evaluate the other first",
        ),
    ],
)
def test_served_model_refuses_what_no_server_can_do(site, stub, words, told, capsys):
    asked = [word.replace("{site}", str(site)) for word in words]
    assert (
        command_here(["evaluate", f"model.path={site}/llama", f"evaluation.server={stub.url}", f"to={site}/no", *asked])
        == 64
    )
    assert told in capsys.readouterr().err


def writer(stub, tokenizer=None):
    return ServedAnswerGenerator(
        Client(EndpointConfig(url=stub.url, parallel=1, retries=0), "evaluation.server"), "tuned", tokenizer
    )


def test_served_model_is_sent_the_tokens_and_the_sampling_settings(stub, monkeypatch):
    class Tokenizer:
        all_special_tokens = ("<end>",)

        def convert_tokens_to_ids(self, tokens):
            return [9 for _ in tokens]

    monkeypatch.setattr(stub, "complete", lambda body: {"text": f"{body['seed']}", "finish_reason": "length"})
    stub.requests.clear()
    how = DecodingConfig(max_new_tokens=3, temperature=0.7, top_p=0.9, top_k=5, draws=2, stop=["<end>", "\n"])
    answers = writer(stub, Tokenizer()).generate_answers(None, [[1, 2], [3]], how)
    first, *_, last = stub.sent("/v1/completions")
    assert first["prompt"] == [1, 2] and last["prompt"] == [3]
    said = {"max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stop": ["\n"], "stop_token_ids": [9]}
    assert said.items() <= first.items()
    assert len({one.text for one in answers}) == 4 and [(one.prompt_index, one.sample_index) for one in answers] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert not any(one.has_ended for one in answers)


def test_served_model_without_log_probabilities_of_prompts_is_reported(stub, monkeypatch):
    monkeypatch.setattr(
        stub, "complete", lambda _: {"text": "x", "logprobs": {"token_logprobs": [-1.0], "top_logprobs": None}}
    )
    with pytest.raises(ConfigError, match="tells no log-probabilities of a prompt's tokens"):
        writer(stub).likelihoods(None, [([1, 2], [3])])


@pytest.mark.parametrize("choices", [[], None, [{"index": 0, "finish_reason": "stop"}], [{"text": None}]])
def test_a_server_that_answers_without_text_is_a_sentence(stub, choices):
    answer = {"id": "1", "created": 1, "model": "x", "object": "text_completion", "choices": choices, "usage": {}}
    stub.failures = [(200, answer)]
    with pytest.raises(ConfigError, match="answers /v1/completions without a text"):
        writer(stub).generate_answers(None, [[1, 2]], DecodingConfig())
    stub.failures = [(200, answer)]
    with pytest.raises(ConfigError, match="tells no log-probabilities of a prompt's tokens"):
        writer(stub).likelihoods(None, [([1, 2], [3])])


def test_beams_of_a_task_are_refused(stub):
    with pytest.raises(ConfigError, match="4 beams are asked for"):
        writer(stub).generate_answers(None, [[1, 2]], DecodingConfig(beams=4))


def test_which_model_a_server_has(stub):
    client = Client(EndpointConfig(url=stub.url), "evaluation.server")
    assert find_served_model(client, "/elsewhere/other") == "other"  # of the same name
    with pytest.raises(ConfigError, match=r"serves other, tuned, of which 0 are named as model.path=/models/none"):
        find_served_model(client, "/models/none")
