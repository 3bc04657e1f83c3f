"""A server on loopback that speaks the part of the Hub's API that fetching a model takes."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories to serve, and what was asked of them.

    Attributes:
      url: of the server.
      repos: "org/name" -> the folder whose files it has.
      gated: names of repositories that only the token "secret" opens.
      fetched: "org/name/path" of every file that was downloaded.
    """

    def __init__(self, repos: Mapping[str, Path], gated: tuple[str, ...] = ()):
        self.url, self.repos, self.gated = "", dict(repos), gated
        self.fetched: list[str] = []

    def files(self, repo: str) -> dict[str, Path]:
        root = self.repos[repo]
        return {str(f.relative_to(root)): f for f in sorted(root.rglob("*")) if f.is_file()}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def _json(self, content, status=200, **headers):
            self._send(
                json.dumps(content).encode(), status, {"Content-Type": "application/json"} | headers
            )

        def _send(self, body, status=200, headers=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _refuse(self, code, status):
            self._json({"error": code}, status, **{"X-Error-Code": code, "X-Error-Message": code})

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            if found is None or found[1] not in hub.repos:
                return self._refuse("RepoNotFound", 404)
            repo, revision = found[1], (api[3] if api else file[2]) or "main"
            if repo in hub.gated and self.headers.get("Authorization") != "Bearer secret":
                return self._refuse("GatedRepo", 403)
            if revision not in ("main", "v1", COMMIT):
                return self._refuse("RevisionNotFound", 404)
            files = hub.files(repo)
            if api and api[2] == "tree":
                return self._json(
                    [
                        {"type": "file", "path": name, "size": f.stat().st_size, "oid": _oid(f)}
                        for name, f in files.items()
                    ]
                )
            if api:
                siblings = [{"rfilename": name} for name in files]
                return self._json({"id": repo, "sha": COMMIT, "siblings": siblings, "tags": []})
            if file[3] not in files:
                return self._refuse("EntryNotFound", 404)
            place = files[file[3]]
            if self.command == "GET":
                hub.fetched.append(f"{repo}/{file[3]}")
            headers = {"ETag": f'"{_oid(place)}"', "X-Repo-Commit": COMMIT}
            return self._send(place.read_bytes(), 200, headers)

    return Handler


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url` while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
