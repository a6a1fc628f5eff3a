"""The page of a run: served, so that it refreshes itself, or one file that needs no server.

Source: ours.
"""

import base64
import json
import logging
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import unquote, urlsplit

from dalle_jax.errors import UserError
from dalle_jax.watch.run_files import read_run

log = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("page.html")
_LOCAL = {"localhost", "127.0.0.1", "[::1]"}


def page_file(workdir: Path) -> str:
    """The run as it is now, with the newest sheet of each stage, as HTML that needs nothing else.

    Args:
      workdir: of the run.
    Raises:
      UserError: see `read_run`.
    """
    run = read_run(workdir)
    for stage in run["stages"]:
        stage["sheets"] = stage["sheets"][-1:]
        for sheet in stage["sheets"]:
            data = base64.b64encode((workdir / sheet["path"]).read_bytes()).decode()
            sheet["path"] = f"data:image/png;base64,{data}"
    return _page(run)


def _page(run: dict[str, Any] | None) -> str:
    """The page with a run inside; None for one that asks the server."""
    data = json.dumps(run).replace("<", "\\u003c")  # no end of a script inside
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(run=data)


def make_server(workdir: Path, *, host: str, port: int) -> ThreadingHTTPServer:
    """Listens; `serve_forever` of what it returns answers.

    Args:
      workdir: of the run, which may begin later.
      host: address to listen on. Requests that name another host than this or the local one are
        refused, so that no page elsewhere can read the run through a browser here.
      port: 0 for any that is free.
    Raises:
      UserError: if nothing can listen there.
    """
    try:
        return ThreadingHTTPServer((host, port), partial(_Handler, workdir, host))
    except OSError as error:
        raise UserError(
            f"nothing can listen on {host}, port {port} ({error.strerror}); choose another --port"
        ) from error


class _Handler(BaseHTTPRequestHandler):
    """Answers with the page, the run as JSON, and the sheets that the run names."""

    def __init__(self, workdir: Path, host: str, *args: Any):
        self._workdir, self._host = workdir, host
        super().__init__(*args)

    def do_GET(self) -> None:
        named = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self._host in _LOCAL and named not in _LOCAL:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if path == "":
            self._answer("text/html; charset=utf-8", _page(None).encode())
            return
        try:
            run = read_run(self._workdir)
        except UserError as error:
            run = {"name": self._workdir.resolve().name, "stages": [], "problem": str(error)}
        if path == "run.json":
            self._answer("application/json", json.dumps(run).encode())
        elif path in {sheet["path"] for stage in run["stages"] for sheet in stage["sheets"]}:
            self._answer("image/png", (self._workdir / path).read_bytes())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, body: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
