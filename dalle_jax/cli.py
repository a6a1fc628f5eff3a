"""The command `dalle-jax`: one function per subcommand, whose docstring is its help."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from dalle_jax.compiled import keep_programs
from dalle_jax.errors import UserError
from dalle_jax.memory import keep_memory
from dalle_jax.options import (
    check_input,
    check_output,
    check_output_folder,
    check_seed,
    save_outputs,
)
from dalle_jax.terminal import bar, complaints, show_log_lines

# What takes a second to import (jax, the data readers) waits for the command that needs it.

_app, _data, _votes = SubcommandApp(), SubcommandApp(), SubcommandApp()
_app.command(_data, name="data", help="Look after your own pictures.")
_app.command(_votes, name="votes", help="Let people compare two models.")


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
    revise: int | None = None,
    keep: int | None = None,
    clip: Path | None = None,
    trace: Path | None = None,
    out: Path = Path("sheet.png"),
    singles: Path | None = None,
) -> None:
    """Draw pictures for captions, on one sheet.

    Args:
      captions: What to draw, a row of pictures each; none for the first six of a list that comes
        with each shipped model (that of emoji for other models).
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
        None for the latter if the model can do it.
      stages: Passes of the progressive decoder; None for 16.
      revise: Passes of the progressive decoder over the full grid that replace unlikely codes;
        None for none.
      keep: Pictures per caption to keep, those that fit it best, best first; None for all.
      clip: Folder of the CLIP that chooses them; None for the model's own.
      trace: GIF file that shows the sheet arise, pass by pass or row by row.
      out: PNG file for the sheet.
      singles: Folder for each picture by itself, as PNG; None for the sheet alone.
    """
    check_output("--out", out, ".png")
    check_output("--trace", trace, ".gif")
    check_output_folder("--singles", singles)
    if trace is not None and keep is not None:
        raise UserError("--trace shows all pictures arise; it cannot go with --keep")
    if clip is not None and keep is None:
        raise UserError("--clip names who chooses, but nothing is chosen; give --keep too")
    check_input("--image-prompt", image_prompt)
    check_seed(seed)
    _prepare_process()
    import dalle_jax
    from dalle_jax.generate.folder import listed, shipped
    from dalle_jax.generate.rerank import Ranked
    from dalle_jax.image.sheet import check_gif, contact_sheet, save_gif, save_png

    if not captions:
        captions = listed(model if model in shipped() else "emoji")
    start = time.monotonic()
    drawing = dalle_jax.load(model)
    if trace is not None:
        check_gif(n, drawing.px, captions)
    judge = None if clip is None else dalle_jax.Clip.load(clip)
    asked = {
        "n": n,
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance": guidance,
        "image_prompt": image_prompt,
        "keep_rows": keep_rows,
        "decoder": decoder,
        "stages": stages,
        "revise": revise,
    }
    with bar("Drawing") as progress:
        if trace is None:
            asked |= {"keep": keep, "judge": judge}
            images = drawing.generate(captions, **asked, progress=progress)
        else:
            frames = drawing.trace(captions, **asked, progress=progress)
            images = frames[-1]
    lines = []
    if isinstance(images, Ranked):
        images, scores = images
        for caption, row in zip(captions, scores, strict=True):
            lines.append(f"{caption}: {' '.join(f'{score:.3f}' for score in row)}")

    def save_trace(path):
        save_gif(path, [contact_sheet(frame, captions) for frame in frames])

    save_outputs(
        [
            *_singles(singles, captions, images),
            (out, lambda path: save_png(path, contact_sheet(images, captions))),
            *([] if trace is None else [(trace, save_trace)]),
        ]
    )
    for line in lines:
        print(line)
    took = time.monotonic() - start
    chosen = "" if keep is None else f", {keep} kept a caption,"
    drawn = f"{images.shape[0] * n} pictures of {drawing.px} px{chosen}"
    print(f"{drawn} in {took:.0f} s: {out.resolve()}")


@_app.command
def edit(
    picture: Positional[Path],
    captions: Positional[tuple[str, ...]],
    *,
    mask: Path | None = None,
    share: float | None = None,
    model: str = "people",
    n: Annotated[int, arg(aliases=("-n",))] = 4,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    stages: int | None = None,
    revise: int | None = None,
    out: Path = Path("edit.png"),
    singles: Path | None = None,
) -> None:
    """Draw a part of a picture again, or vary it; needs a model with a progressive prior.

    Args:
      picture: Picture file; its middle square is what the model sees.
      captions: What the whole picture shall show, a row of pictures each.
      mask: Picture file of the same size, white where the other one is to be drawn again, and
        black or transparent elsewhere.
      share: Instead of a mask: share of the cells to draw again, at random, above 0 and up to 1.
      model: A shipped model by name, or the path of a model folder.
      n: Pictures per caption to draw.
      seed: Number from 0 to 4294967295; the same one gives the same pictures.
      temperature: Divides the logits; see `dalle-jax generate`.
      top_k: Draw from this many likeliest codes only; None for all of them.
      top_p: Draw from the likeliest codes that hold this probability, above 0 and up to 1.
      guidance: Weight of the caption against none; 1 is off, 2 to 4 follow it more closely.
      stages: Passes; None for 16, or one a cell if fewer are drawn again.
      revise: Passes over the full grid that replace unlikely codes; None for none.
      out: PNG file for the sheet: the picture as it was, then the new ones.
      singles: Folder for each new picture by itself, as PNG; None for the sheet alone.
    """
    check_output("--out", out, ".png")
    check_output_folder("--singles", singles)
    check_input("the picture", picture)
    check_input("--mask", mask)
    check_seed(seed)
    _prepare_process()
    import numpy as np

    import dalle_jax
    from dalle_jax.image.pixels import decode, square
    from dalle_jax.image.sheet import contact_sheet, save_png

    start = time.monotonic()
    drawing = dalle_jax.load(model)
    old = decode(picture)
    with bar("Drawing") as progress:
        images = drawing.edit(
            old,
            captions,
            mask=mask,
            share=share,
            n=n,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            stages=stages,
            revise=revise,
            progress=progress,
        )
    before = np.stack([square(old, drawing.px)[None]] * len(captions))
    sheet = np.concatenate([before, images], axis=1)
    save_outputs(
        [
            *_singles(singles, captions, images),
            (out, lambda path: save_png(path, contact_sheet(sheet, captions))),
        ]
    )
    took = time.monotonic() - start
    print(f"{len(captions) * n} pictures in {took:.0f} s: {out.resolve()}")


def _prepare_process() -> None:
    """Before anything imports jax: compiled programs and large buffers are kept."""
    keep_memory()
    keep_programs()


def _singles(folder, captions, images):
    """What to save in a folder of single pictures, which may be None."""
    from dalle_jax.image.sheet import save_png

    def save(folder):
        for row, caption in enumerate(captions):
            slug = re.sub("[^a-z0-9]+", "-", caption.lower()).strip("-")[:40]
            for number, image in enumerate(images[row]):
                save_png(folder / f"{row:03d}-{slug}-{number:03d}.png", image)

    return [] if folder is None else [(folder, save)]


@_app.command
def evaluate(
    *,
    model: str = "emoji",
    suite: Literal["emoji", "coco", "cub", "folder"] = "emoji",
    data: Path | None = None,
    split: str | None = None,
    out: Path = Path("report"),
    quick: bool = False,
    n: int | None = None,
    studies: tuple[Literal["blur", "sampling", "rerank", "composition", "retrieval"], ...] = (
        "blur",
        "sampling",
        "rerank",
        "composition",
        "retrieval",
    ),
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    decoder: Literal["autoregressive", "progressive"] | None = None,
    stages: int | None = None,
    inception: Path | None = None,
    clip: Path | None = None,
    judge: Path | None = None,
) -> None:
    """Measure a model: distances to real pictures, and studies of blur, sampling and reranking.

    The same command goes on where it was stopped. Writes report.md, report.json, plots and sheets.

    Args:
      model: A shipped model by name, or the path of a model folder.
      suite: Captions and real pictures: emoji; or coco (30,000 captions), cub (all captions) or
        folder (a caption a picture), of the set that --data names.
      data: Folder of captioned pictures, or one that TensorFlow Datasets prepared.
      split: Part of the data; by default validation, of CUB test, of a plain folder all of it.
      out: Folder for the report, and for what is kept to go on from.
      quick: Draw and compare less: minutes instead of hours with the shipped model on two cores.
      n: Captions of the suite to draw, a random choice; None for all (256 with --quick).
      studies: Which studies to make besides the main numbers.
      seed: Number from 0 to 4294967295; the same one gives the same numbers.
      temperature: Divides the logits; see `dalle-jax generate`.
      top_k: Draw from this many likeliest codes only; None for all of them.
      top_p: Draw from the likeliest codes that hold this probability, above 0 and up to 1.
      guidance: Weight of the caption against none; 1 is off.
      decoder: Which prior draws; None for the progressive one if the model has it.
      stages: Passes of the progressive decoder; None for 16.
      inception: File pt_inception-2015-12-05-6726825d.pth, for the FID, KID and IS that others
        publish; without it EfficientNet-Lite0 takes its place, and the numbers carry its name.
      clip: Folder of the CLIP that reranks; by default the model's own, if it has one.
      judge: Folder of another CLIP, which scores how well pictures fit their captions, and without
        which composition (of emoji) is not studied.
    """
    check_input("--inception", inception)
    check_output_folder("--out", out)
    check_seed(seed)
    _prepare_process()
    import dalle_jax
    from dalle_jax.evaluate.drawing import Sampling
    from dalle_jax.evaluate.features import efficientnet_network, inception_network
    from dalle_jax.evaluate.report import Plan, evaluate, quick_plan
    from dalle_jax.evaluate.suites import open_suite

    plan = quick_plan() if quick else Plan()
    if n is not None:
        plan = dataclasses.replace(plan, captions=n)
    start = time.monotonic()
    drawing = dalle_jax.load(model)
    network = efficientnet_network() if inception is None else inception_network(inception)
    sections = evaluate(
        drawing,
        open_suite(suite, data=data, split=split, px=drawing.px, seed=seed),
        out=out,
        plan=plan,
        networks=[network],
        chosen=studies,
        sampling=Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            decoder=decoder,
            stages=stages,
        ),
        seed=seed,
        reranker=drawing.clip if clip is None else dalle_jax.Clip.load(clip),
        judge=None if judge is None else dalle_jax.Clip.load(judge),
        show=bar,
    )
    took = time.monotonic() - start
    for section in sections:
        if section.key == "distances":
            for row in section.rows:
                print(", ".join(f"{name} {_short(value)}" for name, value in row.items()))
    print(f"measured in {took:.0f} s: {(out / 'report.md').resolve()}")


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


@_data.command
def overlap(
    training: Positional[str],
    held: Positional[str],
    *,
    threshold: float | None = None,
    remove_list: Path | None = None,
    sheet: Path | None = None,
    clip: Path | None = None,
    seed: int = 0,
) -> None:
    """Find held-out pictures that are nearly the same as training pictures.

    Args:
      training: Folder of the pictures of which some may have to go; or emoji:train.
      held: Folder of the pictures that should be new; or emoji:validation and the like.
      threshold: Least cosine of a pair; None to learn it from changed copies of the held-out ones.
      remove_list: File for the names of the training pictures to leave out, one a line.
      sheet: PNG file for the least similar pairs, where the threshold decides.
      clip: Folder of a CLIP to compare by; None for EfficientNet-Lite0.
      seed: Of the changed copies.
    """
    check_output("--remove-list", remove_list)
    check_output("--sheet", sheet, ".png")
    check_seed(seed)
    _prepare_process()
    from dalle_jax.data.record import printable
    from dalle_jax.evaluate import overlap as finder

    if clip is None:
        from dalle_jax.evaluate.features import efficientnet_network

        network = efficientnet_network()

        def embed(images):
            return network(images)[0]

    else:
        from dalle_jax import Clip

        embed = Clip.load(clip).images
    sets = finder.open_pictures(training), finder.open_pictures(held)
    with bar("Looking") as progress:
        found = finder.find_overlap(*sets, embed, threshold=threshold, seed=seed, progress=progress)
    print(printable(str(found)))
    outputs = []
    if remove_list is not None:
        outputs.append((remove_list, found.write_remove_list))
    if sheet is not None and found.pairs:
        from dalle_jax.image.sheet import save_png

        outputs.append((sheet, lambda path: save_png(path, finder.sheet(found, *sets))))
    save_outputs(outputs)


@_votes.command
def page(
    first: Positional[str],
    second: Positional[str],
    *,
    captions: Path | None = None,
    out: Path = Path("votes.html"),
    seed: int = 0,
    temperature: float = 1.0,
    top_p: float | None = None,
    guidance: float = 1.0,
) -> None:
    """Write a web page on which people compare two models blind, and the key to it.

    The page is one file that works without a network; voters save a file with their votes.

    Args:
      first: A shipped model, a model folder, or a folder of pictures with captions.
      second: The other one.
      captions: Text file, one caption a line; None for a shipped list, or for all that both have
        if one of them is a folder of pictures.
      out: The page, ending in .html; the key goes beside it, to .key.json.
      seed: Of the drawings, the order of pairs, and of left and right.
      temperature: Divides the logits, for models.
      top_p: Draw from the likeliest codes that hold this probability, for models.
      guidance: Weight of the caption against none, for models.
    """
    check_input("--captions", captions)
    check_output("--out", out, ".html")
    check_seed(seed)
    _prepare_process()
    from dalle_jax.evaluate.pairs import open_painter, shared_captions
    from dalle_jax.evaluate.votes import write_page

    options = {"seed": seed, "temperature": temperature, "top_p": top_p, "guidance": guidance}
    painters = [open_painter(name, **options) for name in (first, second)]
    file = captions or _LISTED
    asked = shared_captions(painters, file, must=captions is not None)
    with bar("Drawing") as progress:
        pictures = [painter.paint(asked, progress) for painter in painters]
    names = first, second
    save_outputs([(out, lambda path: write_page(path, asked, *pictures, names=names, seed=seed))])
    key = out.with_suffix(".key.json")
    print(f"{len(asked)} pairs: {out.resolve()}; keep {key} to yourself")


@_votes.command
def count(key: Positional[Path], votes: Positional[tuple[Path, ...]]) -> None:
    """Count votes by majority, with 95 % intervals.

    Args:
      key: The file .key.json beside the page.
      votes: The files that voters saved.
    """
    for file in (key, *votes):
        check_input("a file of votes", file)
    from dalle_jax.evaluate.votes import count_votes

    tallies, remarks = count_votes(key, votes)
    for line in (*tallies, *remarks):
        print(line)


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; what the user can mend is said in one sentence, with exit status 2."""
    description = "Draw pictures from captions, and train models that do."
    show_log_lines()
    with complaints("dalle-jax"):
        _app.cli(prog="dalle-jax", description=description, args=args, sort_subcommands=False)
