"""The server on exports of real runs, asked by the `openai` client: answers, refusals, many at a time."""

import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from launch.serve.config import ServeConfig
from launch.serve.exported import find_export
from launch.serve.run import bind_socket, load_server, server_url
from tests.helpers.covering import EVERYTHING
from tests.helpers.speed import seconds
from trainer.export.load import load_export

KEY = "secret-of-the-test"
PATIENCE_S = 60
"""Seconds for an answer; httpx's own are five."""
ASK = [{"role": "user", "content": "hello there"}]


@contextmanager
def started(export, **settings):
    """(address up to /v1, the server) with the model loaded."""
    config = ServeConfig(port=0, device="cpu", dtype="float32", **settings)
    assert not [*config.problems()]
    listening = bind_socket(config)
    running = load_server(find_export(str(export)), config, listening).server
    thread = threading.Thread(target=lambda: running.run(sockets=[listening]), daemon=True)
    thread.start()
    try:
        yield server_url(config, listening), running
    finally:
        running.should_exit = True
        thread.join(seconds(30))
        listening.close()


def asked(method, server_url, **given):
    """What the server answers."""
    return httpx.request(method, server_url, timeout=seconds(PATIENCE_S), **given)


@pytest.fixture(scope="module", name="place")
def _place(site):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_SERVE_KEY", KEY)
        with started(site / "lora", key_env="TEST_SERVE_KEY", max_tokens=32, max_body_kib=64) as (url, running):
            yield url, running


@pytest.fixture(name="client")
def _client(place):
    return openai.OpenAI(base_url=place[0], api_key=KEY, max_retries=0, timeout=seconds(PATIENCE_S))


@pytest.fixture(scope="module", name="alone")
def _alone(site):
    """The same export by plain peft, greedy, without our room."""
    model, tokenizer = load_export(site / "lora" / "export"), AutoTokenizer.from_pretrained(site / "lora" / "export")

    def answer(prompt, tokens, ends):
        ids = torch.tensor([prompt])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=2,
        )
        return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    return answer, tokenizer


def test_server_answers_as_plain_peft_does(client, alone):
    answer, tokenizer = alone
    ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    chat = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    said = client.chat.completions.create(model="lora", messages=ASK, max_tokens=12)
    assert said.model == "lora" and said.choices[0].message.content == answer(chat, 12, ends)
    assert said.usage.prompt_tokens == len(chat)
    texts = set()
    for prompt in ("hello", "you are", "the quick brown fox"):
        said = client.completions.create(model="lora", prompt=prompt, max_tokens=6)
        assert said.choices[0].text == answer(tokenizer(prompt)["input_ids"], 6, ends)
        texts.add(said.choices[0].text)
    assert len(texts) > 1 and "".join(texts)
    assert [each.id for each in client.models.list()] == ["lora"]


def readable(*parts):
    """The text without what is no character, of which a stream shows more or less."""
    return "".join(part.choices[0].text for part in parts if part.choices).replace("\ufffd", "")


def test_server_stream_has_the_same_text_and_its_usage(client):
    words = {"model": "lora", "prompt": "you are", "max_tokens": 8}
    whole = client.completions.create(**words)
    parts = [*client.completions.create(**words, stream=True, stream_options={"include_usage": True})]
    assert readable(*parts) == readable(whole)
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_server_seed_holds_for_its_own_answer_and_temperature_draws(client):
    def draw(seed):
        words = {"model": "lora", "prompt": "hello", "max_tokens": 8, "temperature": 2.0, "seed": seed}
        return client.completions.create(**words).choices[0].text

    alone = [draw(seed) for seed in range(4)]
    assert len(set(alone)) > 1, "another seed, another answer"
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(draw, [0, 1, 2, 3] * 2)] == alone * 2


def test_text_ends_before_a_stop(client):
    whole = client.completions.create(model="lora", prompt="you are", max_tokens=12).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    said = client.completions.create(model="lora", prompt="you are", max_tokens=12, stop=[stop, "never seen"])
    assert said.choices[0].text == whole[: whole.index(stop)] and said.choices[0].finish_reason == "stop"


def test_a_stream_ends_before_a_stop(client):
    words = {"model": "lora", "prompt": "you are", "max_tokens": 12}
    whole = client.completions.create(**words).choices[0].text
    stop = whole[len(whole) // 2 :][:2]
    cut = client.completions.create(**words, stop=[stop, "never seen"]).choices[0]
    parts = [*client.completions.create(**words, stop=[stop, "never seen"], stream=True)]
    assert readable(*parts) == cut.text.replace("\ufffd", "")
    assert parts[-1].choices[0].finish_reason == "stop"
    asked = {"model": "lora", "messages": ASK, "max_tokens": 12}
    answer = client.chat.completions.create(**asked, stop=["never seen"]).choices[0].message.content
    stream = client.chat.completions.create(**asked, stop=["never seen"], stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    assert text.replace("\ufffd", "") == answer.replace("\ufffd", "")


BAD = {
    "another model": ({"model": "gpt2"}, 404, "'lora' alone"),
    "no messages": ({"messages": []}, 400, "messages: must be a list"),
    "a role": ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages[0].role"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "reads text"),
    "too long": ({"messages": [{"role": "user", "content": "hello " * 600}]}, 400, "takes 512 together"),
    "too many tokens": ({"max_tokens": 33}, 400, "from 1 to 32 (serve.max_tokens)"),
    "no tokens": ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    "heat": ({"temperature": 3}, 400, "from 0 to 2"),
    "top_p": ({"top_p": 0}, 400, "top_p"),
    "two answers": ({"n": 2}, 400, "n: this server computes only 1"),
    "a penalty": ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    "likelihoods": ({"logprobs": True}, 400, "logprobs"),
    "a form": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "own settings": ({"extra_body": {"generation_config": "{}"}}, 400, "knows no such field"),
    "an own template": ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, 400, "no word of a template"),
}


@pytest.mark.parametrize("case", BAD)
def test_server_refuses_clearly_what_it_cannot_do(client, case):
    changed, status, said = BAD[case]
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "lora", "messages": ASK, **changed})
    assert caught.value.status_code == status and said in str(caught.value)
    assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")


def test_server_opens_only_four_addresses(place):
    url, _ = place
    root, key = url.removesuffix("/v1"), {"Authorization": f"Bearer {KEY}"}
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/systemone", "/docs", "/openapi.json", "//load_model"):
        said = asked("post", f"{root}{path}", json={"model": "gpt2"}, headers=key)
        assert said.status_code == 404 and "no such address" in said.json()["error"]["message"], path
    said = asked("delete", f"{root}/v1/models", headers=key)
    assert said.status_code == 405 and said.json()["error"]["message"] == "DELETE /v1/models: is asked with GET"
    assert asked("get", f"{root}/health").status_code == 200
    assert asked("get", f"{url}/models", headers=key).json()["data"][0]["id"] == "lora"


def test_server_answers_nothing_without_the_key(place):
    url, _ = place
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        for path in ("/models", "/chat/completions"):
            said = asked("get" if path == "/models" else "post", url + path, headers=headers)
            assert said.status_code == 401 and KEY not in said.text
            assert said.headers["www-authenticate"] == "Bearer"


def test_server_refuses_a_body_that_is_none(place):
    url, _ = place
    key = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    cases = [
        (b"{", key, 400, "no JSON"),
        (b"[]", key, 400, "JSON object"),
        (b"[" * 50_000, key, 400, "no JSON"),
        (b'{"prompt": "' + b"x" * 70_000 + b'"}', key, 413, "64 KiB"),
        (b'{"prompt": "\\ud800"}', key, 400, "prompt"),
        (b"{}", {**key, "Content-Type": "text/plain"}, 415, "application/json"),
    ]
    for content, headers, status, said in cases:
        found = asked("post", f"{url}/completions", content=content, headers=headers)
        assert (found.status_code, said in found.json()["error"]["message"]) == (status, True), (
            content[:20],
            found.text,
        )


def test_server_without_a_key_answers_only_to_local_names(site):
    with started(site / "full", max_requests=1) as (url, running):
        assert asked("get", f"{url}/models").status_code == 200
        said = asked("get", f"{url}/models", headers={"Host": "evil.example:80"})
        assert said.status_code == 403 and "evil.example" in said.text
        running.config.app.active_requests = 1
        said = asked("post", f"{url}/completions", json={"prompt": "hello"})
        assert said.status_code == 429 and said.headers["retry-after"] and "serve.max_requests" in said.text


def many(client, count):
    """Asked all at once: every fourth is bad. (status by place, texts of the good ones)."""
    prompts = ("hello", "you are", "the quick brown fox")

    def ask(number):
        words = {"model": "lora" if number % 4 else "nobody", "prompt": prompts[number % 3], "max_tokens": 4}
        try:
            if number % 8 == 1:
                parts = client.completions.create(**words, stream=True)
                return 200, readable(*parts)
            return 200, readable(client.completions.create(**words))
        except openai.APIStatusError as error:
            return error.status_code, str(error)

    with ThreadPoolExecutor(count) as pool:
        found = [*pool.map(ask, range(count))]
    alone = [readable(client.completions.create(model="lora", prompt=each, max_tokens=4)) for each in prompts]
    for number, (status, text) in enumerate(found):
        if number % 4:
            assert (status, text) == (200, alone[number % 3])
        else:
            assert status == 404 and "'nobody'" in text


def test_server_with_many_clients_loses_nothing(place, client):
    many(client, 24)
    until = time.monotonic() + seconds(60)
    while (
        place[1].config.app.active_requests and time.monotonic() < until
    ):  # the last answer is read before its task ends
        time.sleep(0.01)
    assert place[1].config.app.active_requests == 0


@pytest.mark.skipif(not EVERYTHING, reason="a process of its own takes ten seconds to begin")
def test_serve_command_answers_at_once_and_ends_at_a_signal(site):
    command = [sys.executable, "-m", "launch.main", "serve", str(site / "lora"), "serve.port=0", "serve.device=cpu"]
    with subprocess.Popen([*command, "serve.dtype=float32"], stdout=subprocess.PIPE, text=True) as served:
        said = ""
        while not (found := re.search(r"http://[\d.]+:\d+/v1", said)):
            line = served.stdout.readline()
            assert line, said
            said += line
        many(openai.OpenAI(base_url=found[0], api_key="none", max_retries=0, timeout=seconds(300)), 200)
        served.send_signal(signal.SIGINT)
        served.communicate(timeout=seconds(60))
    assert served.returncode in (0, 130)


@pytest.mark.skipif(not EVERYTHING, reason="continuous batching takes a minute to begin on a CPU")
def test_server_batched_answers_are_those_one_after_the_other(site, alone):
    answer, tokenizer = alone
    with started(site / "lora", batching=True) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=seconds(300))
        ends = [2, tokenizer.convert_tokens_to_ids("<|im_end|>")]
        said = client.completions.create(model="lora", prompt="you are", max_tokens=6)
        assert said.choices[0].text == answer(tokenizer("you are")["input_ids"], 6, ends)
        with pytest.raises(openai.BadRequestError, match="sampled as the export says"):
            client.completions.create(model="lora", prompt="you are", temperature=0.5)


def test_server_reports_what_fails_inside(client, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no more memory")

    monkeypatch.setattr("transformers.cli.serving.utils.GenerateManager.generate_non_streaming", broken)
    with pytest.raises(openai.InternalServerError, match="the model failed"):
        client.completions.create(model="lora", prompt="hello", max_tokens=2)
