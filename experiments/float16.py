"""What gradient scales do: a small prior in float32, in float16, and in float16 without them.

And in bfloat16, with gradients of kernels summed in float32 or in bfloat16; and in float32 with
Adam's moments in the paper's 16 bits; and in float16 with these and the layers' kernels in 16 bits.

    python experiments/float16.py --out docs/float16.png

Each sees the same coloured shapes, as codes of the shipped VQ-GAN, in the same order. The loss is
divided by 975, so that the gradient of a token is as small as in the paper's batches of 1,024
images with 1,280 tokens each. Prints means of the loss over tenths of the run, by how much the
last is off that of float32, and how many updates were skipped; draws the first three curves (needs
matplotlib).
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from curves import compare

import dalle_jax
from dalle_jax.compilation_cache import enable_compilation_cache
from dalle_jax.data.batches import batches
from dalle_jax.data.shapes import ShapesSource
from dalle_jax.malloc import reuse_freed_memory
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.text.bpe import Tokenizer
from dalle_jax.train import state as state_lib
from dalle_jax.train.encode import EncodedBatches
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorStage, short_prior_run
from dalle_jax.train.train_step import make_train_step

BATCH, TEXT, IMAGE = 8, 24, 144
PAPER_BATCH, PAPER_TOKENS = 1024, 1280
DIVISOR = PAPER_BATCH * PAPER_TOKENS / (BATCH * (TEXT + IMAGE))
PAPER_FORMATS = {"precision": "float16", "kernels": "float16", "moments": "16-bit"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be chosen."""

    steps: int = 300
    """Updates of each run."""
    depth: int = 8
    """Layers."""
    out: Path = Path("float16.png")
    """Where the curves go."""


class OneOfMany(PriorStage):
    """A stage whose tokens are a few of those in a batch of the paper."""

    def loss(self, params, batch, key, step, *, scales=None):
        """The part of the loss, and the whole of it as a metric."""
        loss, metrics = super().loss(params, batch, key, step, scales=scales)
        return loss / DIVISOR, metrics | {"nats": loss}


def main(options: Options) -> None:
    """Trains them all and compares them."""
    reuse_freed_memory()
    enable_compilation_cache()
    tokens = dalle_jax.load("emoji")
    source = ShapesSource("train", px=tokens.px)
    captions = [caption for i in range(len(source)) for caption in source[i]["captions"]]
    tokenizer = Tokenizer.train(captions, vocabulary=320)
    text = {"px": tokens.px, "tokenizer": tokenizer, "text_length": TEXT}
    iterator = batches(source, batch_size=BATCH, seed=0, crop="center", **text)
    iterator = EncodedBatches(iterator, tokens)
    data = [next(iterator) for _ in range(options.steps)]
    curves = {}
    for name, scaled, changes in (
        ("float32", False, {}),
        ("float16, scaled", True, {"precision": "float16"}),
        ("float16, plain", False, {"precision": "float16"}),
        ("bfloat16", False, {"precision": "bfloat16"}),
        ("bfloat16 sums", False, {"precision": "bfloat16", "grad_dtype": "bfloat16"}),
        ("16-bit moments", False, {"moments": "16-bit"}),
        ("16 bits for all", True, PAPER_FORMATS),
    ):
        stage = stage_of(options, tokens, tokenizer, changes, scaled=scaled)
        curves[name], skipped = train(stage, data)
        tenths = [part.mean() for part in np.array_split(curves[name], 10)]
        away = tenths[-1] / np.mean(np.array_split(curves["float32"], 10)[-1]) - 1
        print(
            f"{name:<16}",
            *(f"{x:6.3f}" for x in tenths),
            f"{away:+8.2%}",
            f"{skipped} skipped",
            flush=True,
        )
    shown = {name: curves[name] for name in ("float32", "float16, scaled", "float16, plain")}
    compare(shown, options.out, dashed="float16, scaled")


def stage_of(options, tokens, tokenizer, changes, *, scaled):
    """The prior; the norm that gradients are clipped to is divided as they are."""
    model = PriorConfig(
        width=64,
        depth=options.depth,
        heads=4,
        text_vocabulary=tokenizer.vocabulary,
        text_length=TEXT,
        grid=tokens.grid,
        codes=tokens.codec.codes,
    )
    run = short_prior_run(
        model=model,
        loop=LoopConfig(steps=options.steps),
        batch_size=PAPER_BATCH,  # which the scales start from
        learning_rate=1e-3,
        warmup_steps=options.steps // 10,
        grad_clip_norm=1 / DIVISOR,
        **changes,
    )
    stage = OneOfMany(
        run, codec_model=tokens, tokenizer=tokenizer, validation=lambda: iter(()), captions=()
    )
    if not scaled:
        stage.scaling = None
    return stage


def train(stage, data):
    """The loss of every update, and how many updates were skipped."""
    state = jax.jit(lambda key: state_lib.init_state(stage, key))(jax.random.key(0))
    # On a CPU XLA leaves out conversions to float16 and back, unless told to be exact about them.
    exact = {"xla_allow_excess_precision": False}
    update = make_train_step(stage).lower(state, data[0]).compile(compiler_options=exact)
    curve, skipped = [], 0
    for batch in data:
        state, metrics = update(state, batch)
        curve.append(float(metrics["nats"]))
        skipped += int(metrics.get("skipped", 0))
    return np.array(curve), skipped


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
