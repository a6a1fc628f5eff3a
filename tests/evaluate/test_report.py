import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image, ImageFilter

from dalle_jax.errors import UserError
from dalle_jax.evaluate import studies
from dalle_jax.evaluate.drawing import Part, drawn, gathered, real, singles
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.kept import Kept
from dalle_jax.evaluate.likelihood import prior_nats, tokenizer_quality
from dalle_jax.evaluate.report import Plan, evaluate
from dalle_jax.evaluate.studies import Bench, best_of, blurred, rerank_study, scores
from dalle_jax.evaluate.suites import Suite
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import encode_png
from dalle_jax.losses import prior_loss
from dalle_jax.models.autoregressive_prior import AutoregressivePrior

CAPTIONS = ("red apple", "blue heart", "crying cat", "green apple", "a cat", "apple")
PLAN = Plan(
    captions=None,
    swept=None,
    reranked=2,
    samples=3,  # six pictures at a time everywhere: one program
    temperatures=(0.5, 1.0),
    top_ps=(),
    guidances=(),
)


def pictures(count=12):
    return np.random.default_rng(0).integers(0, 256, (count, tiny.PX, tiny.PX, 3), np.uint8)


@pytest.fixture(scope="module")
def suite():
    source = [{"image": encode_png(image)} for image in pictures()]
    return Suite(
        name="stand-in",
        source=source,
        captions=CAPTIONS,
        truth=tuple(range(6)),
        families=("fruit", "sign", "animal", "fruit", "animal", "fruit"),
        real=tuple(range(12)),
    )


@pytest.fixture(scope="module")
def model():
    return tiny.model()


class Colours:
    """A judge that knows nothing but mean colours."""

    def images(self, images):
        return _unit(images.mean((1, 2)) - 127)

    def texts(self, captions):
        return _unit(np.stack([np.frombuffer(c[:3].encode(), np.uint8) - 110.0 for c in captions]))


def _unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def network(calls=None):
    def apply(params, images):
        return images.reshape(len(images), -1)[:, :12] / 50.0, images[:, 0, 0].astype(float)

    class Counting(Network):
        def _run(self, batch):
            if calls is not None:
                calls.append(len(batch))
            return self.apply(self.params, batch)

    return Counting(
        name="Corner", apply=apply, params=None, prepare=lambda image: image, fingerprint="c"
    )


@contextlib.contextmanager
def show(doing):
    yield lambda done, total: None


def run(model, suite, out, **changes):
    options = {
        "plan": PLAN,
        "networks": [network()],
        "reranker": Colours(),
        "judge": Colours(),
        "show": show,
    }
    return evaluate(model, suite, out=out, **(options | changes))


@pytest.fixture(scope="module")
def whole(model, suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "whole"
    run(model, suite, out)
    return out


def test_a_report_is_self_contained(whole):
    numbers = json.loads((whole / "report.json").read_text())
    assert list(numbers) == [
        *("request", "distances", "tokenizer", "prior", "blur", "sampling", "rerank")
    ]
    assert [row["pictures"] for row in numbers["distances"]] == ["drawn", "through the tokenizer"]
    assert {"FD Corner", "KID Corner x1000", "KID Corner x1000 +-", "CLIP score"} <= set(
        numbers["distances"][0]
    )
    assert [row["radius"] for row in numbers["blur"]] == [0, 1, 2, 4, 8]
    assert [row["sampling"] for row in numbers["sampling"]] == ["as trained", "temperature 0.5"]
    assert [row["N"] for row in numbers["rerank"]] == [1, 2, 3]
    text = (whole / "report.md").read_text()
    assert text.startswith("# tiny on stand-in\n")
    for line in text.splitlines():
        if line.startswith("!["):
            name = line.partition("(")[2].removesuffix(")")
            assert (whole / name).read_bytes().startswith(b"\x89PNG")
    shown = {path.name for path in whole.iterdir()}
    assert {"blur.png", "rerank.png", "samples-sheet.png", "sampling-sheet.png"} <= shown


def test_captions_that_are_too_long_are_cut_and_counted(model, suite, tmp_path):
    captions = ("red apple " * 40, *suite.captions[1:])
    parts = {**vars(suite), "captions": captions}
    sections = run(model, Suite(**parts), tmp_path, chosen=())
    assert sections[0].rows[0]["captions cut short"] == 1


def test_features_of_a_set_lie_on_disk_in_the_order_of_its_pictures(suite):
    bench = Bench(networks=[network()], kept=Kept(None))
    backwards = list(real(suite, suite.real, tiny.PX))[::-1]
    features, logits = bench._features(bench.networks[0], backwards, 0)
    assert isinstance(features, np.memmap) and isinstance(logits, np.memmap)
    np.testing.assert_allclose(features, network()(pictures())[0], rtol=1e-6)


def test_too_few_captions_are_refused_before_work_begins(model, suite, tmp_path):
    for captions in (0, 1):
        with pytest.raises(UserError, match=f"2 pictures or more of both kinds, got {captions}"):
            run(model, suite, tmp_path, plan=Plan(captions=captions))
    assert not list(tmp_path.iterdir())


def test_a_stopped_evaluation_goes_on_and_ends_as_an_unbroken_one(
    model, suite, whole, tmp_path, monkeypatch
):
    drawings = []
    generate = model.generate

    def counted(prompts, **options):
        drawings.append(len(prompts) * options["n"])
        if len(drawings) == 3:
            raise KeyboardInterrupt
        return generate(prompts, **options)

    monkeypatch.setattr(model, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, suite, tmp_path)
    assert not (tmp_path / "report.json").exists()
    run(model, suite, tmp_path)
    assert (tmp_path / "report.json").read_text() == (whole / "report.json").read_text()
    total = sum(drawings) - drawings[2]  # the third was not made
    measured = []
    run(model, suite, tmp_path, networks=[network(measured)])
    assert sum(drawings) - drawings[2] == total
    assert measured == []


def test_another_request_draws_anew_and_leaves_the_first_alone(model, suite, tmp_path):
    kept = Kept(tmp_path)
    first = gathered(drawn(model, CAPTIONS, SamplingConfig(), n=1, seed=0, kept=kept))
    other = gathered(drawn(model, CAPTIONS, SamplingConfig(), n=1, seed=1, kept=kept))
    cooler = gathered(
        drawn(model, CAPTIONS, SamplingConfig(temperature=0.5), n=1, seed=0, kept=kept)
    )
    assert len({images.tobytes() for images in (first, other, cooler)}) == 3
    again = gathered(drawn(model, CAPTIONS, SamplingConfig(), n=1, seed=0, kept=kept))
    np.testing.assert_array_equal(again, first)


def test_a_caption_that_comes_again_gets_another_picture(model):
    twice = CAPTIONS[:1] * 2
    images = gathered(singles(drawn(model, twice, SamplingConfig(), n=1, seed=4, kept=Kept(None))))
    expected = [model.generate(twice[0], seed=seed)[0, 0] for seed in (4, 5)]
    np.testing.assert_array_equal(images, expected)
    assert (images[0] != images[1]).any()


def test_a_damaged_part_is_found_again(tmp_path):
    kept, found = Kept(tmp_path), []

    def answer():
        found.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(kept.arrays({"a": 1}, answer)["x"], np.arange(3))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    np.testing.assert_array_equal(kept.arrays({"a": 1}, answer)["x"], np.arange(3))
    kept.arrays({"a": 2}, answer)
    assert len(found) == 3


def test_blur_is_that_of_a_picture_of_256_pixels_at_any_side():
    image = pictures(1)
    large = np.array(Image.fromarray(image[0]).resize((256, 256)))
    expected = Image.fromarray(large).filter(ImageFilter.GaussianBlur(4))
    np.testing.assert_array_equal(blurred(large[None], 4)[0], np.asarray(expected))
    expected = Image.fromarray(image[0]).filter(ImageFilter.GaussianBlur(4 * tiny.PX / 256))
    np.testing.assert_array_equal(blurred(image, 4)[0], np.asarray(expected))
    assert blurred(image, 0) is image


def test_real_pictures_have_no_distance_from_themselves(suite):
    bench = Bench(networks=[network()], kept=Kept(None))
    parts = list(real(suite, suite.real, tiny.PX))
    row = bench.compare(parts, parts)
    assert row["FD Corner"] == pytest.approx(0, abs=1e-6)
    assert row["precision Corner"] == row["recall Corner"] == 1
    assert row["KID Corner x1000"] < 0  # unbiased: pairs of a picture with itself count between


def test_the_best_of_n_is_the_highest_scored_of_the_first():
    images = pictures(6).reshape(2, 3, tiny.PX, tiny.PX, 3)
    part = Part(rows=np.array([0, 1]), key="x", images=lambda: images)
    scored = np.array([[0.1, 0.3, 0.2], [0.0, -1.0, 5.0]])
    for first, picks in {1: (0, 0), 2: (1, 0), 3: (1, 2)}.items():
        (best,) = best_of([part], scored, first)
        np.testing.assert_array_equal(best.images(), images[[0, 1], picks])
    truth = Part(rows=np.arange(6), key="t", images=lambda: pictures(6))
    bench = Bench(networks=[network()], kept=Kept(None), judge=Colours())
    rows = rerank_study(bench, [truth], [part], scored, CAPTIONS[:2])
    assert [row["score it is chosen by"] for row in rows] == pytest.approx([5, 15, 265])
    judged = scores(Colours(), [part], CAPTIONS[:2])
    assert judged.shape == (2, 3)
    expected = 100 * np.maximum(judged[[0, 1], [1, 2]], 0).mean()
    assert rows[-1]["CLIP score"] == pytest.approx(expected)


def test_likelihood_equals_what_training_measures(model, suite):
    parts = list(real(suite, suite.truth, tiny.PX))
    nats = prior_nats(model, parts, CAPTIONS, suite.families)
    assert list(nats) == ["all", "animal", "fruit", "sign"]
    counts = [nats[family]["captions"] for family in nats]
    assert counts == [6, 2, 3, 1]
    shares = np.array(counts[1:]) / 6
    parts_of = [nats[family]["image_nats"] for family in list(nats)[1:]]
    assert nats["all"]["image_nats"] == pytest.approx(shares @ parts_of)

    text = jnp.asarray(model.tokenizer.encode(CAPTIONS, length=63))
    codes = jnp.asarray(model.encode(pictures(6)).reshape(6, -1))
    config, params = model.priors["prior"]
    logits = jax.jit(AutoregressivePrior(config).apply)({"params": params}, text, codes)
    _, expected = prior_loss(*logits, text, codes)
    for name in ("text_nats", "image_nats"):
        assert nats["all"][name] == pytest.approx(float(expected[name]), rel=1e-5)


def test_tokenizer_quality_counts_codes_and_decibels(model, suite):
    quality = tokenizer_quality(model, real(suite, suite.real, tiny.PX))
    assert 0 < quality["psnr"] < 30
    assert 1 <= quality["perplexity"] <= quality["codes"] <= tiny.DVAE_CONFIG.codes


def test_settings_change_one_thing_at_a_time():
    settings = Plan(temperatures=(0.5, 1.0), top_ps=(0.9,), guidances=(1.0, 2.0)).settings(
        SamplingConfig(guidance=2.0)
    )
    assert [str(sampling) for sampling in settings] == [
        "guidance 2.0",
        "temperature 0.5, guidance 2.0",
        "top_p 0.9, guidance 2.0",
        "as trained",
    ]


def test_what_cannot_be_done_is_said_before_anything_is_drawn(model, suite, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no study noise; choose from blur, sampling,"):
        run(model, suite, tmp_path, chosen=("noise",))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"plots need the package matplotlib: pip install dalle"):
        run(model, suite, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_reranker_its_study_is_left_out(model, suite, tmp_path):
    sections = run(model, suite, tmp_path, reranker=None, judge=None, chosen=("rerank",))
    assert [section.key for section in sections] == [
        *("request", "distances", "tokenizer", "samples", "prior")
    ]
    assert "CLIP score" not in sections[1].rows[0]
    assert studies.RADII == (0, 1, 2, 4, 8)
