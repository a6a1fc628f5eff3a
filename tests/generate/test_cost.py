"""What a large model says before it is loaded."""

import pytest
import tiny

from dalle_jax.generate import cost, tensor_file
from dalle_jax.generate.code_sampler import bytes_each
from dalle_jax.generate.model import Model
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.part_checks import codec_shapes, prior_shapes
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.models.gpt_prior import GPTConfig
from dalle_jax.models.seq2seq_prior import Seq2SeqConfig

D, L, K, I = 8, 3, 32, 16  # noqa: E741
GPT = GPTConfig(width=D, depth=L, heads=2, text_vocabulary=40, text_slots=5, grid=4, codes=K, pad=0)


def cost_of(prior, **options):
    codec = tiny.VQGAN_CONFIG
    inputs = codec, codec_shapes(codec), {"any": (prior, prior_shapes(prior))}
    return cost.cost_of(*inputs, px=tiny.PX, **options)


def test_a_gpt_reads_its_layers_and_the_head_of_codes_for_each_code():
    counted = cost_of(GPT, dtype="float32", on_cpu=True)
    layers = L * (12 * D**2 + 13 * D)
    assert counted.read_bytes == 4 * I * (layers + 2 * D + D * K)
    tables = D * (40 + 5 + K + I)
    codec = sum(leaf.size for leaf in codec_shapes(tiny.VQGAN_CONFIG).values())
    assert counted.parameters == codec + layers + tables + 2 * D + D * K + D * 40
    assert counted.weight_bytes == 4 * counted.parameters


def test_an_encoder_is_not_read_for_each_code_nor_are_keys_of_its_captions():
    F, E = 12, 2
    config = Seq2SeqConfig(
        width=D, heads=2, mlp=F, encoder_depth=E, decoder_depth=L, text_vocabulary=40, text_slots=5,
        grid=4, codes=K, image_vocabulary=K + 1, start_of_image=K,
    )  # fmt: skip
    norms = 2 * 3 * D + D + F  # of two attentions, and of the MLP
    layers = L * (6 * D**2 + 3 * D * F + norms)
    counted = cost_of(config, dtype="float32", on_cpu=True)
    assert counted.read_bytes == 4 * I * (layers + D * (K + 1))


def test_bfloat16_halves_kernels_but_a_cpu_widens_them_again():
    whole, half, widened = (
        cost_of(GPT, dtype=dtype, on_cpu=on_cpu)
        for dtype, on_cpu in (("float32", False), ("bfloat16", False), ("bfloat16", True))
    )
    kernels = L * 12 * D**2  # the head stays in float32
    assert whole.weight_bytes - half.weight_bytes == 2 * kernels
    assert whole.read_bytes - half.read_bytes == 2 * kernels * I
    assert widened.weight_bytes == half.weight_bytes and widened.read_bytes == whole.read_bytes
    cached = bytes_each(GPT, SamplingConfig(guidance=2.0))
    assert widened.image_bytes == max(half.image_bytes, 4 * kernels + cached)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model that counts as a large one, on a device of known speed."""
    tiny.model().save(tmp_path / "model")
    monkeypatch.setattr(cost, "LARGE", 0)
    monkeypatch.setattr(cost, "_rates", lambda dtype: (1e3, 1e12))
    return tmp_path / "model"


def test_a_large_model_says_what_it_takes(saved, caplog, monkeypatch):
    monkeypatch.setattr(cost, "available_memory", lambda: 3 * 10**9)
    with caplog.at_level("INFO", logger="dalle_jax"):
        model = Model.load(saved)
    (line,) = caplog.messages
    config, params = model.priors["prior"]
    tensors = tensor_file.flatten_params(params)
    read = sum(x.size for name, x in tensors.items() if name.startswith(("layers/", "head/")))
    read -= tensors["head/text/kernel"].size
    seconds = 4 * read * config.image_length / 1e3
    assert line.startswith("tiny: 0 million parameters, 0.0 GB of memory in float32 (3.0 GB are")
    assert f"; an image in about {seconds:.0f} s, estimated from 0.0 GB/s" in line


def test_what_does_not_fit_is_refused_before_a_weight_is_read(saved, monkeypatch):
    monkeypatch.setattr(cost, "available_memory", lambda: 1000)
    monkeypatch.setattr(tensor_file, "_read_tensor", lambda path, name: pytest.fail(name))
    with pytest.raises(ModelError, match="'tiny' needs 0.0 GB of memory in float32, but 0.0 GB"):
        Model.load(saved)
    with pytest.raises(ModelError, match="or open it in float32"):  # on a CPU
        Model.load(saved, dtype="bfloat16")


def test_rates_of_this_device_are_plausible():
    reading, multiplying = cost._rates("float32")
    assert 1e7 < reading < 1e14 and 1e8 < multiplying < 1e16
