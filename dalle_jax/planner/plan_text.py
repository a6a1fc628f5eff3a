"""A plan in words, to be read before the first update.

Source: ours; what to expect is from docs/lab.md and docs/progressive.md.
"""

from dalle_jax.generate.model import Model
from dalle_jax.planner.own_run import OBLONG, RECONSTRUCTIONS, Plan
from dalle_jax.planner.recipe import ENOUGH_FOR_CLIP, EPOCHS, FEW, Run
from dalle_jax.train.vqgan_stage import VQGANRun

TITLES = {
    "vqgan": "image codec",
    "progressive": "prior",
    "prior": "prior",
    "clip": "CLIP",
}


def describe(plan: Plan, model: Model | None = None) -> str:
    """What a run will do, take, and what to expect of it.

    Args:
      plan: of the run.
      model: that goes on training; None for none.
    """
    recipe = plan.recipe
    lines = [
        f"Images: {plan.images:,} to train on and {plan.held_out:,} held out, "
        f"seen as squares of about {plan.side} px before they are reduced.",
    ]
    if model is not None:
        lines.append(
            f"Goes on from {model.name}: its codec ({model.px} px in {model.grid} x {model.grid} "
            f"codes of {model.codec.codes:,}) and tokenizer are kept, its prior is trained."
        )
    if plan.psnr is not None:
        lines.append(
            f"Its codec reconstructs held-out images at {plan.psnr:.1f} dB ({RECONSTRUCTIONS} in "
            "the workdir): no sample will be sharper than that."
        )
    if plan.oblong >= 0.05:
        lines.append(
            f"Shapes: {plan.oblong:.0%} are more than {OBLONG} times as long as wide, or wide as "
            "long, and training sees their middle square. --pad lays them on white squares, "
            "--filters.max-aspect leaves them out."
        )
    for name, run in recipe.stages():
        stage = plan.stages[name]
        lines.append(
            f"  {TITLES[name]:<12} {_sizes(run, plan)}; {stage.parameters / 1e6:.1f}M parameters; "
            f"{run.loop.steps:,} updates of {run.batch_size} images, each image "
            f"{_times(run.loop.steps * run.batch_size / plan.images)}; "
            f"about {duration(plan.seconds[name])}"
        )
    lines += [
        f"Time: about {duration(sum(plan.seconds.values()))}, from a few updates of each on this "
        "machine as busy as it is now. Ctrl-C saves; the same command goes on.",
        f"Memory: {plan.memory / 2**30:.1f} GiB in those updates. Disk: up to "
        f"{plan.disk / 2**30:.1f} GiB.",
    ]
    if plan.cut >= 0.01:
        lines.append(
            f"Captions: {plan.cut:.0%} have more than the {recipe.prior.model.text_length - 1} "
            "tokens that the prior reads, and are cut."
        )
    if recipe.clip is None and plan.images < ENOUGH_FOR_CLIP:
        lines.append(
            f"No CLIP, which ranks images by how well they fit, with fewer than {ENOUGH_FOR_CLIP} "
            "images."
        )
    lines.append(f"Expect: {_expectation(plan, model)}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Roughly, in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


def _sizes(run: Run, plan: Plan) -> str:
    if isinstance(run, VQGANRun):
        grid = run.px // run.model.factor
        return f"VQ-GAN, {run.px} px in {grid} x {grid} codes of {run.model.codes:,}"
    if run is plan.recipe.clip:
        return f"images of {run.model.px} px"
    kind = "progressive" if plan.recipe.prior_stage == "progressive" else "autoregressive"
    return f"{kind}, width {run.model.width}, {run.model.depth} layers"


def _epochs(plan: Plan) -> float:
    """How often the prior sees each image."""
    return plan.recipe.prior.loop.steps * plan.recipe.prior.batch_size / plan.images


def _times(epochs: float) -> str:
    return f"{epochs:.1f} times" if epochs < 3 else f"{epochs:,.0f} times"


def _expectation(plan: Plan, model: Model | None) -> str:
    images, epochs = plan.images, _epochs(plan)
    if images < FEW and model is None:
        return (
            f"fewer than {FEW} images are learned by heart, and new captions give mixtures of "
            "them. Better: --init-from with a shipped or imported model keeps its codec and "
            "tokenizer, and what its prior knows."
        )
    if model is not None:
        return (
            "colours and shapes of your images as its codec draws them. Captions are followed "
            "where its own were of the same kind; if not, it takes an image codec of your own, a "
            f"run without --init-from, and many more images than {FEW}."
        )
    if epochs < EPOCHS["progressive"] / 2:
        return (
            f"colours and blurred shapes: the prior sees each image {_times(epochs)}, where that "
            f"of `people` saw its images {EPOCHS['progressive']} times. Give it more --minutes."
        )
    if images < 3_000:
        return (
            "the look of your images. How far captions are followed depends on how much alike the "
            "images are: of 1,409 by one designer, all of people, such a run drew 99 % of seen and "
            "81 % of new captions right; of as many that share nothing it will draw few."
        )
    return (
        "the look of your images; the thing that a caption names only if there are many of it. Of "
        "6,750 emoji of all kinds a prior that had seen each six times drew 6 % of seen captions "
        "right; more updates help as long as the held-out loss falls."
    )
