"""A stub of an OpenAI-compatible server on a real socket: it checks keys, says what vLLM says, and fails when it is told to."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, chat: Callable[[dict], str] = lambda _: "", complete: Callable[[dict], dict] | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.chat, self.complete = chat, complete
        self.models, self.key = [{"id": "judge-1"}], None
        self.failures: list[tuple[int, dict]] = []
        """(status, body) of the next answers."""
        self.requests: list[tuple[str, dict]] = []
        """(path, body) of everything that was sent."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def sent(self, path: str) -> list[dict]:
        return [body for at, body in self.requests if at == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        stub = self.server
        with stub.lock:
            stub.requests.append((self.path, body or {}))
            failure = stub.failures.pop(0) if stub.failures else None
        if stub.key is not None and (given := self.headers.get("Authorization")) != f"Bearer {stub.key}":
            failure = (
                401,
                {"error": {"message": f"Incorrect API key provided: {given}", "type": "invalid_request_error"}},
            )
        if failure is not None:
            return self._say(*failure)
        if self.path == "/v1/models":
            return self._say(
                200,
                {
                    "object": "list",
                    "data": [{"object": "model", "created": 1, "owned_by": "x", **m} for m in stub.models],
                },
            )
        base = {"id": "1", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        if self.path == "/v1/chat/completions":
            said = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": stub.chat(body)}}
            return self._say(200, {**base, "object": "chat.completion", "choices": [said], "usage": usage})
        if self.path == "/v1/completions" and stub.complete is not None:
            said = {"index": 0, "finish_reason": "stop", "logprobs": None, **stub.complete(body)}
            return self._say(200, {**base, "object": "text_completion", "choices": [said], "usage": usage})
        return self._say(404, {"error": {"message": "Not Found", "type": "NotFoundError"}})

    def _say(self, status, body):
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status in (429, 503):
            self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(text)


def as_vllm_says(directory) -> Callable[[dict], dict]:
    """Plain transformers as vLLM answers /v1/completions: token ids in, stops cut off, log-probabilities for `echo`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def complete(body):
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            if body.get("echo"):
                likely = model(ids).logits[0].log_softmax(-1)
                held = [None, *(float(likely[n - 1, ids[0, n]]) for n in range(1, ids.shape[1]))]
                best = [None, *({"x": float(likely[n - 1].max())} for n in range(1, ids.shape[1]))]
                return {"text": "", "logprobs": {"token_logprobs": [*held, -1.0], "top_logprobs": [*best, {"x": -1.0}]}}
            new = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        ends = [at for stop in body.get("stop") or [] if (at := text.find(stop)) >= 0]
        return {"text": text[: min(ends, default=len(text))]}

    return complete


@contextmanager
def serving(**how):
    stub = Stub(**how)
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
