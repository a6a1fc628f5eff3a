"""The studies: how the numbers change with blur, with the choice among N, and with sampling.

Each gives rows, one for each setting, of named numbers. Letters: M captions, n pictures of each.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from dalle_jax.evaluate import distances
from dalle_jax.evaluate.composition import Judge
from dalle_jax.evaluate.distances import Moments
from dalle_jax.evaluate.drawing import Part, drawn, singles
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.kept import Kept, digest, on_disk
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig

RADII = (0, 1, 2, 4, 8)
BLUR_PX = 256  # side of the pictures that the radii are for

Row = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What pictures are measured with.

    Attributes:
      networks: each gives numbers of its own.
      kept: where features are kept.
      judge: says how well pictures fit their captions; None to leave that out.
      progress: called with parts done and in all, of one set at a time.
    """

    networks: Sequence[Network]
    kept: Kept
    judge: Judge | None = None
    progress: Progress | None = None

    def compare(
        self,
        real: Sequence[Part],
        pictures: Sequence[Part],
        *,
        radius: int | float = 0,
        captions: Sequence[str] | None = None,
    ) -> Row:
        """Measures how far pictures are from real ones, as two sets.

        Args:
          real: parts of the real pictures.
          pictures: parts of the others.
          radius: of the blur that both are seen through, see `blurred`.
          captions: of the others, for the judge.
        Returns:
          Numbers by their exact names; a KID is given times 1,000.
        """
        row = {}
        for network in self.networks:
            first, _ = self._features(network, real, radius)
            second, logits = self._features(network, pictures, radius)
            moments = Moments.of(first), Moments.of(second)
            row[network.title("FID")] = distances.frechet_distance(*moments)
            kid, error = distances.kernel_distance_and_error(first, second)
            row[f"{network.title('KID')} x1000"] = 1000 * kid
            row[f"{network.title('KID')} x1000 +-"] = 1000 * error
            if len(logits) >= distances.SCORE_SPLITS:
                row[network.title("IS")], _ = distances.inception_score(logits)
            if min(len(first), len(second)) > distances.NEIGHBOURS:
                precision, recall = distances.precision_recall(first, second)
                row |= {f"precision {network.name}": precision, f"recall {network.name}": recall}
        if self.judge is not None and captions is not None:
            row["CLIP score"] = agreement(self.judge, pictures, captions)
        return row

    def _features(self, network, parts, radius):
        features = logits = None
        for done, part in enumerate(parts, 1):
            question = {
                "features of": part.key,
                "network": [network.name, network.fingerprint],
                "radius": float(radius),
            }

            def answer(part=part):
                images = blurred(part.images(), radius)
                return dict(zip(("features", "logits"), network(images), strict=True))

            answered = self.kept.arrays(question, answer)
            if features is None:
                count = sum(len(part.rows) for part in parts)
                features, logits = (
                    on_disk(count, answered[name].shape[1]) for name in ("features", "logits")
                )
            features[part.rows], logits[part.rows] = answered["features"], answered["logits"]
            if self.progress is not None:
                self.progress(done, len(parts))
        return features, logits


def blurred(
    images: UInt8[np.ndarray, "B R R 3"], radius: int | float
) -> UInt8[np.ndarray, "B R R 3"]:
    """Looks at pictures through a Gaussian, with Pillow's GaussianBlur.

    Args:
      images: of any side R.
      radius: standard deviation in pixels of a picture of 256; at another side it is radius R / 256
        pixels, so that the same share of the picture is lost.
    Source: Ramesh et al. 2021, figure 9; that radius means the deviation is Pillow's use of the
      word, the paper does not say.
    """
    if not radius:
        return images
    gaussian = ImageFilter.GaussianBlur(radius * images.shape[1] / BLUR_PX)
    return np.stack([np.array(Image.fromarray(image).filter(gaussian)) for image in images])


def blur_study(
    bench: Bench, real: Sequence[Part], pictures: Sequence[Part], radii: Iterable[int] = RADII
) -> list[Row]:
    """Measures real and drawn pictures through the same blur, with growing radii.

    Source: Ramesh et al. 2021, figure 9.
    """
    return [{"radius": r} | bench.compare(real, pictures, radius=r) for r in radii]


def agreement(judge: Judge, parts: Iterable[Part], captions: Sequence[str]) -> float:
    """The CLIP score of pictures with their captions, [B, R, R, 3] in each part."""
    total = count = 0
    for part in parts:
        texts = np.asarray(judge.texts([captions[row] for row in part.rows]))
        images = np.asarray(judge.images(part.images()))
        total += len(part.rows) * distances.clip_score(images, texts)
        count += len(part.rows)
    return total / count


def scores(
    judge: Judge, parts: Iterable[Part], captions: Sequence[str]
) -> Float[np.ndarray, "M n"]:
    """Cosines of n pictures of each caption, [B, n, R, R, 3] in each part, with it."""
    rows, found = [], []
    for part in parts:
        images = part.images()
        texts = np.asarray(judge.texts([captions[row] for row in part.rows]))
        features = np.asarray(judge.images(images.reshape(-1, *images.shape[2:])))
        features = features.reshape(*images.shape[:2], -1)
        found.append(np.einsum("BnE,BE->Bn", features, texts))
        rows.extend(part.rows)
    return np.concatenate(found)[np.argsort(rows)]


def best_of(parts: Iterable[Part], scored: Float[np.ndarray, "M n"], first: int) -> list[Part]:
    """The highest scored among the first pictures of each caption."""
    chosen = scored[:, :first].argmax(axis=1)
    found = []
    for part in parts:
        picks = chosen[part.rows]
        key = digest({"of": part.key, "picks": picks.tolist()})

        def images(part=part, picks=picks):
            return part.images()[np.arange(len(picks)), picks]

        found.append(dataclasses.replace(part, key=key, images=images))
    return found


def rerank_study(
    bench: Bench,
    real: Sequence[Part],
    parts: Sequence[Part],
    scored: Float[np.ndarray, "M n"],
    captions: Sequence[str],
) -> list[Row]:
    """Measures the best of the first 1, 2, 4, ... pictures of each caption.

    Args:
      bench: its judge should not be who scored.
      real: parts of the real pictures.
      parts: n pictures of each caption.
      scored: by which the best are chosen.
      captions: M captions.
    Source: Ramesh et al. 2021, figure 9 (c).
    """
    n = scored.shape[1]
    counts = [2**k for k in range(n.bit_length()) if 2**k < n] + [n]
    rows = []
    for count in counts:
        measured = bench.compare(real, best_of(parts, scored, count), captions=captions)
        chosen_by = float(100 * scored[:, :count].max(axis=1).mean())
        rows.append({"N": count, "score it is chosen by": chosen_by} | measured)
    return rows


def sampling_study(
    bench: Bench,
    real: Sequence[Part],
    model: Model,
    captions: Sequence[str],
    settings: Sequence[SamplingConfig],
    *,
    seed: int,
    kept: Kept,
) -> list[Row]:
    """Measures one picture of each caption, drawn with each of several settings."""
    rows = []
    for sampling in settings:
        parts = list(singles(drawn(model, captions, sampling, n=1, seed=seed, kept=kept)))
        rows.append(
            {"sampling": sampling.describe()} | bench.compare(real, parts, captions=captions)
        )
    return rows
