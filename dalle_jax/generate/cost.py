"""What a large model takes on this machine, said before its weights are read.

Seconds are an estimate: an autoregressive prior reads all its weights for each code, which takes
longer than computing with them. How quickly this device reads, and how quickly it multiplies large
matrices, as the codec does, is timed in a moment. Source: ours.
"""

import logging
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.generate.code_sampler import bytes_each
from dalle_jax.generate.model_folder import ModelError
from dalle_jax.generate.part_checks import AnyPriorConfig, codec_shapes
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.generate.tensor_file import Dtype, Tensors, flatten_params, nest, stored_dtype
from dalle_jax.memory import available_memory
from dalle_jax.models import codec as codecs
from dalle_jax.models.codec import CodecConfig
from dalle_jax.models.progressive_prior import ProgressiveConfig

LARGE = 200_000_000
"""Parameters above which it is worth saying."""
_LAYERS, _WIDTH, _STEPS, _RUNS = 8, 2048, 2, 3  # of what is timed; 134 MB in float32
_EACH_CODE = r"(decoder/)?layers/(?!cross/[kv]/)|head/(?!text/)"
"""Weights that are read for each code, by their names."""
_CAPTIONS = r"(encoder/)?layers/.*kernel|decoder/layers/cross/[kv]/"
"""Weights that are read for each token of a caption."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a codec and its priors."""

    parameters: int
    """Numbers of all."""
    weight_bytes: int
    """Of all, as they are held in memory."""
    largest_bytes: int
    """Of the largest array, which is in memory twice while it is read."""
    image_bytes: int
    """Beside the weights while one image is sampled and decoded; on a CPU also the kernels that are
    held in bfloat16, all of which XLA widens to float32 there."""
    read_bytes: int | None
    """Weights that are read for an image; None if no prior samples code after code."""
    flops: float
    """Of the captions' encoder, and of the codec that decodes the image."""

    @property
    def needed_bytes(self) -> int:
        """Most memory at once."""
        return self.weight_bytes + max(2 * self.largest_bytes, self.image_bytes)


def announce(
    name: str,
    codec: CodecConfig,
    codec_params: Any,
    priors: Mapping[str, tuple[AnyPriorConfig, Any]],
    *,
    px: int,
    dtype: Dtype,
    must_fit: bool = True,
) -> None:
    """Logs what a large model takes; of a small one nothing. No weights are read.

    Args:
      name: of the model.
      codec: sizes of the codec, which is held in float32.
      codec_params: its nested weights, of which only the shapes count.
      priors: sizes and nested weights of the priors, by part.
      px: side of the images, in pixels.
      dtype: that the priors' kernels are held in.
      must_fit: False for a model that is not used here.
    Raises:
      ModelError: if it does not fit into what is free of memory, on a GPU of its memory.
    """
    trees = [codec_params, *(params for _, params in priors.values())]
    if sum(leaf.size for leaf in jax.tree.leaves(trees)) <= LARGE:
        return
    flat = {part: (config, flatten_params(params)) for part, (config, params) in priors.items()}
    on_cpu = jax.default_backend() == "cpu"
    codec_tensors = flatten_params(codec_params)
    cost = cost_of(codec, codec_tensors, flat, px=px, dtype=dtype, on_cpu=on_cpu)
    free = _free_memory()
    if must_fit and free is not None:
        check_memory(name, cost, free=free, dtype=dtype, on_cpu=on_cpu)
    _log.info(_expectation(name, cost, free, dtype, on_cpu))


def cost_of(
    codec: CodecConfig,
    codec_tensors: Tensors,
    priors: Mapping[str, tuple[AnyPriorConfig, Tensors]],
    *,
    px: int,
    dtype: Dtype,
    on_cpu: bool,
) -> Cost:
    """Counts what a model takes; no weights are read.

    Args:
      codec: sizes of the codec, which is held in float32.
      codec_tensors: its weights, of which only the shapes count.
      priors: sizes and weights of the priors, by part.
      px: side of the images, in pixels.
      dtype: that the priors' kernels are held in.
      on_cpu: whether it is used on a CPU.
    """
    held = [4 * tensor.size for tensor in codec_tensors.values()]
    parameters = sum(held) // 4
    image_bytes, read_bytes, flops = 16 * px**2 * codec.width, None, _decoder_flops(codec, px)
    for config, tensors in priors.values():
        numbers = {name: tensor.size for name, tensor in tensors.items()}
        sizes = {name: n * stored_dtype(name, dtype).itemsize for name, n in numbers.items()}
        parameters += sum(numbers.values())
        held += sizes.values()
        widened = sum(4 * n for name, n in numbers.items() if sizes[name] < 4 * n and on_cpu)
        cached = bytes_each(config, SamplingConfig(guidance=2.0))
        image_bytes = max(image_bytes, widened + cached)
        if not isinstance(config, ProgressiveConfig):
            read = {name: 4 * n for name, n in numbers.items()} if on_cpu else sizes
            each = sum(size for name, size in read.items() if re.match(_EACH_CODE, name))
            read_bytes = config.image_length * each
            of_captions = sum(n for name, n in numbers.items() if re.match(_CAPTIONS, name))
            flops += 2 * (config.text_length - 1) * of_captions
    return Cost(
        parameters=parameters,
        weight_bytes=sum(held),
        largest_bytes=max(held),
        image_bytes=image_bytes,
        read_bytes=read_bytes,
        flops=flops,
    )


def check_memory(name: str, cost: Cost, *, free: int, dtype: Dtype, on_cpu: bool) -> None:
    """Raises a ModelError if a model does not fit into what is free, in bytes."""
    if cost.needed_bytes > free:
        half = " or halve its kernels with dtype bfloat16," if dtype == "float32" else ""
        if on_cpu:  # where bfloat16 takes more
            half = " or open it in float32," if dtype == "bfloat16" else ""
        raise ModelError(
            f"model {name!r} needs {cost.needed_bytes / 1e9:.1f} GB of memory in {dtype}, but "
            f"{free / 1e9:.1f} GB are free; end other programs,{half} or take a larger machine"
        )


def _expectation(name: str, cost: Cost, free: int | None, dtype: Dtype, on_cpu: bool) -> str:
    said = (
        f"{name}: {cost.parameters / 1e6:,.0f} million parameters, "
        f"{cost.needed_bytes / 1e9:.1f} GB of memory in {dtype}"
    )
    if free is not None:
        said += f" ({free / 1e9:.1f} GB are free)"
    if cost.read_bytes is not None:
        reading, multiplying = _rates("float32" if on_cpu else dtype)
        took = cost.read_bytes / reading + cost.flops / multiplying
        said += (
            f"; an image in about {took:.0f} s, estimated from {reading / 1e9:.1f} GB/s of weights "
            f"read and {multiplying / 1e9:,.0f} GFLOP/s here"
        )
    return said


def _decoder_flops(codec: CodecConfig, px: int) -> float:
    params = nest(codec_shapes(codec))
    side = px // codec.factor
    codes = jax.ShapeDtypeStruct((1, side, side), np.int32)
    analysis = jax.jit(codecs.decode, static_argnums=0).lower(codec, params, codes).cost_analysis()
    return float((analysis or {}).get("flops", 0.0))


def _free_memory() -> int | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return available_memory()


def _rates(dtype: Dtype) -> tuple[float, float]:
    """Bytes of weights read, and operations of a large product done, in a second."""
    stack = jnp.zeros((_LAYERS, _WIDTH, _WIDTH), stored_dtype("kernel", dtype))
    row, square = jnp.zeros((1, _WIDTH), stack.dtype), jnp.zeros((_WIDTH, _WIDTH))
    reading = _seconds(lambda: _layers(stack, row))
    multiplying = _seconds(lambda: _product(square, square))
    return _STEPS * stack.nbytes / reading, 2 * _WIDTH**3 / multiplying


@jax.jit
def _layers(stack, row):
    """Products as the samplers make them: layer after layer of a stack, code after code."""

    def step(x, _):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, stack)[0], None

    return jax.lax.scan(step, row, None, length=_STEPS)[0]


@jax.jit
def _product(x, y):
    return x @ y


def _seconds(run: Callable[[], Any]) -> float:
    """Median of a few runs, after the one that compiles."""
    times = []
    for _ in range(1 + _RUNS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
