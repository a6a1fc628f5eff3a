"""How far two sets of images are apart, and other numbers that are made of features alone.

Everything is float64 on the host, in blocks, so that features may lie on disk.

Letters: N, M images of a set, D width of the features, C classes, E width of an embedding.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from dalle_jax.errors import UserError

Features = Float[np.ndarray, "N D"]
Others = Float[np.ndarray, "M D"]

KID_SUBSETS, KID_SIZE = 100, 1000
SCORE_SPLITS = 10
NEIGHBOURS = 3

_BLOCK = 2048  # images of either set that are compared at a time


class Moments:
    """Mean and covariance of features that come in parts.

    Parts are merged around their means, so that nothing is lost however many there are.

    Source: Chan, Golub and LeVeque 1983.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """Moments of one set."""
        moments = cls(features.shape[1])
        for _, part in _blocks(features):
            moments.add(part)
        return moments

    def add(self, features: Features) -> None:
        """Counts more images in."""
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean[None]
        total = self.count + len(features)
        step = mean - self.mean
        weight = self.count * len(features) / total
        self._scatter += centred.T @ centred + weight * np.outer(step, step)
        self.mean += step * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Float[np.ndarray, "D D"]:
        """The unbiased estimate, divided by N - 1."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the FID, if the features are Inception's.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which
    is symmetric: no complex numbers, and no offset where a covariance is singular. It depends on N
    (fewer images give larger distances), so compare only at the same N.

    Source: Heusel et al. 2017.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))[None]) @ vectors.T
    product = root @ second.covariance @ root
    spectrum = np.linalg.eigvalsh((product + product.T) / 2)
    overlap = np.sqrt(np.maximum(spectrum, 0)).sum()
    step = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(step @ step + traces - 2 * overlap)


def kernel_distance(first: Features, second: Others) -> float:
    """The KID over all pairs: unbiased squared MMD of the kernel (x y / D + 1)^3.

    Its mean does not depend on N, so that small sets can be compared; it may be below 0.

    Source: Binkowski et al. 2018.
    """
    within = [kernel_sum(x, x, same=True) / (len(x) * (len(x) - 1)) for x in (first, second)]
    between = kernel_sum(first, second, same=False) / (len(first) * len(second))
    return float(sum(within) - 2 * between)


def kernel_distance_of_subsets(
    first: Features,
    second: Others,
    *,
    subsets: int = KID_SUBSETS,
    size: int = KID_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """The KID as it is mostly published: mean and deviation over random subsets.

    Raises:
      UserError: if a set holds fewer images than a subset.
    """
    fewest = min(len(first), len(second))
    if fewest < size:
        raise UserError(f"a KID over subsets of {size} needs as many images, got {fewest}")
    rng = np.random.RandomState(seed)  # its stream is fixed for ever, and what peers use
    distances = []
    for _ in range(subsets):
        rows = [rng.choice(len(features), size, replace=False) for features in (first, second)]
        distances.append(kernel_distance(first[rows[0]], second[rows[1]]))
    return float(np.mean(distances)), float(np.std(distances))


def kernel_distance_and_error(
    first: Features, second: Others, *, seed: int = 0
) -> tuple[float, float]:
    """The KID as a report gives it, and how far chance may move it.

    With 1,000 images or more in both sets it is `kernel_distance_of_subsets` of the usual size.
    With fewer it is taken over all pairs; the error is the deviation over 50 random halves, which
    estimates the standard error of the whole.
    """
    fewest = min(len(first), len(second))
    if fewest >= KID_SIZE:
        return kernel_distance_of_subsets(first, second, seed=seed)
    size = max(2, fewest // 2)
    _, error = kernel_distance_of_subsets(first, second, subsets=50, size=size, seed=seed)
    return kernel_distance(first, second), error


def kernel_sum(x: np.ndarray, y: np.ndarray, *, same: bool) -> float:
    """Sum of the kernel over all pairs of rows, x [N, D] and y [M, D]; without pairs of an image
    with itself, those of equal index, if both are of the same images.
    """
    total = 0.0
    for i, rows in _blocks(x):
        for j, columns in _blocks(y):
            kernel = (rows @ columns.T / x.shape[1] + 1) ** 3
            total += kernel.sum() - (np.trace(kernel) if same and i == j else 0)
    return total


def inception_score(
    logits: Float[np.ndarray, "N C"], *, splits: int = SCORE_SPLITS
) -> tuple[float, float]:
    """The IS: exp of the mean KL of an image's classes to those of all.

    The splits are parts of the rows in their order: images have to come in no order of kinds.

    Returns:
      Mean and deviation over the splits.
    Raises:
      UserError: if there are fewer images than splits.
    Source: Salimans et al. 2016.
    """
    if len(logits) < splits:
        raise UserError(f"a score over {splits} splits needs as many images, got {len(logits)}")
    scores = []
    for part in range(splits):
        split = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        mean, negative_entropy = np.zeros(logits.shape[1]), 0.0
        for _, rows in _blocks(split):
            log_p = rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)
            p = np.exp(log_p)
            mean += p.sum(axis=0) / len(split)
            negative_entropy += (p * log_p).sum() / len(split)
        log_mean = np.log(np.maximum(mean, np.finfo(float).tiny))
        scores.append(np.exp(negative_entropy - mean @ log_mean))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    real: Features, sampled: Others, *, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Share of sampled images among the real ones, and of real ones among the sampled.

    An image is among a set if it is no farther from one of its images than that one's k-th
    neighbour in the set.

    Args:
      real: features of real images.
      sampled: features of sampled ones.
      neighbours: k.
    Raises:
      UserError: if a set has no k neighbours.
    Source: Kynkäänniemi et al. 2019.
    """
    fewest = min(len(real), len(sampled))
    if fewest <= neighbours:
        raise UserError(f"{neighbours} neighbours need more images than that, got {fewest}")
    return _share_among(sampled, real, neighbours), _share_among(real, sampled, neighbours)


def _share_among(features: np.ndarray, of: np.ndarray, k: int) -> float:
    nearest = np.full((len(of), k + 1), np.inf)  # the image itself is its nearest
    for rows, _, squared in _squared_distances(of, of):
        closest = np.concatenate([nearest[rows], squared], axis=1)
        nearest[rows] = np.partition(closest, k, axis=1)[:, : k + 1]
    reach = nearest.max(axis=1)[None] * (1 + 1e-9)  # equal up to rounding counts as inside
    inside = np.zeros(len(features), bool)
    for rows, columns, squared in _squared_distances(features, of):
        inside[rows] |= (squared <= reach[:, columns]).any(axis=1)
    return float(inside.mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Rows, columns, and the block of the table that they are of."""
    middle = y.mean(axis=0, keepdims=True, dtype=np.float64)  # near 0 less is lost in subtracting
    for i, rows in _blocks(x):
        rows = rows - middle
        for j, columns in _blocks(y):
            columns = columns - middle
            own, other = (np.square(part).sum(axis=1, keepdims=True) for part in (rows, columns))
            yield i, j, np.maximum(own + other.T - 2 * rows @ columns.T, 0)


def _blocks(features: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Places of some images and their features in float64."""
    for start in range(0, len(features), _BLOCK):
        places = slice(start, start + _BLOCK)
        yield places, features[places].astype(np.float64)


def clip_score(images: Float[np.ndarray, "N E"], texts: Float[np.ndarray, "N E"]) -> float:
    """100 times the mean of max(cosine, 0) of each image with its caption.

    Source: Hessel et al. 2021, with the factor 100 of the libraries in place of 2.5.
    """
    images, texts = images.astype(np.float64), texts.astype(np.float64)
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return float(100 * np.maximum((images * texts).sum(axis=1) / lengths, 0).mean())
