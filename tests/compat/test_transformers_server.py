"""What the gateway uses of transformers' server still does what it is used for."""

import pytest
import torch
import transformers

from tests.helpers.tokenizers import tiny_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from fastapi.testclient import TestClient

from launch.serve import compat

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module", name="client")
def _client():
    """A client of the application, with one model that draws, and a key of nobody's."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = None
    application, shut_down = compat.build_text_server(
        compat.SingleModelManager("mine", model, tokenizer, 64), batching=False
    )
    compat.set_seed_of_each_request(model)
    yield TestClient(application)
    shut_down()


def answer(client, **fields):
    reply = client.post("/v1/completions", json={"model": "mine", "prompt": "hello there", "max_tokens": 12, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_transformers_server_lists_its_one_model_and_answers_texts_and_chats(client):
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["max_model_len"]) == ("mine", 64)
    assert answer(client, temperature=0.0) == answer(client, temperature=0.0)
    chat = {"model": "mine", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3}
    reply = client.post("/v1/chat/completions", json=chat)
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 3
    assert client.get("/health").json() == {"status": "ok"}


def test_transformers_server_loads_no_other_model(client):
    reply = client.post("/v1/completions", json={"model": "gpt2", "prompt": "hello", "max_tokens": 2})
    assert reply.status_code == 400 and "mine" in reply.text
    with pytest.raises(ValueError, match="mine alone"):
        compat.SingleModelManager("mine", None, None, 64).load_model_and_processor("gpt2")
    assert compat.SingleModelManager.process_model_name("mine") == "mine"


def test_transformers_server_seed_is_that_of_its_own_request(client):
    """The seed is set when the answer is begun, not when the request arrives, and never for another request."""
    first = answer(client, seed=1)
    assert answer(client, seed=1) == first != answer(client, seed=2)
    torch.manual_seed(7)
    drawn = answer(client)
    torch.manual_seed(7)
    assert answer(client) == drawn
