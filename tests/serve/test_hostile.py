"""Clients who send what they should not, or leave."""

import base64
import contextlib
import io
import socket
import threading
import time

import httpx2
import hypothesis
import numpy as np
import pytest
import schemathesis
import tiny
from PIL import Image
from schemathesis.checks import positive_data_acceptance
from served import served

from dalle_jax.serve import worker
from dalle_jax.serve.config import ServeConfig


@pytest.fixture(scope="module")
def address():
    model = tiny.model(**tiny.progressive_parts(), clip=tiny.clip())
    with served(model, ServeConfig(max_passes=3, max_images=4)) as address:
        yield address


@pytest.fixture
def http(address):
    with httpx2.Client(base_url=address, timeout=60) as http:
        yield http


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_request_that_the_openapi_document_suggests_makes_the_server_fail(address, mode):
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 5
    for operation in operations:
        if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
            continue  # takes nothing that could be wrong

        @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def answered_as_described(case):
            # the document cannot say that keep goes up to n, and the like
            case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

        answered_as_described()


def files():
    """An image in each format."""
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, name)
        yield buffer.getvalue()


def damaged(data, rng):
    """Cuts a file, changes bytes of it, or puts some in."""
    data = bytearray(data)
    at = int(rng.integers(len(data)))
    match rng.integers(3):
        case 0:
            return bytes(data[:at])
        case 1:
            for i in rng.integers(0, [60, len(data)], (4, 2)).ravel():
                data[i] = rng.integers(256)
        case 2:
            data[at:at] = rng.bytes(20)
    return bytes(data)


def test_no_damaged_image_makes_the_server_fail(http):
    rng = np.random.default_rng(0)
    answers = set()
    for data in list(files()) * 15:
        image = base64.b64encode(damaged(data, rng)).decode()
        body = {"prompt": "a", "image": image, "strength": 0.5, "stages": 2}
        answers.add(http.post("/v1/images", json=body).status_code)
    assert answers == {200, 400}


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": {"prompt": "a"}}',
        b'{"prompt": "a", "n": 1e400}',
        b'{"prompt": "a", "guidance": 1e300}',
        b'{"prompt": "a", "temperature": -1}',
        b'{"prompt": "a", "image": "data:", "strength": 0.5}',
        b'{"prompt": "a", "image": "' + b"A" * 1_000_000 + b'", "strength": 0.5}',
        b'{"prompt": "a", "__class__": "x"}',
        b'{"prompt": "\xff"}',
        b"\x1f\x8b\x08\x00",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_hostile_objects_are_refused(http, body):
    answer = http.post("/v1/images", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.content) < 1000
    assert answer.json()["error"]["message"]


HEAD = b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(address):
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        HEAD + b"Content-Length: -1\r\n\r\n{}",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
        HEAD + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        HEAD + b'Content-Length: 99\r\n\r\n{"prompt": ',  # and leaves
    ],
    ids=["tls", "negative", "two lengths", "chunks", "long header", "cut"],
)
def test_malformed_http_ends_that_connection_alone(address, http, data):
    with connect(address) as connection:
        with contextlib.suppress(OSError):  # the server may hang up early
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(12) in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")
    assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_leaves_frees_its_place_in_the_queue(monkeypatch, stream):
    go, started, sample = threading.Event(), threading.Event(), worker.sample_jointly

    def held(*args, **options):
        started.set()
        assert go.wait(60)
        return sample(*args, **options)

    monkeypatch.setattr(worker, "sample_jointly", held)
    config = ServeConfig(max_waiting=3)
    with served(tiny.model(), config) as address, httpx2.Client(base_url=address) as http:

        def pending():
            text = http.get("/metrics").text
            return float(text.split("\ndalle_jax_pending_images ")[1].split()[0])

        def ask(n):
            body = f'{{"prompt": "a", "n": {n}, "stream": {str(stream).lower()}}}'
            connection = connect(address)
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
            return connection

        def wait_for(count):
            end = time.monotonic() + 30
            while pending() != count:
                assert time.monotonic() < end
                time.sleep(0.01)

        with ask(1):
            assert started.wait(30)
            with ask(2):
                wait_for(3)
                assert http.post("/v1/images", json={"prompt": "a"}).status_code == 429
            wait_for(1)
            with ask(2):  # is accepted now
                wait_for(3)
        go.set()
        wait_for(0)
