"""A real vLLM in an environment of its own, if SHARDTUNE_VLLM_PYTHON names its Python: answers, evaluation, many requests.

docs/reference/serving.md says how to set one up. A start of vLLM takes one to several minutes on a CPU.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from tests.faults.runs import wait
from tests.helpers.launching import ROOT, clean_environment, command_here, free_port
from tests.helpers.models import tiny_model_dir
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data, write_jsonl
from trainer.export.load import load_export

PYTHON = os.environ.get("SHARDTUNE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="SHARDTUNE_VLLM_PYTHON names no Python that has vLLM")

START_S = 600
PROMPTS = ["hello", "you are", "the quick brown fox", "a dog over"]
NUM_ROWS = 6
"""Rows of each evaluation's data."""
HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
"""vLLM computes attention for some head sizes alone, of which 64 is one."""
EXPORTS = {
    "adapter": ("llama", "lora", []),
    "merged": ("llama", "lora", ["export.merge=true"]),
    "experts": ("qwen3_moe", "full", []),
}
"""(architecture, method, further words) of the runs whose exports are served."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The directory of the runs and of their data."""
    return tmp_path_factory.mktemp("vllm")


def train(root: Path, name: str) -> Path:
    """The directory of the run of `EXPORTS` with this name, after it has trained and been exported."""
    architecture, tuning, words = EXPORTS[name]
    model = tiny_model_dir(root / f"base-of-{name}", architecture, pad_token_id=2, **HEADS)
    tiny_tokenizer().save_pretrained(model)
    data = write_chat_data(root / "chat.jsonl", 16)
    command = [f"model.path={model}", f"data.path={data}", f"data.cache_dir={root / 'cache'}", f"tuning={tuning}"]
    command += ["optim.lr=1e-2", "batch.global=4", "batch.micro=4", "budget.steps=4", "run.device=cpu"]
    assert command_here(["train", *command, "logging.wandb=disabled", f"run.dir={root / name}", *words]) == 0
    return root / name


@contextmanager
def served(run: Path, **variables: str):
    """The address up to /v1 of vLLM that serves the run's export behind the gateway, and what it printed so far."""
    port = free_port()
    command = [sys.executable, "-m", "launch.main", "serve", str(run), f"serve.python={PYTHON}", f"serve.port={port}"]
    log = run / "vllm.log"
    environment = clean_environment(VLLM_CPU_KVCACHE_SPACE="1", **variables)
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process,
    ):
        try:
            # Each question makes a client, which costs vLLM's start time: it has one core or two.
            wait(lambda: process.poll() is not None or is_healthy(port), "a healthy vLLM", limit=START_S, interval=2)
            assert process.poll() is None, log.read_text()[-4000:]
            yield f"http://127.0.0.1:{port}/v1", log
        finally:
            process.terminate()


def is_healthy(port: int) -> bool:
    """Whether the server at the port says that it is ready."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def greedy(export: Path, prompt: str, tokens: int) -> tuple[list[int], list[float]]:
    """The tokens that plain transformers and peft write greedily, and the log-probability of each."""
    model, tokenizer = load_export(export), AutoTokenizer.from_pretrained(export)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new_ids = written.sequences[0, ids.shape[1] :].tolist()
    logprobs = [float(logits[0].log_softmax(-1)[token]) for logits, token in zip(written.logits, new_ids, strict=True)]
    return new_ids, logprobs


def compare_answers(url: str, run: Path) -> None:
    """Asks vLLM each of `PROMPTS`, and prints how far its log-probabilities are from those of `greedy`. They must agree."""
    largest_difference = 0.0
    for prompt in PROMPTS:
        body = {"model": run.name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1}
        body["return_token_ids"] = True
        answer = httpx.post(f"{url}/completions", json=body, timeout=seconds(120)).json()
        (choice,) = answer["choices"]
        expected_ids, expected_logprobs = greedy(run / "export", prompt, 8)
        written = len(choice["token_ids"])  # fewer than asked for if the model ended its text
        assert choice["token_ids"] == expected_ids[:written] and written, prompt
        logprobs = torch.tensor(choice["logprobs"]["token_logprobs"])
        difference = (logprobs - torch.tensor(expected_logprobs[:written])).abs().max()
        largest_difference = max(largest_difference, float(difference))
    print(f"{run.name}: the same tokens, log-probabilities within {largest_difference:.1e}")
    assert largest_difference < 1e-3


@pytest.mark.parametrize("name", ["adapter", "experts"])
def test_vllm_answers_as_transformers_and_peft_do(root, name):
    run = train(root, name)
    with served(run) as (url, log):
        assert "computes in float32 (serve.dtype)" in log.read_text()
        compare_answers(url, run)


def test_vllm_behind_the_gateway_answers_many_requests_and_evaluates(root):
    """On a merged export, in one start of vLLM: the answers, 128 requests at once, what is refused, and an evaluation."""
    write_jsonl(root / "asked.jsonl", [{"prompt": f"hello {row}", "response": "a dog"} for row in range(NUM_ROWS)])
    question = {"choices": ["a dog", "the quick fox"], "answer": "a dog"}
    write_jsonl(root / "picked.jsonl", [question | {"question": f"hello {row}"} for row in range(NUM_ROWS)])
    run = train(root, "merged")
    with served(run) as (url, _):
        compare_answers(url, run)
        body = {"model": "merged", "prompt": "hello", "max_tokens": 4}

        def status(sent: dict) -> int:
            return httpx.post(f"{url}/completions", json=sent, timeout=seconds(300)).status_code

        with ThreadPoolExecutor(128) as pool:
            assert set(pool.map(status, [body] * 128)) == {200}
        assert status(body | {"model": "another"}) == 404
        assert status(body | {"prompt": "x" * 2_000_000}) == 413
        assert httpx.post(f"{url[:-3]}/tokenize", json=body).status_code == 404
        written = ["evaluation.tasks.asked.kind=exact_match", f"evaluation.tasks.asked.path={root / 'asked.jsonl'}"]
        written += ["evaluation.tasks.asked.write.max_new_tokens=6"]
        chosen = [
            "evaluation.tasks.picked.kind=multiple_choice",
            f"evaluation.tasks.picked.path={root / 'picked.jsonl'}",
        ]
        rows_of = {}
        for where, more in (("here", "run.device=cpu"), ("there", f"evaluation.server={url}")):
            target = [f"model.path={run / 'export'}", f"to={root / where}", "logging.wandb=disabled"]
            assert command_here(["evaluate", *target, *written, *chosen, more]) == 0
            lines = (root / where / "evaluation_rows.jsonl").read_text().splitlines()
            rows_of[where] = [json.loads(line) for line in lines]
    assert len(rows_of["here"]) == len(rows_of["there"]) == 2 * NUM_ROWS
    for here, there in zip(rows_of["here"], rows_of["there"], strict=True):
        assert here["answer"] and here["answer"] == there["answer"]
        assert there["scores"] == pytest.approx(here["scores"], abs=1e-5)
