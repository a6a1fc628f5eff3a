"""Every stage in seconds, on coloured shapes.

    python experiments/debug.py all --workdir runs/debug

Shows that the parts fit together; the images are no good.
"""

from dataclasses import dataclass

from dalle_jax.data.shapes import ShapesSource
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.train.clip_stage import ClipRun, short_clip_run
from dalle_jax.train.dvae_stage import DVAERun, short_dvae_run
from dalle_jax.train.experiment import main
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun, short_prior_run
from dalle_jax.train.trainers import Data
from dalle_jax.train.vqgan_stage import VQGANRun


@dataclass(frozen=True, kw_only=True)
class ShapesOptions:
    """Coloured shapes."""

    def open(self, px: int) -> Data:
        """Makes the two splits."""
        return Data(
            train=ShapesSource("train", px=px),
            validation=ShapesSource("validation", px=px),
            captions=("a large red circle", "a small blue square"),
            attribution="Coloured shapes drawn by dalle_jax.",
            license="Apache-2.0",
        )


def dvae() -> DVAERun:
    """4 x 4 codes of 32."""
    return short_dvae_run(
        model=DVAEConfig(width=8, groups=3, blocks_per_group=1, codes=32, residual_gain=0.3),
        loop=_loop(steps=20),
        px=16,
        batch_size=8,
        warmup_steps=5,
    )


def vqgan() -> VQGANRun:
    """4 x 4 codes of 32."""
    sizes = {"patch": 4, "width": 8, "multipliers": (1,), "blocks_per_group": 1, "attention": ()}
    return VQGANRun(
        model=VQGANConfig(**sizes, z_width=16, codes=32, code_width=8),
        loop=_loop(steps=20),
        px=16,
        batch_size=8,
        warmup_steps=5,
    )


def prior() -> PriorRun:
    """24 text positions and 16 codes."""
    sizes = {"width": 32, "depth": 2, "heads": 2, "text_vocabulary": 320, "text_length": 24}
    return short_prior_run(
        model=PriorConfig(**sizes, grid=4, codes=32, kernel=3),
        loop=_loop(steps=20),
        batch_size=8,
        warmup_steps=5,
    )


def clip() -> ClipRun:
    """4 patches and 22 caption slots."""
    image = {"px": 16, "patch": 8, "image_width": 16, "image_depth": 2, "image_heads": 2}
    text = {"text_width": 16, "text_depth": 2, "text_heads": 2, "text_length": 24}
    return short_clip_run(
        model=CLIPConfig(**image, **text, text_vocabulary=320, features=16),
        loop=_loop(steps=20),
        batch_size=16,
        warmup_steps=5,
        shift=1,
    )


def _loop(steps: int) -> LoopConfig:
    return LoopConfig(
        steps=steps,
        log_every=5,
        save_every=10,
        evaluate_every=10,
        sheet_every=10,
        ema_decay=0.5,
    )


if __name__ == "__main__":
    main("debug", data=ShapesOptions, dvae=dvae(), vqgan=vqgan(), prior=prior(), clip=clip())
