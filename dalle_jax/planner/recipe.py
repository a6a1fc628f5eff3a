"""The settings of a run on someone's own images, chosen from their number and size.

Source: ours, from what docs/lab.md measured.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax

from dalle_jax.errors import UserError
from dalle_jax.generate.model import Model
from dalle_jax.models.clip import CLIPConfig
from dalle_jax.models.prior_config import PriorConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.train.clip_stage import ClipRun, short_clip_run
from dalle_jax.train.loop import LoopConfig
from dalle_jax.train.prior_stage import PriorRun, short_prior_run
from dalle_jax.train.progressive_stage import ProgressiveRun, progressive_run
from dalle_jax.train.vqgan_stage import VQGANRun

FEW = 200  # images, fewer than which a model learns by heart
ENOUGH_FOR_CLIP = 500
EPOCHS = {"vqgan": 8, "progressive": 17, "clip": 13}  # as the shipped models had
LEAST_STEPS = {"vqgan": 1500, "progressive": 1500, "clip": 300}
BATCH = 8
TEXT_LENGTHS = (24, 32, 48, 64, 96, 128)
# Of a prior that goes on: what it knows is worth keeping, so it moves less far and for less long.
# On 746 Tux Paint stamps held-out loss was lowest after 6 epochs, and rose from then on.
CONTINUED = {"learning_rate": 5e-4, "muon_learning_rate": 0.003, "learning_rate_end": 5e-5}
EPOCHS_CONTINUED, LEAST_CONTINUED = 6, 300

Run = VQGANRun | PriorRun | ClipRun

_with = dataclasses.replace


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The runs of all stages."""

    codec: VQGANRun | None
    """None where the codec of another model is kept."""
    prior: PriorRun
    clip: ClipRun | None
    """None for too few images, or if it is not wanted."""

    @property
    def prior_stage(self) -> str:
        """Name of the prior's stage."""
        return "progressive" if isinstance(self.prior, ProgressiveRun) else "prior"

    def stages(self) -> Iterator[tuple[str, Run]]:
        """The runs there are, by the names of their stages, in their order."""
        named = (("vqgan", self.codec), (self.prior_stage, self.prior), ("clip", self.clip))
        return ((name, run) for name, run in named if run is not None)

    def with_steps(self, steps: Mapping[str, int]) -> "Recipe":
        """The same with other numbers of steps, by the names of stages."""
        runs = {name: _with(run, loop=_loop(steps[name])) for name, run in self.stages()}
        return Recipe(codec=runs.get("vqgan"), prior=runs[self.prior_stage], clip=runs.get("clip"))


def choose_recipe(
    images: int,
    side: int,
    *,
    px: int | None = None,
    clip: bool = True,
    model: Model | None = None,
) -> Recipe:
    """Chooses sizes and steps.

    Args:
      images: to train on.
      side: length of the short side that most of them have, in pixels.
      px: side of the model's images; None to choose it.
      clip: whether to train a CLIP, if there are images enough.
      model: whose codec and tokenizer are kept and whose prior goes on; None to begin from nothing.
    Raises:
      UserError: if px is no size for the codec or differs from the model's, or the model has no
        prior that training knows.
    """
    if model is None:
        px = _chosen_px(images, side) if px is None else _checked_px(px)
        codec = _codec(images, px)
        prior = _prior(images, codec)
    else:
        if px not in (None, model.px):
            raise UserError(
                f"--px is {px}, but {model.name} makes images of {model.px} px, and its codec is "
                "kept; leave --px out, or --init-from"
            )
        codec, prior = None, _continued(images, model)
    wanted = clip and images >= ENOUGH_FOR_CLIP
    px = codec.px if codec else model.px
    return Recipe(codec=codec, prior=prior, clip=_clip(images, px, prior) if wanted else None)


def _chosen_px(images: int, side: int) -> int:
    wanted = 64 if images < 2_000 else 96 if images < 20_000 else 128
    return max(32, min(wanted, side // 32 * 32))


def _checked_px(px: int) -> int:
    if px < 32 or px % 8:
        raise UserError(f"--px is {px}, but has to be a multiple of 8 and at least 32")
    return px


def _codec(images: int, px: int) -> VQGANRun:
    """A VQ-GAN of f = 8, or 4 for images of less than 64 px."""
    model = VQGANConfig(
        patch=4,
        width=96,
        multipliers=(1, 2) if px >= 64 else (2,),
        blocks_per_group=1,
        attention=(),
        z_width=128,
        codes=512 if images < 1_000 else 1024,
        code_width=32,
    )
    loop = _loop(_steps("vqgan", images, BATCH))
    return VQGANRun(model=model, loop=loop, px=px, batch_size=_batch(BATCH), optimizer="muon")


def _prior(images: int, codec: VQGANRun) -> ProgressiveRun:
    width, heads, vocabulary = (
        (128, 4, 1024) if images < 3_000 else (192, 6, 2048) if images < 20_000 else (256, 8, 4096)
    )
    model = PriorConfig(
        width=width,
        depth=6,
        heads=heads,
        text_vocabulary=vocabulary,
        text_length=64,
        grid=codec.px // codec.model.factor,
        codes=codec.model.codes,
    )
    return progressive_run(_prior_run(model, _steps("progressive", images, BATCH)))


def _continued(images: int, model: Model) -> PriorRun:
    part = next((part for part in ("progressive", "prior") if part in model.priors), None)
    if part is None:
        has = ", ".join(model.priors) or "none"
        raise UserError(
            f"{model.name} has no prior that training can go on from (priors: {has}); choose a "
            "model with a progressive or an autoregressive one, or leave --init-from out"
        )
    steps = max(LEAST_CONTINUED, math.ceil(EPOCHS_CONTINUED * images / BATCH))
    sizes = model.priors[part][0]
    run = _prior_run(PriorConfig(), steps, **CONTINUED)
    return progressive_run(run, model=sizes) if part == "progressive" else _with(run, model=sizes)


def _prior_run(model: PriorConfig, steps: int, **changes) -> PriorRun:
    options = {"batch_size": _batch(BATCH), "warmup_steps": 100, "optimizer": "muon"}
    options["bpe_dropout"] = 0.0  # or captions may get longer than the text positions
    return short_prior_run(model=model, loop=_loop(steps), **(options | changes))


def _clip(images: int, px: int, prior: PriorRun) -> ClipRun:
    """16 patches: 1.6M parameters."""
    side = min(px, 64)
    image = {"px": side, "patch": side // 4, "image_width": 128, "image_depth": 4, "image_heads": 4}
    text = {"text_width": 128, "text_depth": 2, "text_heads": 4}
    text |= {
        "text_vocabulary": prior.model.text_vocabulary,
        "text_length": prior.model.text_length,
    }
    run = short_clip_run(
        model=CLIPConfig(**image, **text, features=128),
        reconstructions=False,
        optimizer="muon",
        loop=_loop(1),
    )
    run = _with(run, batch_size=_batch(run.batch_size))
    return _with(run, loop=_loop(_steps("clip", images, run.batch_size)))


def with_text_length(recipe: Recipe, tokens: int) -> Recipe:
    """The same with as many text positions as captions of so many tokens need."""
    length = next((n for n in TEXT_LENGTHS if n >= tokens + 2), TEXT_LENGTHS[-1])
    prior = _with(recipe.prior, model=_with(recipe.prior.model, text_length=length))
    clip = recipe.clip and _with(recipe.clip, model=_with(recipe.clip.model, text_length=length))
    return _with(recipe, prior=prior, clip=clip)


def _steps(stage: str, images: int, batch: int) -> int:
    return max(LEAST_STEPS[stage], math.ceil(EPOCHS[stage] * images / batch))


def _batch(images: int) -> int:
    """A batch that can be spread over all devices."""
    devices = jax.device_count()
    return math.ceil(images / devices) * devices


def _loop(steps: int) -> LoopConfig:
    """Six evaluations and sheets, ten checkpoints; an average over some 100 steps."""
    return LoopConfig(
        steps=steps,
        log_every=min(max(steps // 50, 1), 50),
        save_every=min(max(steps // 10, 1), 250),
        evaluate_every=math.ceil(steps / 6),
        sheet_every=math.ceil(steps / 6),
        max_to_keep=2,
        ema_every=5,
        ema_decay=0.95,
    )
