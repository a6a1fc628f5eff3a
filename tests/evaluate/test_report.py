import contextlib
import dataclasses
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
from dalle_jax.evaluate.evaluation_config import EvaluationConfig
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.image_sets import (
    ImageBatch,
    first_of_each,
    real_images,
    sampled_images,
    stack_images,
)
from dalle_jax.evaluate.likelihood import codec_quality, prior_nats
from dalle_jax.evaluate.report import evaluate
from dalle_jax.evaluate.result_cache import ResultCache
from dalle_jax.evaluate.studies import ImageMetrics, best_of, blurred, clip_scores, rerank_study
from dalle_jax.evaluate.suites import Suite
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.image.pixels import encode_png
from dalle_jax.losses import prior_loss
from dalle_jax.models.autoregressive_prior import AutoregressivePrior
from dalle_jax.models.progressive_prior import ProgressivePrior

CAPTIONS = ("red apple", "blue heart", "crying cat", "green apple", "a cat", "apple")
CONFIG = EvaluationConfig(
    captions=None,
    sampling_captions=None,
    rerank_captions=2,
    rerank_samples=3,  # six images at a time everywhere: one program
    temperatures=(0.5, 1.0),
    top_ps=(),
    guidances=(),
)


def random_images(count=12):
    return np.random.default_rng(0).integers(0, 256, (count, tiny.PX, tiny.PX, 3), np.uint8)


@pytest.fixture(scope="module")
def suite():
    source = [{"image": encode_png(image)} for image in random_images()]
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

    def encode_images(self, images):
        return _unit(images.mean((1, 2)) - 127)

    def encode_texts(self, captions):
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
        "config": CONFIG,
        "networks": [network()],
        "reranker": Colours(),
        "judge": Colours(),
        "show": show,
    }
    return evaluate(model, suite, out=out, **(options | changes))


@pytest.fixture(scope="module")
def finished(model, suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("reports") / "finished"
    run(model, suite, out)
    return out


def test_a_report_is_self_contained(finished):
    numbers = json.loads((finished / "report.json").read_text())
    assert list(numbers) == [
        *("request", "distances", "codec", "prior", "blur", "sampling", "rerank")
    ]
    assert [row["images"] for row in numbers["distances"]] == ["samples", "reconstructions"]
    assert {"FD Corner", "KID Corner x1000", "KID Corner x1000 +-", "CLIP score"} <= set(
        numbers["distances"][0]
    )
    assert [row["radius"] for row in numbers["blur"]] == [0, 1, 2, 4, 8]
    assert [row["sampling"] for row in numbers["sampling"]] == ["as trained", "temperature 0.5"]
    assert [row["N"] for row in numbers["rerank"]] == [1, 2, 3]
    text = (finished / "report.md").read_text()
    assert text.startswith("# tiny on stand-in\n")
    for line in text.splitlines():
        if line.startswith("!["):
            name = line.partition("(")[2].removesuffix(")")
            assert (finished / name).read_bytes().startswith(b"\x89PNG")
    shown = {path.name for path in finished.iterdir()}
    assert {"blur.png", "rerank.png", "samples-sheet.png", "sampling-sheet.png"} <= shown


def test_captions_that_are_too_long_are_truncated_and_counted(model, suite, tmp_path):
    captions = ("red apple " * 40, *suite.captions[1:])
    longer = dataclasses.replace(suite, captions=captions)
    sections = run(model, longer, tmp_path, chosen=())
    assert sections[0].rows[0]["truncated captions"] == 1


def test_features_of_a_set_are_on_disk_in_the_order_of_its_images(suite):
    metrics = ImageMetrics(networks=[network()], cache=ResultCache(None))
    backwards = list(real_images(suite, suite.real, tiny.PX))[::-1]
    features, logits = metrics._features(metrics.networks[0], backwards, 0)
    assert isinstance(features, np.memmap) and isinstance(logits, np.memmap)
    np.testing.assert_allclose(features, network()(random_images())[0], rtol=1e-6)


def test_too_few_captions_are_refused_before_work_begins(model, suite, tmp_path):
    for captions in (0, 1):
        with pytest.raises(UserError, match=f"2 images or more of both kinds, got {captions}"):
            run(model, suite, tmp_path, config=EvaluationConfig(captions=captions))
    assert not list(tmp_path.iterdir())


def test_a_stopped_evaluation_goes_on_and_ends_as_an_unbroken_one(
    model, suite, finished, tmp_path, monkeypatch
):
    generated = []
    generate = model.generate

    def counted(prompts, **options):
        generated.append(len(prompts) * options["n"])
        if len(generated) == 3:
            raise KeyboardInterrupt
        return generate(prompts, **options)

    monkeypatch.setattr(model, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, suite, tmp_path)
    assert not (tmp_path / "report.json").exists()
    run(model, suite, tmp_path)
    assert (tmp_path / "report.json").read_text() == (finished / "report.json").read_text()
    total = sum(generated) - generated[2]  # the third was not made
    measured = []
    run(model, suite, tmp_path, networks=[network(measured)])
    assert sum(generated) - generated[2] == total
    assert measured == []


def test_another_request_generates_its_own_images(model, suite, tmp_path):
    cache = ResultCache(tmp_path)
    first = stack_images(
        sampled_images(model, CAPTIONS, SamplingConfig(), n=1, seed=0, cache=cache)
    )
    other = stack_images(
        sampled_images(model, CAPTIONS, SamplingConfig(), n=1, seed=1, cache=cache)
    )
    cooler = stack_images(
        sampled_images(model, CAPTIONS, SamplingConfig(temperature=0.5), n=1, seed=0, cache=cache)
    )
    assert len({images.tobytes() for images in (first, other, cooler)}) == 3
    again = stack_images(
        sampled_images(model, CAPTIONS, SamplingConfig(), n=1, seed=0, cache=cache)
    )
    np.testing.assert_array_equal(again, first)


def test_a_repeated_caption_gets_another_image(model):
    twice = CAPTIONS[:1] * 2
    images = stack_images(
        first_of_each(
            sampled_images(model, twice, SamplingConfig(), n=1, seed=4, cache=ResultCache(None))
        )
    )
    expected = [model.generate(twice[0], seed=seed)[0, 0] for seed in (4, 5)]
    np.testing.assert_array_equal(images, expected)
    assert (images[0] != images[1]).any()


def test_a_damaged_result_is_computed_again(tmp_path):
    cache, computed = ResultCache(tmp_path), []

    def compute():
        computed.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        np.testing.assert_array_equal(cache.get({"a": 1}, compute)["x"], np.arange(3))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    np.testing.assert_array_equal(cache.get({"a": 1}, compute)["x"], np.arange(3))
    cache.get({"a": 2}, compute)
    assert len(computed) == 3


def test_blur_is_that_of_an_image_of_256_pixels_at_any_side():
    image = random_images(1)
    large = np.array(Image.fromarray(image[0]).resize((256, 256)))
    expected = Image.fromarray(large).filter(ImageFilter.GaussianBlur(4))
    np.testing.assert_array_equal(blurred(large[None], 4)[0], np.asarray(expected))
    expected = Image.fromarray(image[0]).filter(ImageFilter.GaussianBlur(4 * tiny.PX / 256))
    np.testing.assert_array_equal(blurred(image, 4)[0], np.asarray(expected))
    assert blurred(image, 0) is image


def test_real_images_have_no_distance_from_themselves(suite):
    metrics = ImageMetrics(networks=[network()], cache=ResultCache(None))
    batches = list(real_images(suite, suite.real, tiny.PX))
    row = metrics.compare(batches, batches)
    assert row["FD Corner"] == pytest.approx(0, abs=1e-6)
    assert row["precision Corner"] == row["recall Corner"] == 1
    assert row["KID Corner x1000"] < 0  # unbiased: pairs of an image with itself count between


def test_the_best_of_n_is_the_highest_scored_of_the_first():
    images = random_images(6).reshape(2, 3, tiny.PX, tiny.PX, 3)
    batch = ImageBatch(rows=np.array([0, 1]), key="x", images=lambda: images)
    scores = np.array([[0.1, 0.3, 0.2], [0.0, -1.0, 5.0]])
    for first, picks in {1: (0, 0), 2: (1, 0), 3: (1, 2)}.items():
        (best,) = best_of([batch], scores, first)
        np.testing.assert_array_equal(best.images(), images[[0, 1], picks])
    truth = ImageBatch(rows=np.arange(6), key="t", images=lambda: random_images(6))
    metrics = ImageMetrics(networks=[network()], cache=ResultCache(None), judge=Colours())
    rows = rerank_study(metrics, [truth], [batch], scores, CAPTIONS[:2])
    assert [row["reranker score"] for row in rows] == pytest.approx([5, 15, 265])
    judged = clip_scores(Colours(), [batch], CAPTIONS[:2])
    assert judged.shape == (2, 3)
    expected = 100 * np.maximum(judged[[0, 1], [1, 2]], 0).mean()
    assert rows[-1]["CLIP score"] == pytest.approx(expected)


def test_likelihood_equals_what_training_measures(model, suite):
    batches = list(real_images(suite, suite.truth, tiny.PX))
    nats = prior_nats(model, "prior", batches, CAPTIONS, suite.families)
    assert list(nats) == ["all", "animal", "fruit", "sign"]
    counts = [nats[family]["captions"] for family in nats]
    assert counts == [6, 2, 3, 1]
    shares = np.array(counts[1:]) / 6
    of_families = [nats[family]["image_nats"] for family in list(nats)[1:]]
    assert nats["all"]["image_nats"] == pytest.approx(shares @ of_families)

    text = jnp.asarray(model.tokenizer.encode(CAPTIONS, length=63))
    codes = jnp.asarray(model.encode(random_images(6)).reshape(6, -1))
    config, params = model.priors["prior"]
    logits = jax.jit(AutoregressivePrior(config).apply)({"params": params}, text, codes)
    _, expected = prior_loss(*logits, text, codes)
    for name in ("text_nats", "image_nats"):
        assert nats["all"][name] == pytest.approx(float(expected[name]), rel=1e-5)


def test_a_progressive_priors_likelihood_is_that_of_one_code_a_stage(suite):
    model = tiny.model(prior=None, prior_params=None, **tiny.progressive_parts())
    batches = real_images(suite, suite.truth, tiny.PX)
    nats = prior_nats(model, "progressive", batches, CAPTIONS, suite.families)
    assert nats["fruit"].keys() == {"captions", "image_nats"}

    text = jnp.asarray(model.tokenizer.encode(CAPTIONS, length=63))
    codes = model.encode(random_images(6)).reshape(6, -1)
    config, params = model.priors["progressive"]
    stage = jnp.tile(jnp.arange(16), (6, 1))
    apply = jax.jit(ProgressivePrior(config).apply)
    log_p = np.asarray(jax.nn.log_softmax(apply({"params": params}, text, codes, stage)))
    chosen = [log_p[i, cell, code] for i in range(6) for cell, code in enumerate(codes[i])]
    assert nats["all"]["image_nats"] == pytest.approx(-np.mean(chosen), rel=1e-5)


def test_codec_quality_counts_codes_and_decibels(model, suite):
    quality = codec_quality(model, real_images(suite, suite.real, tiny.PX))
    assert 0 < quality["psnr"] < 30
    assert 1 <= quality["perplexity"] <= quality["codes"] <= tiny.DVAE_CONFIG.codes


def test_settings_change_one_thing_at_a_time():
    settings = EvaluationConfig(
        temperatures=(0.5, 1.0), top_ps=(0.9,), guidances=(1.0, 2.0)
    ).settings(SamplingConfig(temperature=1, guidance=2.0))
    assert [sampling.describe() for sampling in settings] == [
        "guidance 2.0",
        "temperature 0.5, guidance 2.0",
        "top_p 0.9, guidance 2.0",
        "as trained",
    ]


def test_bad_requests_are_refused_before_sampling(model, suite, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no study noise; choose from blur, sampling,"):
        run(model, suite, tmp_path, chosen=("noise",))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"plots need the package matplotlib: pip install dalle"):
        run(model, suite, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_each_prior_has_a_section_and_without_a_reranker_its_study_is_left_out(suite, tmp_path):
    model = tiny.model(**tiny.progressive_parts())
    without = {"reranker": None, "judge": None, "chosen": ("rerank",)}
    sampling = SamplingConfig(decoder="autoregressive")
    sections = run(model, suite, tmp_path, sampling=sampling, **without)
    keys = [section.key for section in sections]
    assert keys == ["request", "distances", "codec", "samples", "prior", "progressive"]
    assert ["text_nats" in section.rows[0] for section in sections[4:]] == [True, False]
    assert "CLIP score" not in sections[1].rows[0]
    assert studies.RADII == (0, 1, 2, 4, 8)
