"""The command `dalle-jax`: one function per subcommand, whose docstring is its help."""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from dalle_jax.terminal import bar, complaints, show_log_lines

# What takes a second to import (jax, the data readers) waits for the command that needs it.

_app, _data = SubcommandApp(), SubcommandApp()
_app.command(_data, name="data", help="Look after your own pictures.")

_LISTED = Path(__file__).parent / "pretrained" / "captions.txt"
_DEMO = 6  # captions of that list, from its head


@_app.command
def generate(
    captions: Positional[tuple[str, ...]] = (),
    *,
    model: str = "emoji",
    n: Annotated[int, arg(aliases=("-n",))] = 4,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    image_prompt: Path | None = None,
    keep_rows: int = 0,
    decoder: Literal["autoregressive", "progressive"] | None = None,
    stages: int | None = None,
    revise: float | None = None,
    keep: int | None = None,
    clip: Path | None = None,
    out: Path = Path("sheet.png"),
    singles: Path | None = None,
) -> None:
    """Draw pictures for captions, on one sheet.

    Args:
      captions: What to draw, a row of pictures each; none for the first six of a shipped list.
      model: A shipped model by name, or the path of a model folder.
      n: Pictures per caption to draw.
      seed: Number from 0 to 4294967295; the same one gives the same pictures.
      temperature: Divides the logits: 1 as trained, below 1 safer, 0 always the likeliest code.
      top_k: Draw from this many likeliest codes only; None for all of them.
      top_p: Draw from the likeliest codes that hold this probability, above 0 and up to 1.
      guidance: Weight of the caption against none; 1 is off, 2 to 4 follow it more closely.
      image_prompt: Picture file whose top is kept, as many rows of codes as --keep-rows says.
      keep_rows: Rows of codes to keep of --image-prompt, at least 1 and less than the grid has.
      decoder: Code after code (autoregressive) or in few passes, from coarse to fine (progressive);
        None for the first of these that the model can do.
      stages: Passes of the progressive decoder; None for 16.
      revise: Greatest share of the cells that a pass of the progressive decoder may change, 0 to 1;
        None for 0.1.
      keep: Pictures per caption to keep, those that fit it best, best first; None for all.
      clip: Folder of the CLIP that chooses them; None for the model's own.
      out: PNG file for the sheet.
      singles: Folder for each picture by itself, as PNG; None for the sheet alone.
    """
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out is {out}; the sheet is a PNG, so its name must end in .png")
    if clip is not None and keep is None:
        raise ValueError("--clip names who chooses, but nothing is chosen; give --keep too")
    import dalle_jax
    from dalle_jax.generate.rerank import Ranked
    from dalle_jax.image.sheet import contact_sheet, save_png

    if not captions:
        captions = tuple(_LISTED.read_text(encoding="utf-8").splitlines()[:_DEMO])
    start = time.monotonic()
    drawing = dalle_jax.load(model)
    judge = None if clip is None else dalle_jax.Clip.load(clip)
    with bar("Drawing") as progress:
        images = drawing.generate(
            captions,
            n=n,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            image_prompt=image_prompt,
            keep_rows=keep_rows,
            decoder=decoder,
            stages=stages,
            revise=revise,
            keep=keep,
            judge=judge,
            progress=progress,
        )
    if isinstance(images, Ranked):
        images, scores = images
        for caption, row in zip(captions, scores, strict=True):
            print(f"{caption}: {' '.join(f'{score:.3f}' for score in row)}")
    save_png(out, contact_sheet(images, captions))
    if singles is not None:
        for row, caption in enumerate(captions):
            slug = re.sub("[^a-z0-9]+", "-", caption.lower()).strip("-")[:40]
            for number, image in enumerate(images[row]):
                save_png(singles / f"{row:03d}-{slug}-{number:03d}.png", image)
    took = time.monotonic() - start
    chosen = "" if keep is None else f", {keep} kept a caption,"
    drawn = f"{images.shape[0] * n} pictures of {drawing.px} px{chosen}"
    print(f"{drawn} in {took:.0f} s: {out.resolve()}")


@_data.command
def check(folder: Positional[Path], *, px: int = 64) -> None:
    """Look through a folder of captioned pictures for what would spoil training.

    Args:
      folder: Pictures with captions: x.jpg beside x.txt (a caption a line), or captions.jsonl/.csv.
      px: Pictures whose short side has fewer pixels than this are listed as tiny.
    """
    from dalle_jax.data.check import check as look_through

    with bar("Looking") as progress:
        report = look_through(folder, px=px, progress=progress)
    print(report)


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; what the user can mend is said in one sentence, with exit status 2."""
    description = "Draw pictures from captions, and train models that do."
    show_log_lines()
    with complaints("dalle-jax"):
        _app.cli(prog="dalle-jax", description=description, args=args, sort_subcommands=False)
