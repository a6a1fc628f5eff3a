"""`dalle-jax train`: from a folder of captioned images to a model of one's own."""

from pathlib import Path

from tyro.conf import Positional

from dalle_jax.commands.process import prepare_process
from dalle_jax.data.record_filters import Filters
from dalle_jax.extras import require


def train(
    images: Positional[Path],
    *,
    workdir: Path,
    init_from: str | None = None,
    px: int | None = None,
    minutes: float | None = None,
    clip: bool = True,
    pad: bool = False,
    filters: Filters = Filters(),
    plan_only: bool = False,
) -> None:
    """Train a model on your own images with captions, or go on with a run.

    Chooses sizes from the number and the size of the images, times a few updates, says what the
    run will do and take, and trains: an image codec, a prior, and a CLIP that ranks images. Ctrl-C
    saves; the same command goes on.

    Args:
      images: Folder with x.jpg beside x.txt (a caption a line), or with captions.jsonl or .csv; or
        one version of a set that TensorFlow Datasets prepared.
      workdir: Folder of the run: checkpoints, metrics, sheets and the trained model.
      init_from: A shipped model by name, or a model folder, whose codec and tokenizer are kept and
        whose prior goes on training; None to begin from nothing.
      px: Side of the model's images in pixels; None to choose it.
      minutes: Time that the run may take at most, about; None for as many updates as shipped
        models had.
      clip: Train a CLIP too, if there are 500 images or more.
      pad: Lay images that are not square on white squares, in place of cutting out their middle.
      filters: Images and captions of a folder to leave out.
      plan_only: Say what the run would do, and end.
    """
    prepare_process()
    require("train")
    from dalle_jax.generate.model import Model
    from dalle_jax.planner.own_run import make_plan, overfit, run_plan
    from dalle_jax.planner.plan_text import describe
    from dalle_jax.train.data_options import FolderOptions

    options = FolderOptions(data=images, filters=filters, pad=pad)
    model = None if init_from is None else Model.load(init_from)
    plan = make_plan(options, workdir=workdir, model=model, px=px, clip=clip, minutes=minutes)
    print(describe(plan, model), flush=True)
    if plan_only:
        return
    run_plan(plan, options, workdir=workdir, codec=init_from or "vqgan", model=model)
    if said := overfit(workdir / plan.recipe.prior_stage / "metrics.jsonl"):
        print(said)
    print(
        f"The model is in {workdir / 'model'}, samples are in {workdir / 'sheet.png'}.\n"
        f'Next: dalle-jax generate "{options.open(0).captions[0]}" --model {workdir / "model"}'
    )
