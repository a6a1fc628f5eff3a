"""The CLIP's stage: its loss in parts, its temperature, its measurements, reconstructions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dalle_jax.parallel.powersgd import PowerSGDConfig
from dalle_jax.train.clip_stage import ClipRun, ClipStage, _shifted, short_clip_run
from dalle_jax.train.loop import LoopConfig

CONFIG, PARAMS = tiny.clip_parts()["config"], tiny.clip_parts()["params"]


def stage(validation=None, **changes):
    settings = {"batch_size": 8, "shift": 0, "warmup_steps": 0} | changes
    run = short_clip_run(model=CONFIG, loop=LoopConfig(steps=10), **settings)
    return ClipStage(run, validation=validation or {})


def batch(B=8):
    rng = np.random.default_rng(0)
    text = rng.integers(0, 300, (B, CONFIG.slots)).astype(np.int32)
    text[3] = text[5]
    return {"image": rng.integers(0, 256, (B, 8, 8, 3), np.uint8), "text": text}


def test_defaults_are_the_papers():
    run = ClipRun()
    assert (run.batch_size, run.learning_rate, run.weight_decay) == (32_768, 5e-4, 0.2)
    assert (run.warmup_steps, run.shift, run.reconstructions) == (2_000, 0, False)
    assert (run.model.px, run.model.patch, run.model.features) == (224, 32, 512)


def test_micro_batches_give_loss_and_gradient_of_the_whole_batch(key):
    def differentiate(s):
        grad = jax.value_and_grad(s.loss, has_aux=True)
        return jax.jit(grad)(PARAMS, batch(), key, jnp.int32(0))

    whole, parts = differentiate(stage()), differentiate(stage(micro_batch=2))
    chex.assert_trees_all_close(whole, parts, atol=1e-5)


def test_settings_that_would_change_the_loss_are_refused():
    with pytest.raises(
        ValueError, match="accumulation_steps is 2, but a contrastive loss compares all of"
    ):
        ClipRun(loop=LoopConfig(steps=1, accumulation_steps=2))
    with pytest.raises(ValueError, match="powersgd.rank is 4, but .* compares all of a batch"):
        ClipRun(loop=LoopConfig(steps=1, powersgd=PowerSGDConfig(rank=4)))
    with pytest.raises(ValueError, match="batch_size is 8, but has to be a multiple of micro_ba"):
        short_clip_run(batch_size=8, micro_batch=3)


def test_similarities_are_multiplied_by_100_at_most():
    optimizer = stage(learning_rate=10.0).optimizer
    params = {"log_scale": jnp.log(99.0)}
    for grad, expected in ((-1.0, 100), (1.0, 99 * np.exp(-10))):  # downhill is up
        updates, _ = optimizer.update(
            {"log_scale": jnp.float32(grad)}, optimizer.init(params), params, value=jnp.float32(0)
        )
        scale = jnp.exp(params["log_scale"] + updates["log_scale"])
        assert float(scale) == pytest.approx(expected, rel=1e-4)


def test_shifted_images_repeat_their_border(key):
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1).repeat(3, axis=3)
    moved = np.asarray(_shifted(key, jnp.asarray(image.repeat(16, axis=0)), 1))
    padded = np.pad(image[0], ((1, 1), (1, 1), (0, 0)), mode="edge")
    allowed = {padded[y : y + 4, x : x + 4].tobytes() for y in range(3) for x in range(3)}
    found = {image.tobytes() for image in moved}
    assert found <= allowed
    assert len(found) > 3


def test_evaluation_measures_each_set_whatever_its_batches():
    whole = batch()
    parts = [{k: v[i] for k, v in whole.items()} for i in (slice(0, 6), slice(6, 8))]
    sets = {"": lambda: iter([whole]), "reconstructed_": lambda: iter(parts)}
    measured = stage(sets).evaluate(PARAMS)
    assert measured["image_to_text_1"] == measured["reconstructed_image_to_text_1"]
    assert set(measured) == {
        f"{beginning}{way}_{k}"
        for beginning in sets
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5)
    }
