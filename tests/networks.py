"""Weights and pictures for the tests of feature networks, the same on every machine."""

import json
import zlib
from pathlib import Path

import numpy as np

SHAPES = Path(__file__).parent / "golden" / "inception_shapes.json"


def inception_state():
    """A state dict of the network of FID with random weights that keep the signal's size."""
    state = {}

    def draw(name, shape, middle, spread):
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = rng.standard_normal(shape, np.float32)
        state[name] = np.asarray(middle + spread * noise, np.float32)

    for name, shape in json.loads(SHAPES.read_text()).items():
        draw(f"{name}.conv.weight", shape, 0, (2 / np.prod(shape[1:])) ** 0.5)
        draw(f"{name}.bn.weight", shape[0], 1, 0.1)
        draw(f"{name}.bn.bias", shape[0], 0, 0.1)
        draw(f"{name}.bn.running_mean", shape[0], 0, 0.1)
        draw(f"{name}.bn.running_var", shape[0], 1, 0.1)
        state[f"{name}.bn.num_batches_tracked"] = np.asarray(0)
    draw("fc.weight", (1008, 2048), 0, 1 / 45)
    draw("fc.bias", 1008, 0, 1)
    return state


def pictures(px):
    """Two pictures: ramps of colour, and noise."""
    ramp = np.arange(px) * 255 // px
    ramps = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, (px, px, 3))
    return np.stack([ramps, noise]).astype(np.uint8)
