"""A local stand-in for the hub that takes uploads: it creates repositories and keeps the files of commits."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Hub:
    """What the stand-in has received.

    Attributes:
        address: where it answers.
        created: the bodies of requests to create a repository.
        files: content by repository and path.
        token: the only token that it lets in.
    """

    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    token: str = "good"


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub in a thread while the block runs."""
    hub = Hub()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._send(401, {"error": "Invalid username or password."})
            parts = self.path.split("/")
            if self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                return self._send(200, {"url": f"{hub.address}/{hub.created[-1]['organization']}/{hub.created[-1]['name']}"})
            if "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                found = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                return self._send(200, {"files": found})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        hub.files[f"{parts[3]}/{parts[4]}/{value['path']}"] = base64.b64decode(value["content"])
                address = f"{hub.address}/{parts[3]}/{parts[4]}/commit/1"
                return self._send(200, {"commitUrl": address, "commitOid": "1" * 40})
            return self._send(200, {"errors": [], "warnings": []})  # of the card's front matter

        def do_GET(self) -> None:
            self._send(200, {"id": "owner/name", "sha": "0" * 40, "siblings": []})

        def _send(self, status: int, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
