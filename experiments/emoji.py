"""Emoji of two designers at 96 px, for one CPU or one GPU.

    python experiments/emoji.py vqgan --workdir runs/emoji
    python experiments/emoji.py progressive --workdir runs/emoji --codec vqgan
    python experiments/emoji.py clip --workdir runs/emoji --codec vqgan
    python experiments/emoji.py prior --workdir runs/emoji --codec vqgan

`--preset gpu` takes the sizes of the released model and larger batches: minutes
on one H100 or H200. Needs `pip install dalle_jax[emoji]`; the images are drawn on this machine.
What each stage costs and reaches stands in docs/emoji.md.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dalle_jax.data.emoji import ATTRIBUTION, emoji_source
from dalle_jax.data.paraphrase import Paraphrased
from dalle_jax.data.sources import ConcatSource, DataSource, Subset
from dalle_jax.errors import UserError
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

LICENSE = (
    "Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0), "
    "https://creativecommons.org/licenses/by-sa/4.0/legalcode, since they were learned from "
    "images under those terms"
)


@dataclass(frozen=True, kw_only=True)
class EmojiOptions:
    """OpenMoji and Twemoji."""

    data_dir: Path | None = None
    """Where the drawn emoji are kept; None for a folder in the user's cache."""
    splits: tuple[str, ...] = ("train",)
    """Splits to train on. A judge of other models may know more of them: its workdir, or its
    folder, has to be another."""
    toned: float = 1.0
    """Share of the training images with skin tones to train on. They are half of all, of few people
    and hands, and learned long before things are."""

    def __post_init__(self):
        if not 0 <= self.toned <= 1:
            raise UserError(f"toned is {self.toned}, but is a share and must lie in [0, 1]")

    def open(self, px: int) -> Data:
        """Draws the emoji, if this has not been done yet, and opens their splits."""
        split = partial(emoji_source, px=px, data_dir=self.data_dir)
        return Data(
            train=Paraphrased(_some(ConcatSource(*map(split, self.splits)), self.toned)),
            validation=split("validation"),
            captions=default_captions("emoji")[:6],
            attribution=ATTRIBUTION,
            license=LICENSE,
        )


def _some(source: DataSource, toned: float) -> DataSource:
    """The images without a skin tone, and a share of the others."""
    rng = np.random.default_rng(0)

    def is_kept(record):
        return "skin tone" not in record["captions"][0] or rng.random() < toned

    if toned >= 1:
        return source
    return Subset(source, [i for i in range(len(source)) if is_kept(source[i])])


def dvae() -> DVAERun:
    """16 x 16 codes of 512: f = 4."""
    return short_dvae_run(
        model=DVAEConfig(
            width=64, groups=3, blocks_per_group=1, codes=512, code_width=128, residual_gain=0.3
        ),
        loop=LoopConfig(
            steps=12_000, log_every=100, save_every=1000, evaluate_every=2000, sheet_every=3000
        ),
        px=64,
        crop_px=32,
        batch_size=8,
    )


def vqgan(preset: str) -> VQGANRun:
    """12 x 12 codes of 1,024: f = 8, 6.4M parameters (cpu) or 7.0M at higher resolution (gpu)."""
    sizes = {
        "cpu": {"patch": 4, "width": 96, "multipliers": (1, 2)},
        "gpu": {"patch": 2, "width": 96, "multipliers": (1, 1, 2)},
    }[preset]
    common = {"blocks_per_group": 1, "attention": (), "z_width": 128, "code_width": 32}
    return VQGANRun(
        model=VQGANConfig(**sizes, **common, codes=1024),
        loop=LoopConfig(
            steps=3_000, log_every=100, save_every=250, evaluate_every=500, sheet_every=1000
        ),
        px=96,
        batch_size={"cpu": 8, "gpu": 32}[preset],
        optimizer="muon",
    )


def prior(preset: str) -> PriorRun:
    """48 text positions, 144 codes: 3.5M parameters (cpu) or 7.4M (gpu) if progressive."""
    sizes = {
        "cpu": {"width": 192, "depth": 6, "heads": 6},
        "gpu": {"width": 256, "depth": 8, "heads": 8},
    }[preset]
    return short_prior_run(
        model=PriorConfig(**sizes, text_vocabulary=2048, text_length=48, grid=12, codes=1024),
        loop=LoopConfig(
            steps={"cpu": 9_000, "gpu": 7_000}[preset],
            save_every=250,
            evaluate_every=1500,
            ema_every=5,
            ema_decay=0.98,
        ),
        batch_size={"cpu": 8, "gpu": 32}[preset],
        warmup_steps=100,
        optimizer="muon",
    )


def clip() -> ClipRun:
    """36 patches of 16 px and 46 caption slots: 1.6M parameters, for either preset."""
    image = {"px": 96, "patch": 16, "image_width": 128, "image_depth": 4, "image_heads": 4}
    text = {"text_width": 128, "text_depth": 2, "text_heads": 4, "text_length": 48}
    return short_clip_run(
        model=CLIPConfig(**image, **text, text_vocabulary=2048, features=128),
        loop=LoopConfig(
            steps=2_100, save_every=100, evaluate_every=700, sheet_every=None, ema_decay=0.99
        ),
        optimizer="muon",
    )


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # or this file would hide the package `emoji`
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu")
    chosen, args = parser.parse_known_args()
    stages = {"vqgan": vqgan(chosen.preset), "prior": prior(chosen.preset), "clip": clip()}
    main("emoji", data=EmojiOptions, dvae=dvae(), **stages, args=args)
