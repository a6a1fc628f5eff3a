"""Does `dalle-jax data overlap` find what is known to be the same? Emoji, one by one.

    python experiments/overlap.py

Needs `pip install dalle_jax[emoji,evaluate]`. Some emoji look exactly like another one (the neutral
figure is mostly the man's). All but the first of each such group, rendered at 96 px, and some emoji
that look like no other are held out; the first ones, at 64 px, and other emoji are for training.
docs/evaluate.md has what came out.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from dalle_jax.data.emoji_svgs import distinct_images, list_emoji, render
from dalle_jax.evaluate.features import efficientnet_network
from dalle_jax.evaluate.overlap import find_overlap, open_images
from dalle_jax.image.pixels import encode_png
from dalle_jax.terminal import bar

OTHERS = 200  # emoji of each side that look like no other


def main() -> None:
    """Prints what was found of the known pairs, and what else."""
    looks = [image.svgs for image in distinct_images(list_emoji())]
    groups = [group for group in looks if len(group) > 1]
    alone = [group[0] for group in looks if len(group) == 1]
    alone = [alone[i] for i in np.random.default_rng(0).permutation(len(alone))[: 2 * OTHERS]]
    training = {f"known{i:03d}": (group[0], 64) for i, group in enumerate(groups)}
    held_out = {
        f"known{i:03d}-{j}": (drawing, 96)
        for i, group in enumerate(groups)
        for j, drawing in enumerate(group[1:])
    }
    known = len(held_out)
    training |= {f"other{i:03d}": (drawing, 64) for i, drawing in enumerate(alone[:OTHERS])}
    held_out |= {f"new{i:03d}": (drawing, 96) for i, drawing in enumerate(alone[OTHERS:])}

    with tempfile.TemporaryDirectory() as folder, bar("Looking") as progress:
        sets = []
        for name, chosen in {"training": training, "held": held_out}.items():
            path = Path(folder, name)
            path.mkdir()
            for file, (drawing, px) in chosen.items():
                (path / f"{file}.png").write_bytes(encode_png(render(drawing.path, px)))
            sets.append(open_images(path))
        network = efficientnet_network()
        found = find_overlap(*sets, lambda images: network(images)[0], progress=progress)

    print(found)
    nearest, right = {}, set()
    for pair in found.pairs:
        nearest.setdefault(pair.held_out, pair.training)
        if _group(pair.held_out) == _group(pair.training):
            right.add(pair.held_out)
    first = sum(_group(nearest[name]) == _group(name) for name in right)
    new = sum(name.startswith("new") for name in found.overlapping)
    print(
        f"{len(right)} of {known} known drawings found, {first} of them with their like as the "
        f"nearest; of {OTHERS} held-out drawings that look like no other, {new} called known"
    )
    for name, (drawing, _) in held_out.items():
        if name.startswith("known") and f"{name}.png" not in right:
            print(f"missed: {drawing.name}")


def _group(name: str) -> str:
    return name.removesuffix(".png").partition("-")[0]


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # or emoji.py there would hide the package `emoji`
    main()
