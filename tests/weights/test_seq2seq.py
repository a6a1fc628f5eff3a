"""dalle-mini's transformer gives what its authors' code gave: golden/weights/seq2seq."""

import json
import math
from functools import partial
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipe

from dalle_jax.cli import main
from dalle_jax.errors import UserError
from dalle_jax.generate.joint_sampler import ImageSpec, sample_jointly
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models import seq2seq_prior, vqgan
from dalle_jax.models.seq2seq_prior import Seq2SeqConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.text.clip_bpe import SIGNS
from dalle_jax.weights.errors import WeightsError
from dalle_jax.weights.msgpack_file import read_msgpack
from dalle_jax.weights.rules import to_ours
from dalle_jax.weights.seq2seq_rules import DALLE_MINI, dalle_mini_config

GOLDEN = Path(__file__).parent.parent / "golden" / "weights" / "seq2seq"
CODES = 20


def shapes_of(config):
    init = partial(seq2seq_prior.init_params, config)
    drawn = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    flat = flax.traverse_util.flatten_dict(drawn, sep="/")
    return {name: leaf.shape for name, leaf in flat.items()}


def imported(name, folder):
    """Config and parameters of a published file with the recipe's weights, and what is wanted."""
    wanted = np.load(GOLDEN / f"{name}.npz")
    flat = {k: recipe.weights(k, tuple(s)) for k, s in json.loads(str(wanted["shapes"])).items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    (folder / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(params))
    (folder / "config.json").write_text(str(wanted["config"]))
    config = dalle_mini_config(folder / "config.json", codes=CODES)
    arrays = to_ours(read_msgpack(folder / "flax_model.msgpack"), DALLE_MINI, shapes_of(config))
    pads = config.text_vocabulary + np.arange(config.text_slots)[None]
    text = np.where(wanted["text"] == 1, pads, wanted["text"]).astype(np.int32)
    params = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(arrays, sep="/"))
    return config, params, jnp.asarray(text), wanted


@pytest.mark.parametrize("name", ["dalle-mini", "dalle-mini-scanned"])
def test_logits_are_those_of_the_peer(name, tmp_path):
    config, params, text, wanted = imported(name, tmp_path)
    assert config.start_of_image == 20 and config.decoder_depth == 3
    codes = jnp.asarray(wanted["codes"], jnp.int32)
    logits = jax.jit(seq2seq_prior.forward, static_argnums=0)(config, params, text, codes)
    peer = wanted["logits"][..., :CODES]  # the rows beyond stand for no code
    assert np.abs(logits - peer).max() < 1e-5 * np.abs(peer).max()


def test_cached_decode_equals_full_forward_for_several_images_of_a_caption(tmp_path):
    config, params, text, _ = imported("dalle-mini-scanned", tmp_path)
    codes = np.random.RandomState(1).randint(0, CODES, (4, config.image_length)).astype(np.int32)
    forward = jax.jit(seq2seq_prior.forward, static_argnums=0)
    full = forward(config, params, jnp.repeat(text, 2, axis=0), jnp.asarray(codes))
    captions = seq2seq_prior.encode(config, params, text)
    step = jax.jit(seq2seq_prior.decode_step, static_argnums=0)
    cache, previous = seq2seq_prior.init_cache(config, 4), jnp.full(4, 7)
    for position in range(config.image_length):
        found, cache = step(config, params, captions, cache, previous, jnp.int32(position))
        np.testing.assert_allclose(found, full[:, position], atol=2e-5)
        previous = jnp.asarray(codes[:, position])


def test_published_sizes_are_those_that_the_peer_counts():
    counts = json.loads((GOLDEN / "counts.json").read_text())
    mini = Seq2SeqConfig(
        width=1024, heads=16, mlp=2730, encoder_depth=12, decoder_depth=12, text_vocabulary=50264,
        image_vocabulary=16385,
    )  # fmt: skip
    for name, config in (("mini", mini), ("mega", Seq2SeqConfig())):
        assert sum(map(math.prod, shapes_of(config).values())) == counts[name], name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ln_positions": "swinv2"}, "has ln_positions 'swinv2', but only 'normformer'"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings True, but only False"),
        ({"encoder_ffn_dim": 25}, "has ffn_dim 25 and 24; one number is wanted"),
        ({"d_model": "16"}, "has d_model '16', but a size is wanted"),
        ({"image_length": 15}, "has image_length 15, which is no square"),
        ({"decoder_start_token_id": 99}, "must hold 20 codes and the start 99"),
        ({"decoder_attention_heads": 3, "encoder_attention_heads": 3}, "a multiple of its 3 heads"),
    ],
)
def test_a_config_that_published_models_do_not_have_is_refused(change, said, tmp_path):
    config = json.loads(str(np.load(GOLDEN / "dalle-mini.npz")["config"])) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        dalle_mini_config(tmp_path / "config.json", codes=CODES)


@pytest.mark.parametrize("data", ["[]", "{", "[" * 10**5])
def test_a_damaged_config_is_refused_in_a_sentence(data, tmp_path):
    (tmp_path / "config.json").write_text(data)
    with pytest.raises(WeightsError, match=r"config.json (is damaged|holds a list)"):
        dalle_mini_config(tmp_path / "config.json")


def test_an_imported_model_generates_with_guidance_as_a_written_out_loop_does(tmp_path, capsys):
    wanted = np.load(GOLDEN / "dalle-mini-scanned.npz")
    signs = [*SIGNS.values(), "ca", "cat"]
    pieces = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", *signs])}
    (tmp_path / "vocab.json").write_text(json.dumps(pieces))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    shapes = json.loads(str(wanted["shapes"])) | {
        "model/encoder/embed_tokens/embedding": [len(pieces), 16]
    }
    flat = {k: recipe.weights(k, tuple(s)) for k, s in shapes.items()}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    (tmp_path / "m.msgpack").write_bytes(flax.serialization.msgpack_serialize(params))
    config = json.loads(str(wanted["config"])) | {"encoder_vocab_size": len(pieces)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {"width": 4, "multipliers": (1, 1), "blocks_per_group": 1, "attention": ()}
    codec = VQGANConfig(**sizes, z_width=4, codes=CODES, code_width=4, unit_pixels=True)
    codec_params = vqgan.init_params(codec, jax.random.key(0))
    saved = Model(name="v", px=8, codec=codec, codec_params=codec_params, kernels="float32")
    saved.save(tmp_path / "vqgan")
    files = [str(tmp_path / x) for x in ("m.msgpack", "config.json", "vocab.json", "merges.txt")]
    out = ["--out", str(tmp_path / "mini")]
    main(["import", "dalle-mini", *files, "--codec", str(tmp_path / "vqgan"), *out])
    assert "parameters" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["import", "dalle-mini", *files, *out])
    assert "import dalle-mini-vqgan, mindalle-vqgan or" in " ".join(capsys.readouterr().err.split())

    model = Model.load(tmp_path / "mini")
    assert "Codec" in model.card
    sampling = SamplingConfig(temperature=0, guidance=3)
    images = model.generate("the cat", n=2, sampling=sampling)
    sizes, params = model.priors["seq2seq"]
    ids = model.tokenizer.encode(["the cat", ""], length=8)
    codes, forward = np.zeros((2, 16), np.int32), jax.jit(seq2seq_prior.forward, static_argnums=0)
    for position in range(16):
        c, u = np.asarray(forward(sizes, params, jnp.asarray(ids), jnp.asarray(codes)))
        codes[:, position] = (u + 3 * (c - u))[position].argmax()
    np.testing.assert_array_equal(images[0, 0], model.decode(codes[:1].reshape(1, 4, 4))[0])
    np.testing.assert_array_equal(images[0, 0], images[0, 1])
    specs = [ImageSpec("the cat", 0, 0)]
    (grids,) = sample_jointly(sizes, params, model.tokenizer, specs, sampling=sampling)
    np.testing.assert_array_equal(grids.reshape(1, 16), codes[:1])
