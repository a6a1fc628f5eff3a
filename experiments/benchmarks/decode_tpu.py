"""What sampling reads and writes in a TPU's memory, by its own compiler, and the bound on its time.

    python experiments/benchmarks/decode_tpu.py --out decode_tpu.jsonl

Nothing runs. The loops of both samplers are compiled for one chip, with kernels in bfloat16 and as
many captions as images. Bytes are those of the optimised loop body; of a deep program, which takes
long to compile, they follow from those of two shallow ones. Started again, the script goes on with
what is missing. Needs `pip install dalle_jax[tpu]`.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import counting
import hbm
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from accelerator import SIZES
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax.generate import autoregressive_sampler, progressive_sampler
from dalle_jax.models import autoregressive_prior, progressive_prior
from dalle_jax.models.prior_config import PUBLISHED, PriorConfig, PriorSizes, ProgressiveConfig
from dalle_jax.planner.plan import CHIPS
from dalle_jax.planner.topology import tpu_devices

MODELS: dict[str, PriorConfig] = {name: PriorConfig(**sizes) for name, sizes in SIZES.items()}
MODELS["12B"] = PUBLISHED["12B"]
SHALLOW = (4, 12)  # far apart: some 100 MB of weights stay on the chip, by chance more or fewer
BANDWIDTHS = {"TPU-v5e": 819e9, "TPU-v5p": 2765e9, "H100-80GB": 3350e9}  # of data sheets, bytes/s

Decoder = Literal["autoregressive", "progressive"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to compile."""

    out: Path = Path("decode_tpu.jsonl")
    """File of finished programs; those in it are not compiled again."""
    topology: str = "v5e:2x2"
    """Slice of TPUs; one chip of it is used."""
    models: tuple[str, ...] = tuple(MODELS)
    """Sizes."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Images side by side."""
    stages: int = 16
    """Of the progressive sampler."""


def main(options: Options) -> None:
    """Compiles what is missing and prints all bounds."""
    mesh = Mesh(np.asarray(tpu_devices(options.topology)[:1]), ("all",))
    place = NamedSharding(mesh, PartitionSpec())
    done = read(options.out)
    for key in programs(options):
        if key in done:
            continue
        decoder, model, batch, depth = key
        start = time.monotonic()
        if decoder == "autoregressive":
            text = autoregressive_loop(with_depth(MODELS[model], depth), batch, place)
        else:
            config = progressive(MODELS[model], depth)
            text = progressive_loop(config, batch, options.stages, place)
        line = {"program": key, "seconds": time.monotonic() - start} | loop_bytes(text)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        done[key] = line
    for line in table(options, done):
        print(json.dumps(line))


def read(path: Path) -> dict[tuple, dict[str, Any]]:
    """The finished programs of a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    return {tuple(line["program"]): line for line in map(json.loads, lines)}


def programs(options: Options) -> Iterator[tuple[Decoder, str, int, int]]:
    """Decoder, model, batch and depth of every program."""
    for batch in options.batches:
        for model in options.models:
            for decoder in get_args(Decoder):
                for depth in depths(decoder, model, batch):
                    yield decoder, model, batch, depth


def depths(decoder: Decoder, model: str, batch: int) -> tuple[int, ...]:
    """The model's, or those of two shallow ones."""
    config = MODELS[model]
    small = config.depth <= 24 and batch * config.width <= 2**16  # or there is no room for caches
    return (config.depth,) if decoder == "autoregressive" and small else SHALLOW


def autoregressive_loop(config: PriorConfig, batch: int, place: NamedSharding) -> str:
    """The optimised program that samples a quarter of the rows of a grid."""
    sampler = autoregressive_sampler
    params = bfloat16_shapes(autoregressive_prior.init_params, config)
    text = jax.ShapeDtypeStruct((batch, config.text_length - 1), jnp.int32)
    caches = jax.eval_shape(
        partial(sampler._prefill, config, samples=1, guided=False), params, text
    )
    known = jax.ShapeDtypeStruct((batch, config.grid // sampler.CALLS, config.grid), jnp.int32)
    previous = jax.ShapeDtypeStruct((batch,), jnp.int32)
    number, integer = scalars()
    inputs = placed((params, keys(batch), caches, previous, known), place)
    lowered = sampler._sample_rows.lower(
        config,
        *inputs,
        **sampling(number),
        first=integer,
        prompt_length=integer,
    )
    return lowered.compile().as_text()


def progressive_loop(
    config: ProgressiveConfig, batch: int, stages: int, place: NamedSharding
) -> str:
    """The optimised program of two stages, each as large as stages are in the mean."""
    sampler = progressive_sampler
    params = bfloat16_shapes(progressive_prior.init_params, config)
    layers = jax.eval_shape(partial(sampler._unstack, config), params)
    text = jax.ShapeDtypeStruct((batch, config.text_length - 1), jnp.int32)
    start = jax.ShapeDtypeStruct((batch, config.image_length), jnp.int32)
    number, _ = scalars()
    begin = partial(sampler._begin, config, order="random", guided=False, num_known=0)
    state, _, cache = jax.eval_shape(
        begin, params, layers, text, keys(batch), start, choice_temperature=number
    )
    n, length = mean_stage(config, stages)
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:3], length), x.dtype), cache)
    plan = [jax.ShapeDtypeStruct((2,), dtype) for dtype in (*[jnp.int32] * 3, jnp.float32)]
    inputs = placed((params, layers, state, start, cache, plan), place)
    lowered = sampler._sample_span.lower(
        config, *inputs, **sampling(number), order="random", n=n, length=length
    )
    return lowered.compile().as_text()


def mean_stage(config: ProgressiveConfig, stages: int) -> tuple[int, int]:
    """Cells of a stage, and positions of its cache, as the sampler has them in the mean."""
    after = progressive_sampler.cells_filled(config.image_length, stages, "cosine")
    counts = np.diff(after, prepend=0)
    before = config.text_length + after - counts
    spans = [*np.array_split(np.arange(stages - 1), progressive_sampler.SPANS), [stages - 1]]
    cells = [counts[span].max() for span in spans]
    lengths = [before[span[-1]] + n for span, n in zip(spans, cells, strict=True)]
    weights = [len(span) for span in spans]
    return tuple(int(np.average(x, weights=weights).round()) for x in (cells, lengths))


def loop_bytes(text: str) -> dict[str, int]:
    """Bytes that one pass through the loop of a program reads and writes."""
    program, entry = hbm.read_program(text)
    (body,) = hbm.loop_bodies(program, entry)
    moved = hbm.traffic(program, body)
    return {"read": sum(x.read for x in moved), "written": sum(x.written for x in moved)}


def table(options: Options, done: dict[tuple, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Bytes and bounds of each model, batch and decoder, once all their programs are compiled."""
    for batch in options.batches:
        for model in options.models:
            seconds = {}
            for decoder in get_args(Decoder):
                lines = [
                    done.get((decoder, model, batch, x)) for x in depths(decoder, model, batch)
                ]
                if None not in lines:
                    line = bound(options, decoder, model, batch, lines)
                    seconds[decoder] = line["seconds an image"]
                    yield line
            if len(seconds) == 2:
                one, other = seconds.values()
                ratios = {chip: round(one[chip] / other[chip], 1) for chip in one}
                yield {"model": model, "batch": batch, "autoregressive / progressive": ratios}


def bound(options, decoder, model, batch, lines):
    """Bytes of a step at the model's depth, and the least time of an image by chip."""
    config, at = MODELS[model], depths(decoder, model, batch)
    share = (config.depth - at[0]) / (at[-1] - at[0]) if len(at) == 2 else 0
    read, written = (
        lines[0][name] + share * (lines[-1][name] - lines[0][name]) for name in ("read", "written")
    )
    if decoder == "autoregressive":
        least, flop = counting.decode_step(config, batch, captions=batch, kernel_bytes=2)
        passes = config.image_length
    else:
        sizes = progressive(config, config.depth)
        n, length = mean_stage(sizes, options.stages)
        least, flop = counting.stage(sizes, batch, cells=n, positions=length, kernel_bytes=2)
        passes = options.stages
    seconds = {}
    for chip, bandwidth in BANDWIDTHS.items():
        moved = read + written if chip.startswith("TPU") else least
        seconds[chip] = passes * max(moved / bandwidth, flop / CHIPS[chip].flops) / batch
    return {
        "decoder": decoder,
        "model": model,
        "batch": batch,
        "read GB": read / 1e9,
        "written GB": written / 1e9,
        "least GB": least / 1e9,
        "over least": (read + written) / least,
        "TFLOP": flop / 1e12,
        "seconds an image": seconds,
    }


def with_depth(config: PriorConfig, depth: int) -> PriorConfig:
    """The same with other layers."""
    return PriorConfig(**vars(config) | {"depth": depth})


def progressive(config: PriorConfig, depth: int) -> ProgressiveConfig:
    """Sizes of a progressive prior, half of whose layers are query layers."""
    sizes = {name: getattr(config, name) for name in vars(PriorSizes())}
    return ProgressiveConfig(**sizes | {"depth": depth, "query_depth": depth // 2})


def bfloat16_shapes(init_params, config):
    """Parameters as a model has them that is loaded in bfloat16."""

    def half(path, x):
        kernel = path[0].key == "layers" and path[-1].key == "kernel"
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if kernel else x.dtype)

    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(half, shapes)


def keys(batch):
    """One for each image."""
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))


def scalars():
    """A number and an integer."""
    return jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)


def sampling(number):
    """Plain sampling at some temperature."""
    return {"temperature": number, "top_k": None, "top_p": None, "guidance": None}


def placed(tree, place):
    """The same shapes on the chip."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
