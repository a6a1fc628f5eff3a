"""InceptionV3 as FID and the Inception score use it: the network of 2015, not torchvision's.

The weights are a file of the user: `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid and
torch-fidelity publish, converted from the TensorFlow graph of the same date. It differs from
torchvision's network by 1,008 classes, averages that leave the padding out, a maximum in the last
block, and in how images are resized and scaled.

Letters: B batch, H and W sides, R = 299 side of the input, C channels.
Source: Szegedy et al. 2016; Heusel et al. 2017 for its use; Salimans et al. 2016 for the score.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dalle_jax.evaluate.feature_layers import Params, conv, folded, max_pool
from dalle_jax.weights.torch_file import WeightsError

SIDE = 299
_WINDOW = (1, 3, 3, 1)


def from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """Makes parameters of a state dict.

    Raises:
      WeightsError: if they are not those of this network.
    """
    shape = np.shape(state.get("fc.weight"))
    if shape != (1008, 2048):
        raise WeightsError(
            f"these are not the weights that FID is defined by: fc.weight has shape {list(shape)}, "
            "wanted [1008, 2048]; get pt_inception-2015-12-05-6726825d.pth"
        )
    names = {name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")}
    params = {name: folded(state, f"{name}.conv", f"{name}.bn") for name in sorted(names)}
    params["fc"] = {"kernel": np.ascontiguousarray(state["fc.weight"].T)}
    return params


def apply(
    params: Params, images: UInt8[Array | np.ndarray, "B H W 3"]
) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
    """Features and class logits of images.

    Returns:
      What the last average pooling gives (for FID and KID), and the logits without their bias, as
      the first code of the Inception score had them.
    """

    def layer(x, name, **options):
        return jax.nn.relu(conv(params[name], x, **options))

    def chain(x, block, *names):
        for name in names:
            x = layer(x, f"{block}.{name}")
        return x

    x = resize(images.astype(jnp.float32))
    x = (x - 128) / 128
    x = layer(x, "Conv2d_1a_3x3", stride=2, padding="VALID")  # B 149 149 32
    x = layer(x, "Conv2d_2a_3x3", padding="VALID")
    x = layer(x, "Conv2d_2b_3x3")
    x = max_pool(x, stride=2, padding="VALID")  # B 73 73 64
    x = layer(x, "Conv2d_3b_1x1")
    x = layer(x, "Conv2d_4a_3x3", padding="VALID")
    x = max_pool(x, stride=2, padding="VALID")  # B 35 35 192

    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        branches = (
            chain(x, block, "branch1x1"),
            chain(x, block, "branch5x5_1", "branch5x5_2"),
            chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            chain(_average(x), block, "branch_pool"),
        )
        x = jnp.concatenate(branches, axis=-1)  # B 35 35 256, then 288

    block = "Mixed_6a"
    deep = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
    branches = (
        layer(x, f"{block}.branch3x3", stride=2, padding="VALID"),
        layer(deep, f"{block}.branch3x3dbl_3", stride=2, padding="VALID"),
        max_pool(x, stride=2, padding="VALID"),
    )
    x = jnp.concatenate(branches, axis=-1)  # B 17 17 768

    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        branches = (
            chain(x, block, "branch1x1"),
            chain(x, block, *(f"branch7x7_{i}" for i in (1, 2, 3))),
            chain(x, block, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            chain(_average(x), block, "branch_pool"),
        )
        x = jnp.concatenate(branches, axis=-1)

    block = "Mixed_7a"
    narrow = chain(x, block, "branch3x3_1")
    wide = chain(x, block, *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
    branches = (
        layer(narrow, f"{block}.branch3x3_2", stride=2, padding="VALID"),
        layer(wide, f"{block}.branch7x7x3_4", stride=2, padding="VALID"),
        max_pool(x, stride=2, padding="VALID"),
    )
    x = jnp.concatenate(branches, axis=-1)  # B 8 8 1280

    for block, pool in (
        ("Mixed_7b", _average),
        ("Mixed_7c", lambda x: max_pool(x, stride=1, padding="SAME")),
    ):
        short = chain(x, block, "branch3x3_1")
        long = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        branches = (
            chain(x, block, "branch1x1"),
            *(chain(short, block, f"branch3x3_2{half}") for half in "ab"),
            *(chain(long, block, f"branch3x3dbl_3{half}") for half in "ab"),
            chain(pool(x), block, "branch_pool"),
        )
        x = jnp.concatenate(branches, axis=-1)  # B 8 8 2048

    features = x.mean(axis=(1, 2))
    return features, jnp.dot(features, params["fc"]["kernel"], precision=jax.lax.Precision.HIGHEST)


def resize(x: Float[Array, "B H W C"]) -> Float[Array, "B R R C"]:
    """Resizes to 299 px as the graph of 2015 does: bilinear, output i at input i * H / 299.

    This is TensorFlow 1's ResizeBilinear without aligned corners: neither half-pixel centres nor
    antialiasing, so larger images are to be reduced with antialiasing before.
    """
    rows, columns = (jnp.asarray(_bilinear(n)) for n in x.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("rh,bhwc,sw->brsc", rows, x, columns, precision=exact)


def _bilinear(n: int) -> np.ndarray:
    """Weights [299, n]."""
    at = np.arange(SIDE, dtype=np.float32) * np.float32(n / SIDE)
    left = at.astype(int)
    right = np.minimum(left + 1, n - 1)
    matrix = np.zeros((SIDE, n), np.float32)
    np.add.at(matrix, (np.arange(SIDE), left), 1 - (at - left))
    np.add.at(matrix, (np.arange(SIDE), right), at - left)
    return matrix


def _average(x):
    """The mean of each 3x3 pixels, of those only that there are."""
    total, count = (
        jax.lax.reduce_window(v, 0.0, jax.lax.add, _WINDOW, (1, 1, 1, 1), "SAME")
        for v in (x, jnp.ones((1, *x.shape[1:3], 1)))
    )
    return total / count
