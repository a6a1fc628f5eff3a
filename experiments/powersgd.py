r"""What compressed gradients cost: a small prior trained by four groups, with PowerSGD and without.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python experiments/powersgd.py \
        --ranks 4 6 --out docs/powersgd.png

Both see the same images, as codes of the shipped VQ-GAN, in the same order: coloured shapes, or
emoji with `--data emoji` (needs `pip install dalle_jax[emoji]`). Prints what a group sends in an
update, means of the loss over tenths of the run, and by how much the last of them is off; draws
both curves (needs matplotlib).
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from curves import compare

import dalle_jax
from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.data.batches import batches
from dalle_jax.data.emoji import emoji_source
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.generate.model import Model
from dalle_jax.malloc import reuse_freed_memory
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from dalle_jax.parallel.powersgd import PowerSGDConfig, sent_bytes
from dalle_jax.parallel.powersgd_groups import PowerSGDGroups
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train import state as state_lib
from dalle_jax.train.encode import EncodedBatches
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorStage, short_prior_run
from dalle_jax.train.train_step import make_train_step

PX = 64
SOURCES = {"shapes": ShapesSource, "emoji": emoji_source}
TEXT = {"shapes": (320, 24), "emoji": (1024, 32)}  # vocabulary and positions


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen."""

    data: Literal["shapes", "emoji"] = "shapes"
    """Images, of 64 px."""
    steps: int = 300
    """Updates of each run."""
    ranks: tuple[int, ...] = (4,)
    """Ranks to compress to, one run each."""
    warm_start: tuple[bool, ...] = (False, True)
    """Whether Q is that of the update before, see `PowerSGDConfig`; one run each."""
    batch_size: int = 16
    """Images in an update, over all groups."""
    width: int = 64
    """Width of the prior."""
    depth: int = 4
    """Layers."""
    learning_rate: float = 1e-3
    """Greatest learning rate."""
    out: Path = Path("powersgd.png")
    """Where the curves go."""


def main(options: Options) -> None:
    """Trains without compression and with each rank, and compares."""
    reuse_freed_memory()
    enable_compilation_cache()
    shipped = dalle_jax.load("emoji")
    tokens = Model(name="shapes", px=PX, codec=shipped.codec, codec_params=shipped.codec_params)
    source = SOURCES[options.data]("train", px=PX)
    vocabulary, length = TEXT[options.data]
    captions = [caption for i in range(len(source)) for caption in source[i]["captions"]]
    tokenizer = Tokenizer.train(captions, vocabulary=vocabulary)
    text = {"px": PX, "tokenizer": tokenizer, "text_length": length}
    iterator = batches(source, batch_size=options.batch_size, seed=0, crop="center", **text)
    iterator = EncodedBatches(iterator, tokens)
    data = [next(iterator) for _ in range(options.steps)]
    curves = {}
    pairs = itertools.product(options.ranks, options.warm_start)
    for rank, warm_start in ((None, False), *pairs):
        name = "whole gradients"
        if rank is not None:
            name = f"rank {rank}, {'warm' if warm_start else 'fixed'} Q"
        curves[name] = train(stage_of(options, tokens, tokenizer), data, rank, warm_start)
        tenths = [part.mean() for part in np.array_split(curves[name], 10)]
        away = tenths[-1] / np.mean(np.array_split(curves["whole gradients"], 10)[-1]) - 1
        print(f"{name:<18}", *(f"{x:6.3f}" for x in tenths), f"{away:+8.2%}", flush=True)
    compare(curves, options.out)


def stage_of(options, tokens, tokenizer):
    """The prior."""
    model = PriorConfig(
        width=options.width,
        depth=options.depth,
        heads=4,
        text_vocabulary=tokenizer.vocabulary,
        text_length=TEXT[options.data][1],
        grid=tokens.grid,
        codes=tokens.codec.codes,
    )
    run = short_prior_run(
        model=model,
        loop=LoopConfig(steps=options.steps),
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
        grad_clip_norm=1.0,
    )
    return PriorStage(
        run, codec_model=tokens, tokenizer=tokenizer, validation=lambda: iter(()), captions=()
    )


def train(stage, data, rank, warm_start):
    """The loss of every update."""
    mesh = make_mesh(MeshConfig())
    config = PowerSGDConfig(rank=rank, warm_start=warm_start)
    groups = None if rank is None else PowerSGDGroups(config, mesh)

    def create(key):
        return state_lib.init_state(stage, key, groups)

    key = jax.random.key(0)
    shapes = jax.eval_shape(create, key)
    if groups:
        say_bytes(shapes.params, config, groups.count)
    shardings = state_lib.state_shardings(shapes, mesh, stage.rules, groups)
    state = jax.jit(create, out_shardings=shardings)(key)
    update = make_train_step(stage, shardings=shardings, groups=groups)
    curve = []
    for batch in data:
        state, metrics = update(state, place_batch(mesh, batch))
        curve.append(float(metrics["loss"]))
    return np.array(curve)


def say_bytes(params, config, groups):
    """What one of the groups sends in an update, in float32 with and without compression."""
    sent = sent_bytes(params, config=config, bytes_per_number=4)
    kernels, rest = sent["plain"] - sent["uncompressed"], sent["uncompressed"]
    factors = sent["p"] + sent["q"]
    print(
        f"{groups} groups, rank {config.rank}: kernels {kernels / 1e3:.0f} kB -> "
        f"{factors / 1e3:.0f} kB ({1 - factors / kernels:.1%} less), the rest {rest / 1e3:.0f} kB; "
        f"in all {1 - (factors + rest) / sent['plain']:.1%} less",
        flush=True,
    )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    sys.path.remove(str(Path(__file__).parent))  # or emoji.py there would hide the package `emoji`
    main(chosen)
