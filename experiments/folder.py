"""Your own images with captions: one stage at a time, with every setting, on any number of devices.

    python experiments/folder.py prior --data my_images/ --workdir runs/mine --mesh.fsdp 8

`dalle-jax train my_images/ --workdir runs/mine` needs no settings: it chooses them by the images.
Here they are the paper's kind of model, a dVAE and an autoregressive prior, sized for one CPU and
some thousands of images, unless options say otherwise.
"""

from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.train.clip_stage import ClipRun, short_clip_run
from dalle_jax.train.data_options import FolderOptions
from dalle_jax.train.dvae_stage import DVAERun, short_dvae_run
from dalle_jax.train.experiment import main
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun, short_prior_run
from dalle_jax.train.vqgan_stage import VQGANRun


def dvae() -> DVAERun:
    """16 x 16 codes of 512 for images of 64 px."""
    return short_dvae_run(
        model=DVAEConfig(
            width=32, groups=3, blocks_per_group=2, codes=512, code_width=64, residual_gain=0.3
        ),
        loop=LoopConfig(steps=10_000, log_every=100, save_every=1000),
        px=64,
        batch_size=8,
    )


def vqgan() -> VQGANRun:
    """16 x 16 codes of 512 for images of 64 px."""
    sizes = {"width": 32, "multipliers": (1, 2, 2), "blocks_per_group": 1, "attention": ()}
    return VQGANRun(
        model=VQGANConfig(**sizes, z_width=64, codes=512, code_width=64),
        loop=LoopConfig(steps=10_000, log_every=100, save_every=1000),
        px=64,
        batch_size=8,
    )


def prior() -> PriorRun:
    """64 text positions and 256 codes."""
    sizes = {"width": 256, "depth": 8, "heads": 8, "text_vocabulary": 4096, "text_length": 64}
    return short_prior_run(
        model=PriorConfig(**sizes, grid=16, codes=512),
        loop=LoopConfig(steps=10_000, ema_every=5, ema_decay=0.99),
        batch_size=16,
    )


def clip() -> ClipRun:
    """64 patches of 8 px and 62 caption slots."""
    image = {"px": 64, "patch": 8, "image_width": 192, "image_depth": 6, "image_heads": 6}
    text = {"text_width": 192, "text_depth": 4, "text_heads": 6, "text_length": 64}
    return short_clip_run(
        model=CLIPConfig(**image, **text, text_vocabulary=4096, features=192),
        loop=LoopConfig(steps=5_000, sheet_every=None),
    )


if __name__ == "__main__":
    main("folder", data=FolderOptions, dvae=dvae(), vqgan=vqgan(), prior=prior(), clip=clip())
