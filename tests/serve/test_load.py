"""The load script against a server of a tiny model; nothing is timed."""

import importlib.util
import time
from pathlib import Path

import pytest
import tiny
from served import served

from dalle_jax.serve import job, worker
from dalle_jax.serve.config import ServeConfig

SCRIPTS = Path(__file__).parent.parent.parent / "experiments" / "benchmarks"
CAPTIONS = ("red apple", "blue heart", "crying cat")


class Collected:
    """Stands for a report."""

    def __init__(self):
        self.values = {}

    def add(self, case, metric, value, unit, target=None):
        assert target is None or value >= target
        self.values[metric] = value


@pytest.fixture(scope="module")
def serve():
    """The script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        spec = importlib.util.spec_from_file_location("benchmark_serve", SCRIPTS / "serve.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def address(model):
    """Of a server."""
    with served(model, ServeConfig(max_batch=4)) as address:
        yield address


def test_clients_at_once_get_all_of_their_own_images(serve, model, address):
    report = Collected()
    serve.many(report, "many", model, CAPTIONS, address, clients=12)
    assert report.values["answered"] == 12
    assert report.values["images of direct sampling"] == 1


def test_images_of_others_do_not_pass(serve, model, address, monkeypatch):
    spec = job.Job.spec
    monkeypatch.setattr(job.Job, "spec", lambda self, number: spec(self, 7)._replace(seed=99))
    report = Collected()
    with pytest.raises(AssertionError):
        serve.many(report, "many", model, CAPTIONS, address, clients=3)


def test_slow_clients_hold_nobody_up(serve, address):
    report = Collected()
    serve.beside_slow(report, "slow", CAPTIONS, address, slow=5)
    assert set(report.values) == {"p50", "p99"}


def test_little_is_sampled_for_clients_who_left(serve, address, monkeypatch):
    sample = worker.sample_jointly

    def in_a_while(*args, **options):
        time.sleep(0.1)  # all would take 1.6 s, and clients leave after 0.2 s
        return sample(*args, **options)

    monkeypatch.setattr(worker, "sample_jointly", in_a_while)
    report = Collected()
    serve.vanishing(report, "leave", CAPTIONS, address, clients=4, n=16)
    assert report.values["sampled of what was asked"] <= 0.5
