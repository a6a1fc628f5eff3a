"""Serving: images a second against direct sampling, latencies, and clients who are slow or leave.

    python experiments/benchmarks/serve.py [--model people] [--quick] [--json]

Starts `dalle-jax serve` on the loopback as a process of its own, and loads it from this one, on the
same cores. Direct sampling is `Model.generate` of the same images in this process while the server
is idle, in turns with the load. Clients keep asking: each sends its next request when it has the
answer to the one before.
"""

import asyncio
import base64
import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import httpx2
import numpy as np
import tyro
from measure import Options, Report

import dalle_jax
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import default_captions, shipped_models
from dalle_jax.image.pixels import decode

TARGET = 0.85  # of the images a second of direct sampling
TURNS = 3  # the load and direct sampling, one after the other; the median counts
CASES = {"n=1, 32 clients": (1, 32), "n=4, 8 clients": (4, 8), "n=16, 2 clients": (16, 2)}
IMAGES = 256  # of a turn; the first and last batches of one are not full
QUICK = ("n=4, 8 clients", "200 clients at once")
CAPTIONS = ("red apple", "blue heart", "crying cat", "yellow star")  # for a model without its own


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Options of this benchmark."""

    model: str = "people"
    """A shipped model by name, or the path of a model folder."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client got."""

    status: int
    seconds: float
    body: dict


def main(options: ServeOptions) -> None:
    """Runs all cases."""
    report = Report("serve", as_json=options.json)
    model = dalle_jax.load(options.model)
    captions = CAPTIONS
    if options.model in shipped_models():
        captions = default_captions(options.model)
    with server(options.model) as address:
        for label, (n, clients) in CASES.items():
            if options.wanted(label, QUICK):
                throughput(report, label, model, captions, address, n=n, clients=clients)
        if options.wanted("200 clients at once", QUICK):
            many(report, "200 clients at once", model, captions, address, clients=200)
        if options.wanted("slow clients", QUICK):
            beside_slow(report, "slow clients", captions, address, slow=100)
        if options.wanted("vanishing clients", QUICK):
            vanishing(report, "vanishing clients", captions, address, clients=30, n=8)


@contextlib.contextmanager
def server(model: str) -> Iterator[str]:
    """The address of a server that ends with the block."""
    code = "from dalle_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--model", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found is None:
                raise RuntimeError(f"the server did not start: {line!r}")
            yield found[0]
        finally:
            process.terminate()


def throughput(
    report: Report,
    label: str,
    model: Model,
    captions: Sequence[str],
    address: str,
    *,
    n: int,
    clients: int,
) -> None:
    """Measures images a second beside those of direct sampling, and how long requests take."""
    prompts = [captions[i % len(captions)] for i in range(IMAGES // n)]
    bodies = [{"prompt": prompt, "n": n, "seed": i} for i, prompt in enumerate(prompts)]

    def direct():
        start = time.perf_counter()
        images = model.generate(prompts, n=n)
        if model.clip is not None:  # the server does so for each request
            model.clip.score(prompts, images)
        return IMAGES / (time.perf_counter() - start)

    def served():
        start = time.perf_counter()
        answers = asyncio.run(load(address, bodies, clients=clients))
        took = time.perf_counter() - start
        assert all(answer.status == 200 for answer in answers)
        return IMAGES / took, [answer.seconds for answer in answers]

    direct(), served()  # compile
    turns = [(direct(), *served()) for _ in range(TURNS)]
    own, rate = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
    report.add(label, "direct", own, "images/s")
    report.add(label, "served", rate, "images/s")
    shares = statistics.median(turn[1] / turn[0] for turn in turns)
    report.add(label, "served over direct", shares, "", TARGET)
    add_latencies(report, label, [seconds for turn in turns for seconds in turn[2]])


def many(
    report: Report,
    label: str,
    model: Model,
    captions: Sequence[str],
    address: str,
    *,
    clients: int,
) -> None:
    """Sends requests of different sizes at the same moment and compares all images.

    Raises:
      AssertionError: if an answer is missing or another's, or its images are.
    """
    bodies = [
        {"prompt": captions[i % len(captions)], "n": 1 + i % 3, "seed": i} for i in range(clients)
    ]
    start = time.perf_counter()
    answers = asyncio.run(load(address, bodies, clients=clients))
    took = time.perf_counter() - start
    same = images = 0
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status == 200, answer.body
        assert (answer.body["prompt"], answer.body["seed"]) == (body["prompt"], body["seed"])
        got = np.stack([decode(base64.b64decode(x["b64_json"])) for x in answer.body["data"]])
        expected = model.generate(body["prompt"], n=body["n"], seed=body["seed"])[0]
        assert got.shape == expected.shape
        images += len(got)
        same += sum(
            np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(got, expected, strict=True)
        )
    report.add(label, "answered", len(answers), "requests")
    report.add(label, "images of direct sampling", same / images, "", 1)
    report.add(label, "served", images / took, "images/s")
    add_latencies(report, label, [answer.seconds for answer in answers])


def beside_slow(
    report: Report, label: str, captions: Sequence[str], address: str, *, slow: int
) -> None:
    """Measures how long requests take alone, and beside clients who send and read a byte a time."""
    bodies = [{"prompt": captions[i % len(captions)], "seed": i} for i in range(64)]
    asyncio.run(load(address, bodies[:8], clients=8))
    alone = asyncio.run(load(address, bodies, clients=8))
    add_latencies(report, f"{label}: none", [answer.seconds for answer in alone])

    async def both():
        others = [asyncio.create_task(dribble(address, captions[0])) for _ in range(slow)]
        await asyncio.sleep(0.5)
        answers = await load(address, bodies, clients=8)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return answers

    answers = asyncio.run(both())
    assert all(answer.status == 200 for answer in answers)
    add_latencies(report, f"{label}: {slow}", [answer.seconds for answer in answers])


def vanishing(
    report: Report, label: str, captions: Sequence[str], address: str, *, clients: int, n: int
) -> None:
    """Measures what the server still samples for clients who left, and how soon it is free."""
    before = metric(address, "dalle_jax_images_total")

    async def leave():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(clients):
                await stack.enter_async_context(sent(address, {"prompt": captions[0], "n": n}))
            await asyncio.sleep(0.2)

    asyncio.run(leave())
    start = time.perf_counter()
    while metric(address, "dalle_jax_pending_images"):
        time.sleep(0.01)
    report.add(label, "until nothing waits", time.perf_counter() - start, "s")
    sampled = metric(address, "dalle_jax_images_total") - before
    report.add(label, "sampled of what was asked", sampled / (clients * n), "")
    (after,) = asyncio.run(load(address, [{"prompt": captions[0]}], clients=1))
    assert after.status == 200


async def load(address: str, bodies: Sequence[dict], *, clients: int) -> list[Answer]:
    """Sends all requests, each client its next one when it has an answer.

    Returns:
      The answers, in the order of the requests.
    """
    answers: list = [None] * len(bodies)
    waiting = iter(range(len(bodies)))
    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=address, timeout=600, limits=limits) as http:

        async def client():
            for i in waiting:
                start = time.perf_counter()
                answer = await http.post("/v1/images", json=bodies[i])
                took = time.perf_counter() - start
                answers[i] = Answer(status=answer.status_code, seconds=took, body=answer.json())

        await asyncio.gather(*(client() for _ in range(clients)))
    return answers


@contextlib.asynccontextmanager
async def sent(
    address: str, body: dict, *, pause: float = 0
) -> AsyncIterator[asyncio.StreamReader]:
    """Sends a request, a byte of it each `pause` seconds if that is not 0, and gives its reader."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/images HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        for part in [data[i : i + 1] for i in range(len(data))] if pause else [data]:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


async def dribble(address: str, prompt: str) -> None:
    """Asks for an image in about 3 s, and then reads a byte of it each tenth of a second."""
    async with sent(address, {"prompt": prompt}, pause=0.1) as reader:
        while await reader.read(1):
            await asyncio.sleep(0.1)


def metric(address: str, name: str) -> float:
    """The value of a metric of the server."""
    text = httpx2.get(f"{address}/metrics", timeout=60).text
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])


def add_latencies(report: Report, label: str, seconds: Sequence[float]) -> None:
    """Reports the median of requests' times and the one that 99 % of them keep to."""
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        report.add(label, name, float(np.quantile(seconds, share)), "s")


if __name__ == "__main__":
    main(tyro.cli(ServeOptions, description=__doc__))
