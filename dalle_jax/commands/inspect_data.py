"""`dalle-jax data`: look after a folder of captioned images."""

from pathlib import Path

from tyro.conf import Positional

from dalle_jax.commands.process import prepare_process
from dalle_jax.option_checks import check_output, check_seed, save_outputs
from dalle_jax.terminal import bar


def check(folder: Positional[Path], *, px: int = 64) -> None:
    """Look through a folder of captioned images for what would spoil training.

    Args:
      folder: Images with captions: x.jpg beside x.txt (a caption a line), or captions.jsonl/.csv.
      px: Images whose short side has fewer pixels than this are listed as tiny.
    """
    from dalle_jax.data.check import check as check_folder

    with bar("Checking") as progress:
        report = check_folder(folder, px=px, progress=progress)
    print(report)


def overlap(
    training: Positional[str],
    held_out: Positional[str],
    *,
    threshold: float | None = None,
    remove_list: Path | None = None,
    sheet: Path | None = None,
    clip: Path | None = None,
    seed: int = 0,
) -> None:
    """Find held-out images that are nearly the same as training images.

    Args:
      training: Folder of the images of which some may have to go; or emoji:train.
      held_out: Folder of the images that should be new; or emoji:validation and the like.
      threshold: Least cosine of a pair; None to learn it from changed copies of the held-out ones.
      remove_list: File for the names of the training images to leave out, one a line.
      sheet: PNG file for the least similar pairs, where the threshold decides.
      clip: Folder of a CLIP to compare by; None for EfficientNet-Lite0.
      seed: Of the changed copies.
    """
    check_output("--remove-list", remove_list)
    check_output("--sheet", sheet, ".png")
    check_seed(seed)
    prepare_process()
    from dalle_jax.data.record import printable
    from dalle_jax.evaluate import overlap as near_duplicates

    if clip is None:
        from dalle_jax.evaluate.features import efficientnet_network

        network = efficientnet_network()

        def embed(images):
            return network(images)[0]

    else:
        from dalle_jax import Clip

        embed = Clip.load(clip).encode_images
    sets = near_duplicates.open_images(training), near_duplicates.open_images(held_out)
    with bar("Comparing") as progress:
        found = near_duplicates.find_overlap(
            *sets, embed, threshold=threshold, seed=seed, progress=progress
        )
    print(printable(str(found)))
    outputs = []
    if remove_list is not None:
        outputs.append((remove_list, found.write_remove_list))
    if sheet is not None and found.pairs:
        from dalle_jax.image.sheet import save_png

        outputs.append((sheet, lambda path: save_png(path, near_duplicates.sheet(found, *sets))))
    save_outputs(outputs)
