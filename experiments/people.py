"""Twemoji's people at 64 px, drawn in 64 codes: a small world that small priors learn well.

    python experiments/people.py vqgan --workdir runs/people
    python experiments/people.py prior --workdir runs/people --codec vqgan
    python experiments/people.py progressive --workdir runs/people --codec vqgan --steps 4000

Needs `pip install dalle_jax[emoji]`; the images are drawn on this machine. Every caption has one
true image, so it shows whether a drawing is right, and what no image in training combines:
the held-out ones are a role, a gender and a skin tone that training knows only apart. What each
stage costs and reaches stands in docs/progressive.md and docs/vqgan.md.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dalle_jax.data.emoji import TWEMOJI, PeopleSource
from dalle_jax.generate.model_folder import default_captions
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

CODES = 1024

LICENSE = (
    "Creative Commons Attribution 4.0 International (CC BY 4.0), "
    "https://creativecommons.org/licenses/by/4.0/legalcode, as the images they were learned from"
)


@dataclass(frozen=True, kw_only=True)
class PeopleOptions:
    """Twemoji's people and hands of one skin tone."""

    data_dir: Path | None = None
    """Where the drawn emoji are kept; None for a folder in the user's cache."""

    def open(self, px: int) -> Data:
        """Draws the emoji, if this has not been done yet, and opens their splits."""
        split = partial(PeopleSource, px=px, data_dir=self.data_dir)
        return Data(
            train=split("train"),
            validation=split("heldout_cell"),
            captions=default_captions("people")[:6],
            attribution=TWEMOJI,
            license=LICENSE,
        )


def dvae() -> DVAERun:
    """8 x 8 codes: f = 8."""
    return short_dvae_run(
        model=DVAEConfig(
            width=32, groups=4, blocks_per_group=1, codes=CODES, code_width=128, residual_gain=0.3
        ),
        loop=_loop(steps=3_000),
        px=64,
        batch_size=4,
    )


def vqgan() -> VQGANRun:
    """8 x 8 codes: f = 8."""
    sizes = {"width": 32, "multipliers": (1, 2, 2, 4), "blocks_per_group": 1, "attention": ()}
    return VQGANRun(
        model=VQGANConfig(**sizes, z_width=64, codes=CODES, code_width=32),
        loop=_loop(steps=3_000),
        px=64,
        batch_size=4,
    )


def _loop(steps: int) -> LoopConfig:
    return LoopConfig(
        steps=steps, log_every=100, save_every=500, evaluate_every=500, sheet_every=1000
    )


def prior() -> PriorRun:
    """24 text positions and 64 codes: 1.6M parameters."""
    sizes = {"width": 128, "depth": 6, "heads": 4, "text_vocabulary": 512, "text_length": 24}
    return short_prior_run(
        model=PriorConfig(**sizes, grid=8, codes=CODES),
        loop=LoopConfig(
            steps=5_500, save_every=500, evaluate_every=500, sheet_every=None,
            ema_every=5, ema_decay=0.98,
        ),
        batch_size=8,
        warmup_steps=100,
        bpe_dropout=0.0,
    )  # fmt: skip


def clip() -> ClipRun:
    """16 patches of 16 px and 22 caption slots."""
    image = {"px": 64, "patch": 16, "image_width": 128, "image_depth": 4, "image_heads": 4}
    text = {"text_width": 128, "text_depth": 2, "text_heads": 4, "text_length": 24}
    return short_clip_run(
        model=CLIPConfig(**image, **text, text_vocabulary=512, features=128),
        loop=LoopConfig(
            steps=800, save_every=100, evaluate_every=100, sheet_every=None, ema_decay=0.99
        ),
    )


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # or emoji.py there would hide the package `emoji`
    main("people", data=PeopleOptions, dvae=dvae(), vqgan=vqgan(), prior=prior(), clip=clip())
