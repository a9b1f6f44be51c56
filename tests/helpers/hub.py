"""A hub of one's own: directories served as repositories over the addresses that huggingface_hub and datasets ask.

It takes what `HfApi.create_repo` and `upload_folder` send (HF_HUB_DISABLE_XET=1: large files by LFS) and keeps it below its root.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]
    private: dict[str, bool]
    large: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        oid = self.path.rpartition("/")[2]
        self.asked.append("PUT /large")
        if hashlib.sha256(content).hexdigest() != oid:
            return self._send(400, b"another hash")
        self.large[oid] = content
        return self._send(200, b"")

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(f"{self.command} /{path}")
        if self.command == "POST" and (found := self._write(path, body)) is not None:
            return self._json(found)
        if path.startswith("api/"):
            found = self._api(path.removeprefix("api/"), body)
            return self._json(found) if found is not None else self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        kind, path = ("datasets", path[9:]) if path.startswith("datasets/") else ("models", path)
        if "/resolve/" not in path:
            return self._send(404, b"")
        name, _, rest = path.partition("/resolve/")
        file = self.root / kind / name / rest.partition("/")[2]
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        told = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1 if last else None]
            return self._send(206, content, told)
        return self._send(200, content, told)

    def _write(self, path: str, body: bytes) -> object:
        """What an address answers that takes something; None for the others."""
        address = f"http://{self.headers['Host']}"
        if path == "api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.private[name] = asked.get("private", asked.get("visibility") == "private")
            (self.root / "models" / name).mkdir(parents=True)
            return {"url": f"{address}/{name}", "name": name, "id": name}
        if path == "api/validate-yaml":  # of a card's metadata
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            large = (".safetensors", ".gguf")
            told = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular"} for f in files]
            return {"files": [{**each, "shouldIgnore": False, "oid": None} for each in told]}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{"upload": {"href": f"{address}/large/{each['oid']}"}} for each in objects]
            return {
                "transfer": "basic",
                "objects": [{**each, "actions": actions} for each, actions in zip(objects, upload, strict=True)],
            }
        if "/commit/" in path:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] in ("file", "lfsFile"):
                    target = self.root / "models" / name / value["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    whole = self.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                    target.write_bytes(whole)
            return {"commitUrl": f"{address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        return None

    def _api(self, path: str, body: bytes) -> object:
        kind, _, path = path.partition("/")
        for what in ("revision", "tree", "paths-info"):
            name, found, rest = path.partition(f"/{what}/")
            if found:
                break
        else:
            name, what, rest = path, "revision", "main"
        directory = self.root / kind / name
        revision, _, below = rest.partition("/")
        if not directory.is_dir() or revision not in ("main", COMMIT):
            return None
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        listed = [
            {
                "type": "file",
                "path": str(file.relative_to(directory)),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]
        if what == "tree":
            return [each for each in listed if str(each["path"]).startswith(below)]
        if what == "paths-info":
            given = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            return [each for each in listed if each["path"] in given["paths"]]
        siblings = [{"rfilename": each["path"], "size": each["size"]} for each in listed]
        about = {
            "id": name,
            "sha": COMMIT,
            "private": self.private.get(name, False),
            "gated": False,
            "disabled": False,
            "tags": [],
        }
        return {**about, "lastModified": "2026-01-01T00:00:00.000Z", "siblings": siblings, "downloads": 0, "likes": 0}

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(address, what was asked) of a hub that serves `root/models/<name>` and `root/datasets/<name>`, all at COMMIT."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "asked": asked, "private": {}, "large": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
