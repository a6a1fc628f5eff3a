"""The notebooks run, on a tiny model with random weights and without Jupyter."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tiny

from dalle_jax.evaluate.evaluation_config import EvaluationConfig
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.report import evaluate
from dalle_jax.evaluate.suites import Suite
from dalle_jax.image.pixels import encode_png

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


def test_first_images_runs(tmp_path, monkeypatch):
    tiny.model().save(tmp_path / "tiny")
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


def test_coarse_to_fine_runs(tmp_path, monkeypatch):
    tiny.model(**tiny.progressive_parts()).save(tmp_path / "tiny")
    names = run("coarse_to_fine", tmp_path / "tiny", monkeypatch)
    assert names["frames"].shape == (8, 1, 2, tiny.PX, tiny.PX, 3)
    below = names["edited"][0, :, -tiny.PX // 4 :]
    np.testing.assert_array_equal(below, np.stack([names["image"][-tiny.PX // 4 :]] * 5))
    assert (names["varied"] != names["image"]).any()


def test_evaluate_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the evaluate extra is not installed")
    monkeypatch.setenv("MPLBACKEND", "agg")
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
