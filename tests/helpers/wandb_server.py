"""A stand-in for W&B's server, which keeps what the real client and wandb-workspaces send to it.

It knows nothing of W&B but the shape of the answers that these two need. So a test says what was sent, and nothing of what a
server makes of it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "x" * 40
"""As long as a key of W&B: the client refuses a shorter one."""


@dataclass
class Requests:
    """Everything that was sent to a stand-in, in its order."""

    address: str
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """(name of the GraphQL operation, its variables)."""
    streamed: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """(path of a run's file stream, what was sent to it)."""
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`displayName`, `notes` and `tags` of a run as people left them in the app, by its id. Of no other run they can be read."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that make W&B's client use this server."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": API_KEY, "WANDB_MODE": "online"}

    def variables(self, operation: str) -> list[dict[str, Any]]:
        """The variables of each call of an operation, such as `UpsertBucket`."""
        return [variables for name, variables in self.calls if name == operation]

    def rows(self, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run's history, as they were sent."""
        return [json.loads(line) for line in self._lines(run_id, "wandb-history.jsonl")]

    def summary(self, run_id: str) -> dict[str, Any]:
        """The summary of a run that was sent last."""
        lines = self._lines(run_id, "wandb-summary.json")
        return json.loads(lines[-1]) if lines else {}

    def ending(self, run_id: str) -> dict[str, Any]:
        """What the last message of a run says of its end: `exitcode`, `preempting`."""
        endings = [message for message in self.streamed_of(run_id) if message.get("complete")]
        return endings[-1] if endings else {}

    def streamed_of(self, run_id: str) -> list[dict[str, Any]]:
        """What was sent to a run's file stream."""
        return [message for path, message in self.streamed if f"/{run_id}/" in path]

    def _lines(self, run_id: str, file_name: str) -> list[str]:
        lines: list[str] = []
        for message in self.streamed_of(run_id):
            lines += (message.get("files") or {}).get(file_name, {}).get("content", [])
        return lines


def _answer(requests: Requests, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The data that a GraphQL operation is answered with. One that is not known gets none."""
    entity = variables.get("entityName") or variables.get("entity") or "us"
    project = variables.get("projectName") or variables.get("project") or "shardtune"
    project_node = {"id": "UHJvag==", "internalId": "7", "name": project, "entityName": entity}
    if operation in ("Viewer", "GetDefaultEntity", "GetViewer"):
        return {
            "viewer": {"id": "u", "entity": "us", "username": "us", "email": "", "flags": "{}", "teams": {"edges": []}}
        }
    if operation == "UpsertBucket":
        project_of_run = {"id": "UHJvag==", "name": project, "entity": {"id": "e", "name": entity}}
        name = variables.get("name")
        bucket = {"id": "cnVu", "name": name, "displayName": variables.get("displayName"), "project": project_of_run}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if operation == "Run":
        name = variables["name"]
        if name not in requests.labels:
            return {"project": None}
        run = {"id": "cnVu", "projectId": "7", "name": name, "state": "running", **requests.labels[name]}
        return {"project": {"run": run | {"config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}"}}}
    if operation == "CreateRunFiles":
        files = [{"name": name, "uploadUrl": f"{requests.address}/upload"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
    if operation == "GetProjects":
        listed = {**project_node, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
        page = {"endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": [{"node": listed | {"__typename": "Project"}}]}}
    if operation == "ProjectInternalId":
        return {"project": project_node}
    if operation in ("UpsertView2", "upsertView"):
        spec = variables.get("spec")
        view = {"id": "Vmlldw==", "type": variables["type"], "name": variables["name"], "spec": spec}
        view |= {"displayName": variables["displayName"], "description": "", "project": project_node}
        return {"upsertView": {"view": view | {"updatedAt": "2026-01-01T00:00:00Z"}, "inserted": True}}
    return {}


def _handler(requests: Requests) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the client keeps its connections

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

        def do_HEAD(self) -> None:
            self._send(b"")

        def do_GET(self) -> None:
            self._send(b"{}")

        def do_PUT(self) -> None:
            self._body()
            self._send(b"{}")

        def do_POST(self) -> None:
            body = self._body()
            answer: dict[str, Any] = {}
            if self.path.startswith("/graphql"):
                asked = json.loads(body)
                operation = asked.get("operationName") or asked["query"].split("(")[0].split("{")[0].split()[-1]
                variables = asked.get("variables") or {}
                requests.calls.append((operation, variables))
                answer = {"data": _answer(requests, operation, variables)}
            elif self.path.endswith("/file_stream"):
                requests.streamed.append((self.path, json.loads(body)))
            self._send(json.dumps(answer).encode())

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@contextlib.contextmanager
def wandb_server() -> Iterator[Requests]:
    """A stand-in on a free port of this machine; what is sent to it is in `Requests`."""
    requests = Requests("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(requests))
    requests.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
