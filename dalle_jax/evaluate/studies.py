"""Studies: how the metrics change with blur, with the best of N, and with sampling.

Each returns rows of named numbers, one for each setting. Letters: M captions, n images of each.
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
from dalle_jax.evaluate.features import Network
from dalle_jax.evaluate.image_sets import ImageBatch, first_of_each, sampled_images
from dalle_jax.evaluate.result_cache import ResultCache, digest, temporary_array
from dalle_jax.generate.model import Model
from dalle_jax.generate.sampling import SamplingConfig

RADII = (0, 1, 2, 4, 8)
BLUR_PX = 256  # side of the images that the radii are for

Row = dict[str, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ImageMetrics:
    """Compares two sets of images.

    Attributes:
      networks: whose features are compared, each with metrics of its own.
      cache: for features.
      judge: scores how well images fit their captions; None to leave that out.
      progress: called with the batches done and in all, of one set at a time.
    """

    networks: Sequence[Network]
    cache: ResultCache
    judge: Judge | None = None
    progress: Progress | None = None

    def compare(
        self,
        real: Sequence[ImageBatch],
        samples: Sequence[ImageBatch],
        *,
        radius: int | float = 0,
        captions: Sequence[str] | None = None,
    ) -> Row:
        """Measures the distance of samples from real images.

        Args:
          real: batches of the real images.
          samples: batches of the samples.
          radius: of the blur of both, see `blurred`.
          captions: of the samples, for the judge.
        Returns:
          Metrics by their exact names; a KID is times 1,000.
        """
        row = {}
        for network in self.networks:
            first, _ = self._features(network, real, radius)
            second, logits = self._features(network, samples, radius)
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
            row["CLIP score"] = mean_clip_score(self.judge, samples, captions)
        return row

    def _features(self, network, batches, radius):
        features = logits = None
        for done, batch in enumerate(batches, 1):
            key = {
                "images": batch.key,
                "network": [network.name, network.fingerprint],
                "radius": float(radius),
            }

            def compute(batch=batch):
                images = blurred(batch.images(), radius)
                return dict(zip(("features", "logits"), network(images), strict=True))

            result = self.cache.get(key, compute)
            if features is None:
                count = sum(len(batch.rows) for batch in batches)
                features, logits = (
                    temporary_array(count, result[name].shape[1]) for name in ("features", "logits")
                )
            features[batch.rows], logits[batch.rows] = result["features"], result["logits"]
            if self.progress is not None:
                self.progress(done, len(batches))
        return features, logits


def blurred(
    images: UInt8[np.ndarray, "B R R 3"], radius: int | float
) -> UInt8[np.ndarray, "B R R 3"]:
    """Images blurred by Pillow's GaussianBlur.

    Args:
      images: of any side R.
      radius: standard deviation in pixels of an image of 256; at another side it is radius R / 256
        pixels, so that the same share of the image is lost.
    Source: Ramesh et al. 2021, figure 9; that radius means the deviation is Pillow's use of the
      word, the paper does not say.
    """
    if not radius:
        return images
    gaussian = ImageFilter.GaussianBlur(radius * images.shape[1] / BLUR_PX)
    return np.stack([np.array(Image.fromarray(image).filter(gaussian)) for image in images])


def blur_study(
    metrics: ImageMetrics,
    real: Sequence[ImageBatch],
    samples: Sequence[ImageBatch],
    radii: Iterable[int] = RADII,
) -> list[Row]:
    """Compares real images and samples after the same blur, with growing radii.

    Source: Ramesh et al. 2021, figure 9.
    """
    return [{"radius": r} | metrics.compare(real, samples, radius=r) for r in radii]


def mean_clip_score(judge: Judge, batches: Iterable[ImageBatch], captions: Sequence[str]) -> float:
    """The CLIP score of images with their captions, [B, R, R, 3] in each batch."""
    total = count = 0
    for batch in batches:
        texts = np.asarray(judge.encode_texts([captions[row] for row in batch.rows]))
        images = np.asarray(judge.encode_images(batch.images()))
        total += len(batch.rows) * distances.clip_score(images, texts)
        count += len(batch.rows)
    return total / count


def clip_scores(
    judge: Judge, batches: Iterable[ImageBatch], captions: Sequence[str]
) -> Float[np.ndarray, "M n"]:
    """Cosines of captions and their n images, [B, n, R, R, 3] in each batch."""
    rows, scores = [], []
    for batch in batches:
        images = batch.images()
        texts = np.asarray(judge.encode_texts([captions[row] for row in batch.rows]))
        features = np.asarray(judge.encode_images(images.reshape(-1, *images.shape[2:])))
        features = features.reshape(*images.shape[:2], -1)
        scores.append(np.einsum("BnE,BE->Bn", features, texts))
        rows.extend(batch.rows)
    return np.concatenate(scores)[np.argsort(rows)]


def best_of(
    batches: Iterable[ImageBatch], scores: Float[np.ndarray, "M n"], first: int
) -> list[ImageBatch]:
    """The image with the highest score among the first of each caption."""
    best = scores[:, :first].argmax(axis=1)
    chosen = []
    for batch in batches:
        indices = best[batch.rows]
        key = digest({"images": batch.key, "chosen": indices.tolist()})

        def images(batch=batch, indices=indices):
            return batch.images()[np.arange(len(indices)), indices]

        chosen.append(dataclasses.replace(batch, key=key, images=images))
    return chosen


def rerank_study(
    metrics: ImageMetrics,
    real: Sequence[ImageBatch],
    batches: Sequence[ImageBatch],
    scores: Float[np.ndarray, "M n"],
    captions: Sequence[str],
) -> list[Row]:
    """Measures the best of the first 1, 2, 4, ... images of each caption.

    Args:
      metrics: its judge is another model than the one that scored.
      real: batches of the real images.
      batches: n images of each caption.
      scores: by which the best are chosen.
      captions: M captions.
    Source: Ramesh et al. 2021, figure 9 (c).
    """
    n = scores.shape[1]
    counts = [2**k for k in range(n.bit_length()) if 2**k < n] + [n]
    rows = []
    for count in counts:
        measured = metrics.compare(real, best_of(batches, scores, count), captions=captions)
        chosen_by = float(100 * scores[:, :count].max(axis=1).mean())
        rows.append({"N": count, "reranker score": chosen_by} | measured)
    return rows


def sampling_study(
    metrics: ImageMetrics,
    real: Sequence[ImageBatch],
    model: Model,
    captions: Sequence[str],
    settings: Sequence[SamplingConfig],
    *,
    seed: int,
    cache: ResultCache,
) -> list[Row]:
    """Measures one image of each caption, sampled with each of several settings."""
    rows = []
    for sampling in settings:
        batches = list(
            first_of_each(sampled_images(model, captions, sampling, n=1, seed=seed, cache=cache))
        )
        rows.append(
            {"sampling": sampling.describe()} | metrics.compare(real, batches, captions=captions)
        )
    return rows
