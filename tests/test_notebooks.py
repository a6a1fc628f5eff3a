"""The notebooks run, on a tiny model with random weights and without Jupyter."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny

from dalle_jax.commands import train_model
from dalle_jax.evaluate.evaluation_config import EvaluationConfig
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.report import evaluate
from dalle_jax.evaluate.suites import Suite
from dalle_jax.image.pixels import encode_png
from dalle_jax.planner import own_run
from dalle_jax.planner.forecast import StageForecast

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def run(name, folder, monkeypatch):
    """Runs the code cells on the model in a folder; gives their names."""
    monkeypatch.setenv("DALLE_JAX_MODEL", str(folder))
    names = {}
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    for number, cell in enumerate(code_cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), names)
    return names


PARTS = {
    "progressive": {"prior": None, "prior_params": None, **tiny.progressive_parts()},
    "both": tiny.progressive_parts(),
    "vqgan": {"codec": tiny.VQGAN_CONFIG, "codec_params": tiny.vqgan_params(0)},
}


def test_first_images_runs(tmp_path, monkeypatch):
    tiny.model(**PARTS["progressive"]).save(tmp_path / "tiny")
    names = run("first_images", tmp_path / "tiny", monkeypatch)
    shape = (2, 4, tiny.PX, tiny.PX, 3)
    assert names["images"].shape == names["endings"].shape == shape
    assert names["again"].shape == names["originals"].shape


def test_rerank_runs(tmp_path, monkeypatch):
    tiny.model().with_clip(tiny.clip()).save(tmp_path / "tiny")
    names = run("rerank", tmp_path / "tiny", monkeypatch)
    assert names["best"].images.shape == (3, 8, tiny.PX, tiny.PX, 3)
    curve = list(names["curve"].values())
    assert curve == sorted(curve)


@pytest.mark.parametrize("parts", ["both", "progressive"])
def test_coarse_to_fine_runs(tmp_path, monkeypatch, parts):
    tiny.model(**PARTS[parts]).save(tmp_path / "tiny")
    names = run("coarse_to_fine", tmp_path / "tiny", monkeypatch)
    assert names["frames"].shape == (8, 1, 2, tiny.PX, tiny.PX, 3)
    below = names["edited"][0, :, -tiny.PX // 4 :]
    np.testing.assert_array_equal(below, np.stack([names["image"][-tiny.PX // 4 :]] * 5))
    assert (names["varied"] != names["image"]).any()


@pytest.fixture
def plots(monkeypatch):
    """Plots go nowhere."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the evaluate extra is not installed")
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def test_tokenizer_runs(tmp_path, monkeypatch, plots):
    tiny.model(**PARTS["vqgan"]).save(tmp_path / "tiny")
    names = run("tokenizer", tmp_path / "tiny", monkeypatch)
    assert names["codes"].shape == (4, 4, 4)
    assert names["reach"].any(axis=(1, 2)).sum() >= 4  # one of five may be the code itself
    assert 1 <= names["perplexity"] <= names["used"] <= 12
    assert names["shares"].max(axis=1).min() > 0.9  # at the lowest temperature
    assert names["kl"][0] == pytest.approx(0, abs=1e-6)
    assert names["kl"][-1] < np.log(8)


def test_masks_runs(tmp_path, monkeypatch, plots):
    names = run("masks", tmp_path, monkeypatch)
    assert names["masks"]["row"][-1].sum() == 6 + 7
    assert names["shares"] == sorted(names["shares"])
    assert names["shares"][-1] == 1


def test_own_images_runs(tmp_path, monkeypatch, plots):
    def train(plan, options, *, workdir, codec, model):
        trained.append((plan.images, options.data, codec))
        tiny.model(**tiny.progressive_parts()).save(workdir / "model")
        (workdir / "sheet.png").write_bytes(encode_png(np.zeros((8, 8, 3), np.uint8)))
        (workdir / "vqgan").mkdir()
        lines = ({"step": 1, "stage": "vqgan", "time_s": 1, name: 2.0} for name in LOSSES)
        (workdir / "vqgan" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    trained = []
    seconds = StageForecast(
        parameters=1, state_bytes=1, compile_s=1.0, update_s=0.1, evaluation_s=1.0
    )
    monkeypatch.setattr(own_run, "forecast_stage", lambda run, *, held_out: seconds)
    monkeypatch.setattr(own_run, "run_plan", train)
    monkeypatch.setattr(train_model, "prepare_process", lambda: None)
    monkeypatch.setenv("DALLE_JAX_WORKDIR", str(tmp_path / "run"))
    monkeypatch.delenv("DALLE_JAX_IMAGES", raising=False)
    names = run("own_images", tmp_path, monkeypatch)
    ((images, folder, codec),) = trained
    assert folder == tmp_path / "run" / "shapes"
    assert (images, codec) == (82, "vqgan")
    (axis,) = names["axes"][0]
    assert [line.get_label() for line in axis.lines] == ["train", "held out"]
    assert names["images"].shape == (2, 6, tiny.PX, tiny.PX, 3)


LOSSES = ("loss", "eval/loss")


def test_evaluate_runs(tmp_path, monkeypatch, plots):
    source = [{"image": encode_png(np.full((16, 16, 3), 40 * i, np.uint8))} for i in range(4)]
    suite = Suite(
        name="stand-in",
        source=source,
        captions=("red apple", "blue heart", "crying cat", "a cat"),
        truth=(0, 1, 2, 3),
        families=("all",) * 4,
        real=(0, 1, 2, 3),
    )
    network = Network(
        name="Corner",
        apply=lambda params, images: (images[:, 0, :4, 0] / 99.0, images[:, 1, :4, 1] / 99.0),
        params=None,
        prepare=lambda image: image,
        fingerprint="c",
    )
    config = EvaluationConfig(temperatures=(0.5,), top_ps=(), guidances=())
    options = {"config": config, "networks": [network], "show": lambda doing: nullcontext(print)}
    evaluate(tiny.model(), suite, out=tmp_path, **options)
    monkeypatch.setenv("DALLE_JAX_REPORT", str(tmp_path))
    names = run("evaluate", tmp_path, monkeypatch)
    assert len(names["ways"]) == 2
    assert names["samples"].size[0] > 3 * tiny.PX
