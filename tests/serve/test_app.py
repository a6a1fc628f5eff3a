"""The server in one process, with a tiny model."""

import base64
import concurrent.futures
import json
import threading

import numpy as np
import pytest
import tiny
from starlette.testclient import TestClient

from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import decode, encode_png
from dalle_jax.serve import worker as worker_module
from dalle_jax.serve.app import create_app
from dalle_jax.serve.config import ServeConfig

QUICK = SamplingConfig(stages=2)  # compiles less
IMAGE = np.random.default_rng(0).integers(0, 256, (tiny.PX, tiny.PX, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    return tiny.model(**tiny.progressive_parts(), clip=tiny.clip())


@pytest.fixture(scope="module")
def client(model):
    with TestClient(create_app(model, captions=["red apple"])) as client:
        yield client


def b64(image):
    return base64.b64encode(encode_png(image)).decode()


def post(client, path="/v1/images", **body):
    return client.post(path, json=body)


def images_of(response):
    assert response.status_code == 200, response.text
    return np.stack(
        [decode(base64.b64decode(entry["b64_json"])) for entry in response.json()["data"]]
    )


def message_of(response, status=400):
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


@pytest.mark.parametrize("decoder", ["autoregressive", "progressive"])
def test_images_are_those_of_generate(client, model, decoder):
    response = post(client, prompt="red apple", n=3, seed=7, decoder=decoder, guidance=2)
    sampling = SamplingConfig(decoder=decoder, guidance=2)
    expected = model.generate("red apple", n=3, seed=7, sampling=sampling)[0]
    np.testing.assert_array_equal(images_of(response), expected)
    answer = response.json()
    assert answer["seed"] == 7
    assert answer["sampling"]["guidance"] == 2
    scores = model.clip.score(["red apple"], expected[None])[0]
    np.testing.assert_allclose([x["score"] for x in answer["data"]], scores, atol=1e-4)


def test_requests_that_share_batches_get_their_own_images(client, model):
    prompts = ["red apple", "blue heart", "crying cat"]
    asked = [(prompts[i % 3], i, 1 + i % 3) for i in range(10)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(
            pool.map(lambda x: post(client, prompt=x[0], seed=x[1], n=x[2], stages=2), asked)
        )
    for (prompt, seed, n), answer in zip(asked, answers, strict=True):
        expected = model.generate(prompt, n=n, seed=seed, sampling=QUICK)[0]
        np.testing.assert_array_equal(images_of(answer), expected)


def test_the_best_are_kept_best_first(client, model):
    answer = post(client, prompt="red apple", n=4, keep=2, seed=3, stages=2)
    best = model.rank("red apple", n=4, keep=2, seed=3, sampling=QUICK)
    np.testing.assert_array_equal(images_of(answer), best.images[0])
    scores = [entry["score"] for entry in answer.json()["data"]]
    assert scores == sorted(scores, reverse=True)


def test_edits_variations_and_continuations_are_those_of_the_model(client, model):
    mask = np.zeros_like(IMAGE)
    mask[:8] = 255
    body = {"prompt": "blue heart", "n": 2, "seed": 5, "image": b64(IMAGE)}
    edited = images_of(post(client, **body, mask=b64(mask), stages=2))
    expected = model.edit(IMAGE, "blue heart", mask=mask, n=2, seed=5, sampling=QUICK)[0]
    np.testing.assert_array_equal(edited, expected)
    varied = images_of(post(client, **body, strength=0.3, stages=2))
    expected = model.edit(IMAGE, "blue heart", strength=0.3, n=2, seed=5, sampling=QUICK)[0]
    np.testing.assert_array_equal(varied, expected)
    continued = images_of(post(client, **body, keep_rows=2, decoder="autoregressive"))
    sampling = SamplingConfig(decoder="autoregressive")
    options = {"image_prompt": IMAGE, "keep_rows": 2, "sampling": sampling}
    expected = model.generate("blue heart", n=2, seed=5, **options)[0]
    np.testing.assert_array_equal(continued, expected)


@pytest.mark.parametrize("decoder", ["autoregressive", "progressive"])
def test_a_stream_shows_images_on_their_way_and_ends_with_all(client, model, decoder):
    response = post(client, prompt="red apple", n=2, seed=1, stream=True, decoder=decoder)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [event.split("\n") for event in response.text.strip().split("\n\n")]
    names = [event[0].removeprefix("event: ") for event in events]
    assert names == ["progress"] * (len(names) - 1) + ["done"]
    assert len(names) >= 2
    last = json.loads(events[-1][1].removeprefix("data: "))
    images = [decode(base64.b64decode(entry["b64_json"])) for entry in last["data"]]
    expected = model.generate("red apple", n=2, seed=1, sampling=SamplingConfig(decoder=decoder))[0]
    np.testing.assert_array_equal(images, expected)


def test_a_request_without_a_seed_is_told_one_that_repeats_it(client):
    first = post(client, prompt="red apple")
    again = post(client, prompt="red apple", seed=first.json()["seed"])
    np.testing.assert_array_equal(images_of(first), images_of(again))


def test_clients_of_openai_get_what_they_expect(client):
    answer = post(
        client,
        "/v1/images/generations",
        prompt="red apple",
        n=2,
        size="16x16",
        response_format="b64_json",
        model="tiny",
        user="me",
    )
    assert images_of(answer).shape == (2, 16, 16, 3)
    refused = post(client, "/v1/images/generations", prompt="red apple", size="1024x1024")
    assert message_of(refused) == "size is '1024x1024'; here it can be 16x16 or auto"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is missing; it must be a string"),
        ({"prompt": " "}, "prompt is empty; say what the image shows"),
        ({"prompt": "a\ud800"}, "prompt has half a character"),
        ({"prompt": "a" * 1001}, "prompt has 1001 characters; this server takes at most 1000"),
        ({"prompt": "a", "promt": 1}, "'promt' is not known; did you mean prompt?"),
        ({"prompt": "a", "n": 65}, "n is 65; this server generates at most 64 images a request"),
        ({"prompt": "a", "n": True}, "n is True, but must be a whole number"),
        ({"prompt": "a", "n": 10**400}, "n is 1000000"),
        ({"prompt": "a", "guidance": 10**400}, "guidance is 1000"),
        ({"prompt": "a", "top_p": 2}, "top_p is 2.0, but must be above 0 and at most 1"),
        ({"prompt": "a", "top_k": 13}, "top_k is 13, but must lie in 1..12"),
        ({"prompt": "a", "stages": 17}, "stages is 17, but must lie in 1..16"),
        ({"prompt": "a", "revise": 10**9}, "stages and revise are 1000000001 passes in all"),
        ({"prompt": "a", "decoder": "x"}, "decoder is 'x', but must be 'autoregressive' or"),
        ({"prompt": "a", "mask": "x"}, "keep_rows, mask and strength need an image"),
        ({"prompt": "a", "image": "x"}, "an image needs one of keep_rows"),
        ({"prompt": "a", "image": "?", "strength": 0.5}, "image is not base64"),
        ({"prompt": "a", "image": "aaaa", "strength": 0.5}, "not an image in a known format"),
        ({"prompt": "a", "image": "/etc/passwd", "strength": 0.5}, "image is not base64"),
        ({"prompt": "a", "image": b64(IMAGE), "keep_rows": 4}, "keep_rows is 4"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(client, body, message):
    assert message in message_of(client.post("/v1/images", content=json.dumps(body), headers=JSON))


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'"a"', b"\xff", b"[" * 100_000, b'{"prompt": NaN}', b"1e999"]
)
def test_what_is_no_json_object_is_refused(client, data):
    assert "JSON" in message_of(client.post("/v1/images", content=data, headers=JSON))


def test_other_types_of_content_are_refused_so_that_foreign_pages_cannot_post(client):
    response = client.post("/v1/images", content=b"{}", headers={"Content-Type": "text/plain"})
    assert "application/json" in message_of(response, 415)


def test_large_bodies_and_large_images_are_refused(model):
    config = ServeConfig(max_body_bytes=5000, max_pixels=300)
    with TestClient(create_app(model, config)) as client:
        assert "more than 5000 bytes" in message_of(post(client, prompt="a" * 5000), 413)
        body = {"prompt": "a", "image": b64(np.zeros((16, 32, 3), np.uint8)), "strength": 0.5}
        assert "reduce it to at most 300 pixels" in message_of(post(client, **body))


def test_a_token_guards_all_but_page_and_health(model):
    with TestClient(create_app(model, token="secret")) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/metrics", "/v1/models"):
            assert client.get(path).status_code == 401
        assert post(client, prompt="a").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.get("/v1/models").status_code == 200


def test_only_known_hosts_are_served(model):
    with TestClient(create_app(model, hosts=["localhost"])) as client:
        assert client.get("/healthz").status_code == 400
        assert client.get("/healthz", headers={"Host": "localhost:8000"}).status_code == 200


@pytest.fixture
def held(monkeypatch):
    """Sampling waits until the test lets it go on; counts its batches."""
    go, started, batches = threading.Event(), threading.Event(), []
    sample = worker_module.sample_jointly

    def waiting(*args, **options):
        batches.append(args[3])
        started.set()
        assert go.wait(60)
        return sample(*args, **options)

    monkeypatch.setattr(worker_module, "sample_jointly", waiting)
    yield go, started, batches
    go.set()


def test_a_full_queue_answers_429_and_shutdown_finishes_what_was_accepted(model, held):
    go, started, _ = held
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with TestClient(create_app(model, ServeConfig(max_waiting=3))) as client:
            accepted = pool.submit(post, client, prompt="red apple", n=2)
            assert started.wait(60)
            refused = post(client, prompt="red apple", n=2)
            assert "the server is busy" in message_of(refused, 429)
            assert int(refused.headers["Retry-After"]) >= 1
            go.set()
            assert len(images_of(accepted.result())) == 2
        assert "dalle_jax_pending_images 0.0" in _metrics(client)


def _metrics(client):
    return client.app.routes[2].endpoint.__self__.metrics.text().decode()


def test_a_request_that_takes_too_long_is_given_up(model, held):
    go, _, batches = held
    config = ServeConfig(request_timeout=0.2, max_batch=1)
    with TestClient(create_app(model, config)) as client:
        response = post(client, prompt="red apple", n=3)
        assert "not ready after 0.2 s" in message_of(response, 504)
        stream = post(client, prompt="red apple", n=3, stream=True)
        assert "not ready after 0.2 s" in stream.text
        go.set()
    assert len(batches) == 1  # of six images five were never sampled
    assert "dalle_jax_pending_images 0.0" in _metrics(client)


def test_images_of_many_requests_are_sampled_together(model, held):
    go, started, batches = held
    with TestClient(create_app(model)) as client, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(post, client, prompt="red apple")
        assert started.wait(60)
        others = [pool.submit(post, client, prompt="blue heart", seed=i) for i in range(3)]
        while "dalle_jax_pending_images 4.0" not in _metrics(client):
            pass
        go.set()
        assert all(answer.result().status_code == 200 for answer in [first, *others])
    assert [len(batch) for batch in batches] == [1, 2, 1]


def test_a_failure_is_answered_without_its_reason_and_the_server_goes_on(model, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("secret")

    with TestClient(create_app(model), raise_server_exceptions=False) as client:
        with monkeypatch.context() as patch:
            patch.setattr(worker_module, "sample_jointly", fail)
            response = post(client, prompt="red apple")
            assert message_of(response, 500) == "the server failed; its log says why"
        assert post(client, prompt="red apple").status_code == 200


def test_health_metrics_models_and_openapi_answer(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    post(client, prompt="red apple")
    assert (
        'dalle_jax_responses_total{path="/v1/images",status="200"}' in client.get("/metrics").text
    )
    (entry,) = client.get("/v1/models").json()["data"]
    assert (entry["id"], entry["px"], entry["ranks"]) == ("tiny", 16, True)
    assert entry["recommended"] == {}
    assert entry["decoders"] == ["autoregressive", "jacobi", "progressive"]
    document = client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ImageRequest"]["properties"]
    assert set(SamplingConfig.__dataclass_fields__) < set(fields)
    assert fields["guidance"]["anyOf"] == [{"type": "number"}, {"type": "null"}]
    assert "classifier-free guidance" in fields["guidance"]["description"]
