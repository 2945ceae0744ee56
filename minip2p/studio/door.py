"""Decide which requests reach Gradio.

Gradio reads any path or URL that a request calls a file, accepts uploads from pages of other
sites, and offers many routes that the studio does not need. Here a request must come from the
studio's own page, ask for what that page asks for, and be small; files get in by `/picture` alone.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse

from ..errors import UserError
from .drawing import Studio, failure

HOSTS = "127.0.0.1", "localhost"
PAGES = (  # beginnings of what the page itself fetches
    "/config",
    "/theme.css",
    "/manifest.json",
    "/favicon.ico",
    "/pwa_icon",
    "/assets/",
    "/static/",
    "/gradio_api/startup-events",
    "/gradio_api/heartbeat/",
    "/gradio_api/queue/data",
)
JOIN = "/gradio_api/queue/join"
MOST_BYTES = {JOIN: 2**16, "/gradio_api/cancel": 2**10, "/picture": 10 * 2**20}


def make_routes(studio: Studio) -> FastAPI:
    """Return the application that Gradio is mounted on, with the route of uploaded pictures."""
    app = FastAPI(openapi_url=None)

    @app.post("/picture")
    async def picture(request: Request) -> JSONResponse:
        data = await request.body()
        turn = studio.executor.submit(studio.pictures.add, data)
        try:
            return JSONResponse({"key": await asyncio.wrap_future(turn)})
        except Exception as error:
            status = 400 if isinstance(error, UserError) else 500
            return JSONResponse({"error": failure(error)}, status)

    return app


class Door:
    """An ASGI application that refuses requests in one sentence, or hands them on."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        refusal = refuse(scope)
        if refusal is None and scope["path"] == JOIN:
            body = await Request(scope, receive).body()
            refusal = refuse_change(body)
            receive = replay(body, receive)
        if refusal is None:
            return await self.app(scope, receive, send)
        status, sentence = refusal
        await PlainTextResponse(sentence + "\n", status)(scope, receive, send)


def refuse(scope: Any) -> tuple[int, str] | None:
    """Return the status and the sentence for a request that is refused by its head, else None."""
    if scope["type"] != "http":
        return 403, "The studio answers HTTP alone."
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    host, method, path = headers.get("host", ""), scope["method"], scope["path"]
    # Another site's page can give this address a name of its own (DNS rebinding).
    if host.partition(":")[0] not in HOSTS:
        return 400, f"The studio is at {HOSTS[0]}."
    if headers.get("origin", f"http://{host}") != f"http://{host}":
        return 403, "The studio answers its own page alone."
    if method in ("GET", "HEAD") and (path == "/" or path.startswith(PAGES)):
        return None
    if method != "POST" or path not in MOST_BYTES:
        return 404, "The studio has no such page."
    length = headers.get("content-length", "")
    # A chunked body may be longer than the length that its request states.
    if "transfer-encoding" in headers or not (length.isascii() and length.isdigit()):
        return 411, "A request has a length, and no transfer encoding."
    if int(length) > MOST_BYTES[path]:
        return 413, f"A request to {path} has at most {MOST_BYTES[path]} bytes."
    return None


def refuse_change(body: bytes) -> tuple[int, str] | None:
    """Return the status and the sentence for a change that Gradio should not see, else None."""

    def check_file(part: dict[str, Any]) -> dict[str, Any]:
        if isinstance(part.get("path"), str):  # what Gradio takes for a file, and opens
            raise ValueError
        return part

    try:
        change = json.loads(body, object_hook=check_file)
        if change["fn_index"] != 0 or not isinstance(change["data"], list):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        return 400, "This is no change of the studio's page."
    return None


def replay(body: bytes, receive: Any) -> Any:
    """Return a `receive` that gives the body again."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return messages.pop() if messages else await receive()

    return receive_again
