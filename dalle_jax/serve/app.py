"""The server's addresses, as a Starlette application."""

import asyncio
import base64
import contextlib
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.generate.part_checks import DECODERS
from dalle_jax.image.pixels import decode, encode_png
from dalle_jax.serve.config import ServeConfig
from dalle_jax.serve.image_request import read_base64, read_request, request_schema
from dalle_jax.serve.job import Job, Result
from dalle_jax.serve.metrics import Metrics
from dalle_jax.serve.openapi import openapi_document
from dalle_jax.serve.worker import QueueFullError, Worker

LONGEST_MESSAGE = 500  # characters; messages repeat what was sent
CLIENT_GONE = 499  # as nginx logs it; nobody reads this answer
FAILED = "the server failed; its log says why"
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def create_app(
    model: Model,
    config: ServeConfig = ServeConfig(),
    *,
    captions: Sequence[str] = (),
    token: str | None = None,
    hosts: Sequence[str] = ("*",),
    warm_up: bool = False,
) -> Starlette:
    """Builds the application, whose worker runs from startup to shutdown.

    Args:
      model: samples; it has a prior.
      config: limits.
      captions: examples that the page shows.
      token: that clients send as `Authorization: Bearer ...`; None for open access.
      hosts: names by which clients may call this server, in the header Host.
      warm_up: whether to compile all sizes of batches first.
    """
    server = _Server(model, config, captions, token)
    if warm_up:
        server.worker.warm_up()
    return Starlette(
        routes=[
            Route("/", server.page),
            Route("/healthz", server.health),
            Route("/metrics", server.metrics_text),
            Route("/openapi.json", server.openapi),
            Route("/v1/models", server.models),
            Route("/v1/images", server.images, methods=["POST"]),
            Route("/v1/images/generations", server.generations, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            HTTPException: server.on_http_error,
            UserError: server.on_user_error,
            ClientDisconnect: server.on_disconnect,
            Exception: server.on_failure,
        },
        lifespan=server.lifespan,
    )


class _Server:
    def __init__(self, model, config, captions, token):
        self.model, self.config, self.captions, self.token = model, config, captions, token
        self.metrics = Metrics()
        self.worker = Worker(model, config, self.metrics)

    @contextlib.asynccontextmanager
    async def lifespan(self, _) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await run_in_threadpool(self.worker.stop)

    async def page(self, _) -> Response:
        html = files("dalle_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, _) -> Response:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    async def metrics_text(self, request: Request) -> Response:
        self._check_token(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _) -> Response:
        return JSONResponse(openapi_document(self.model.name))

    async def models(self, request: Request) -> Response:
        self._check_token(request)
        entry = {
            "id": self.model.name,
            "object": "model",
            "owned_by": "dalle_jax",
            "px": self.model.px,
            "grid": self.model.grid,
            "decoders": [name for part in self.model.priors for name in DECODERS[part]],
            "recommended": self.model.recommended.recommendations(),
            "ranks": self.model.clip is not None,
            "captions": list(self.captions),
            "limits": dataclasses.asdict(self.config),
            "request": request_schema(),
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def images(self, request: Request) -> Response:
        return await self._answer(request, await self._body(request))

    async def generations(self, request: Request) -> Response:
        """The same by OpenAI's names."""
        body = await self._body(request)
        px = self.model.px
        allowed = {
            "size": (f"{px}x{px}", "auto"),
            "response_format": ("b64_json",),
            "model": (self.model.name,),
        }
        for name, values in allowed.items():
            value = body.pop(name, None)
            if value is not None and value not in values:
                raise UserError(f"{name} is {value!r:.100}; here it can be {' or '.join(values)}")
        body.pop("user", None)
        return await self._answer(request, body)

    async def on_http_error(self, request: Request, error: HTTPException) -> Response:
        return self._error(request, error.status_code, str(error.detail), error.headers)

    async def on_user_error(self, request: Request, error: UserError) -> Response:
        return self._error(request, 400, str(error))

    async def on_disconnect(self, request: Request, _) -> Response:
        return self._error(request, CLIENT_GONE, "the client has gone")

    async def on_failure(self, request: Request, _) -> Response:
        return self._error(request, 500, FAILED)

    def _error(self, request, status, message, headers=None):
        self._count(request, status)
        return JSONResponse(_error_body(status, message), status, headers)

    def _count(self, request, status):
        path = request.url.path if request.url.path.startswith("/v1/images") else "other"
        path = path if path in ("/v1/images", "/v1/images/generations") else "other"
        self.metrics.responses.labels(path, str(status)).inc()

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "this server needs its token", headers=headers)

    async def _body(self, request: Request) -> dict[str, Any]:
        self._check_token(request)
        # a page of another origin may not send this type unless the server agrees
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "send a JSON object, with Content-Type: application/json")
        data, most = bytearray(), self.config.max_body_bytes
        try:
            async with asyncio.timeout(self.config.upload_timeout):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise HTTPException(413, f"the request has more than {most} bytes")
        except TimeoutError as error:
            raise HTTPException(408, "the request took too long to arrive") from error
        try:
            body = json.loads(bytes(data), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise UserError('the request must be a JSON object, such as {"prompt": "red apple"}')
        return body

    async def _answer(self, http: Request, body: dict[str, Any]) -> Response:
        start = time.perf_counter()
        request, sampling = read_request(body, self.config)
        uploads = {
            name: await run_in_threadpool(self._decode_upload, name, text)
            for name, text in (("image", request.image), ("mask", request.mask))
            if text is not None
        }
        latest = _LatestImages() if request.stream else None
        on_progress = None if latest is None else latest.put
        job = Job(request, sampling, **uploads, on_progress=on_progress)
        try:
            self.worker.submit(job)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise HTTPException(429, str(error), headers=headers) from error
        if latest is not None:
            self._count(http, 200)
            events = self._events(job, latest, start)
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        result = asyncio.wrap_future(job.result)
        gone = asyncio.ensure_future(_wait_for_disconnect(http))
        try:
            await asyncio.wait(
                {result, gone},
                timeout=self.config.request_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if result.done():
                answer = await self._describe(job, result.result(), start)
                self._count(http, 200)
                return JSONResponse(answer)
            if gone.done():
                raise ClientDisconnect
            raise HTTPException(504, self._timeout_message())
        finally:
            gone.cancel()
            result.cancel()
            self.worker.withdraw(job)

    async def _events(self, job: Job, latest: "_LatestImages", start: float) -> AsyncIterator[str]:
        result = asyncio.wrap_future(job.result)
        result.add_done_callback(lambda _: latest.changed.set())
        try:
            async with asyncio.timeout(self.config.request_timeout):
                while not result.done():
                    await latest.changed.wait()
                    if images := latest.take():
                        yield _event("progress", {"data": await run_in_threadpool(_pngs, images)})
            yield _event("done", await self._describe(job, result.result(), start))
        except TimeoutError:
            yield _event("error", _error_body(504, self._timeout_message()))
        except UserError as error:
            yield _event("error", _error_body(400, str(error)))
        except Exception:
            yield _event("error", _error_body(500, FAILED))
        finally:
            result.cancel()
            self.worker.withdraw(job)

    def _decode_upload(self, name, text):
        return decode(
            read_base64(name, text),
            min_px=self.model.grid,
            max_pixels=self.config.max_pixels,
            background="black" if name == "mask" else "white",
        )

    def _timeout_message(self):
        return f"the images were not ready after {self.config.request_timeout:g} s"

    async def _describe(self, job: Job, result: Result, start: float) -> dict[str, Any]:
        images = dict(zip(result.numbers.tolist(), result.images, strict=True))
        data = await run_in_threadpool(_pngs, images)
        if result.scores is not None:
            for entry, score in zip(data, result.scores, strict=True):
                entry["score"] = round(float(score), 4)
        took = time.perf_counter() - start
        self.metrics.request_seconds.observe(took)
        return {
            "created": int(time.time()),
            "model": self.model.name,
            "prompt": job.request.prompt,
            "seed": job.request.seed,
            "sampling": dataclasses.asdict(job.sampling),
            "seconds": round(took, 3),
            "data": data,
        }


class _LatestImages:
    """Images that changed since they were last taken, each in its newest state.

    Slow readers skip states. `put` may be called from any thread, all else from the event loop's.
    """

    def __init__(self):
        self.changed, self._images = asyncio.Event(), {}
        self._loop = asyncio.get_running_loop()

    def put(self, number, image):
        self._loop.call_soon_threadsafe(self._put, number, image)

    def _put(self, number, image):
        self._images[number] = image
        self.changed.set()

    def take(self):
        images, self._images = self._images, {}
        self.changed.clear()
        return images


def _pngs(images):
    return [
        {"number": number, "b64_json": base64.b64encode(encode_png(image)).decode()}
        for number, image in images.items()
    ]


async def _wait_for_disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _refuse_constant(name):
    raise ValueError(f"{name} is no number of JSON")


def _event(name, data):
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _error_body(status, message):
    message = message.encode("utf-8", "backslashreplace").decode()
    if len(message) > LONGEST_MESSAGE:
        message = message[:LONGEST_MESSAGE] + " ..."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}
