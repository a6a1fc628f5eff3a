"""`dalle-jax generate` and `dalle-jax edit`: captions to images, and images to images."""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dalle_jax.commands.process import prepare_process
from dalle_jax.errors import UserError
from dalle_jax.generate.sampling import SamplingConfig
from dalle_jax.option_checks import (
    check_input,
    check_output,
    check_output_folder,
    check_seed,
    save_outputs,
)
from dalle_jax.terminal import bar

# jax takes a second to import, so it waits until the options are checked.


def generate(
    captions: Positional[tuple[str, ...]] = (),
    *,
    model: str = "emoji",
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_images: Annotated[int, arg(aliases=("-n",))] = 4,
    seed: int = 0,
    sampling: Annotated[SamplingConfig, arg(name="")] = SamplingConfig(),
    image_prompt: Path | None = None,
    keep_rows: int = 0,
    keep: int | None = None,
    clip: Path | None = None,
    trace: Path | None = None,
    out: Path = Path("sheet.png"),
    image_folder: Path | None = None,
) -> None:
    """Generate images for captions, on one sheet.

    Args:
      captions: What to generate, a row of images each; none for the first twelve of a list that
        comes with each shipped model (that of emoji for other models).
      model: A shipped model by name, or the path of a model folder.
      dtype: Type of the prior's kernels in memory; bfloat16 halves them.
      num_images: Images per caption to generate.
      seed: Number from 0 to 4294967295; the same one gives the same images.
      sampling: How codes are sampled.
      image_prompt: Image file whose top is kept, as many rows of codes as --keep-rows says.
      keep_rows: Rows of codes to keep of --image-prompt, at least 1 and less than the grid has.
      keep: Images per caption to keep, those with the best CLIP score, best first; None for all.
      clip: Folder of the CLIP that ranks them; None for the model's own.
      trace: GIF file that shows the sheet being filled, pass by pass or row by row.
      out: PNG file for the sheet.
      image_folder: Folder for each image as a PNG of its own; None for the sheet alone.
    """
    check_output("--out", out, ".png")
    check_output("--trace", trace, ".gif")
    check_output_folder("--image-folder", image_folder)
    if trace is not None and keep is not None:
        raise UserError("--trace shows all images; it cannot go with --keep")
    if clip is not None and keep is None:
        raise UserError("--clip names the CLIP that ranks images; give --keep too")
    check_input("--image-prompt", image_prompt)
    check_seed(seed)
    prepare_process()
    import dalle_jax
    from dalle_jax.generate.model_folder import default_captions, shipped_models
    from dalle_jax.image.sheet import check_gif, contact_sheet, save_gif, save_png

    if not captions:
        captions = default_captions(model if model in shipped_models() else "emoji")
    start = time.monotonic()
    loaded = dalle_jax.load(model, dtype=dtype)
    if trace is not None:
        check_gif(num_images, loaded.px, captions)
    ranker = None if clip is None else dalle_jax.Clip.load(clip)
    request: dict[str, Any] = {
        "n": num_images,
        "seed": seed,
        "sampling": sampling,
        "image_prompt": image_prompt,
        "keep_rows": keep_rows,
    }
    scores: Iterable[Iterable[float]] = []
    frames = None
    with bar("Generating") as progress:
        if keep is not None:
            images, scores = loaded.rank(
                captions, keep=keep, clip=ranker, progress=progress, **request
            )
        elif trace is not None:
            frames = loaded.trace(captions, progress=progress, **request)
            images = frames[-1]
        else:
            images = loaded.generate(captions, progress=progress, **request)

    def save_trace(path):
        save_gif(path, [contact_sheet(frame, captions) for frame in frames])

    save_outputs(
        [
            *_each_image(image_folder, captions, images),
            (out, lambda path: save_png(path, contact_sheet(images, captions))),
            *([] if trace is None else [(trace, save_trace)]),
        ]
    )
    for caption, row in zip(captions, scores, strict=False):  # no scores unless ranked
        print(f"{caption}: {' '.join(f'{score:.3f}' for score in row)}")
    took = time.monotonic() - start
    best = "" if keep is None else f", the best {keep} of each caption kept,"
    count = f"{images.shape[0] * num_images} images of {loaded.px} px"
    print(f"{count}{best} in {took:.0f} s: {out.resolve()}")


def edit(
    image: Positional[Path],
    captions: Positional[tuple[str, ...]],
    *,
    mask: Path | None = None,
    strength: float | None = None,
    model: str = "emoji",
    dtype: Literal["float32", "bfloat16"] = "float32",
    num_images: Annotated[int, arg(aliases=("-n",))] = 4,
    seed: int = 0,
    sampling: Annotated[SamplingConfig, arg(name="")] = SamplingConfig(),
    out: Path = Path("edit.png"),
    image_folder: Path | None = None,
) -> None:
    """Generate a part of an image again, or vary it; needs a model with a progressive prior.

    Args:
      image: Image file; the model sees its middle square.
      captions: What the whole image shows afterwards, a row of images each.
      mask: Image file of the same size, white where the image is generated again, and black or
        transparent elsewhere.
      strength: Instead of a mask: share of the cells to generate again, at random, above 0 and up
        to 1.
      model: A shipped model by name, or the path of a model folder.
      dtype: Type of the prior's kernels in memory; bfloat16 halves them.
      num_images: Images per caption to generate.
      seed: Number from 0 to 4294967295; the same one gives the same images.
      sampling: How codes are sampled, by the progressive decoder.
      out: PNG file for the sheet: the image before, then the new ones.
      image_folder: Folder for each new image as a PNG of its own; None for the sheet alone.
    """
    check_output("--out", out, ".png")
    check_output_folder("--image-folder", image_folder)
    check_input("the image", image)
    check_input("--mask", mask)
    check_seed(seed)
    prepare_process()
    import numpy as np

    import dalle_jax
    from dalle_jax.image.pixels import decode, square
    from dalle_jax.image.sheet import contact_sheet, save_png

    start = time.monotonic()
    loaded = dalle_jax.load(model, dtype=dtype)
    old = decode(image)
    with bar("Generating") as progress:
        images = loaded.edit(
            old,
            captions,
            mask=mask,
            strength=strength,
            n=num_images,
            seed=seed,
            sampling=sampling,
            progress=progress,
        )
    before = np.stack([square(old, loaded.px)[None]] * len(captions))
    sheet = np.concatenate([before, images], axis=1)
    save_outputs(
        [
            *_each_image(image_folder, captions, images),
            (out, lambda path: save_png(path, contact_sheet(sheet, captions))),
        ]
    )
    took = time.monotonic() - start
    print(f"{len(captions) * num_images} images in {took:.0f} s: {out.resolve()}")


def _each_image(folder, captions, images):
    """What to save in a folder of single images, which may be None."""
    from dalle_jax.image.sheet import save_png

    def save(folder):
        for row, caption in enumerate(captions):
            slug = re.sub("[^a-z0-9]+", "-", caption.lower()).strip("-")[:40]
            for number, image in enumerate(images[row]):
                save_png(folder / f"{row:03d}-{slug}-{number:03d}.png", image)

    return [] if folder is None else [(folder, save)]
