"""Writes a published size with random weights, in others' layout, to measure what importing takes.

python tests/parity/full_size.py {openai-dvae,taming-vqgan,small} OUT.ckpt
"""

import sys
from pathlib import Path

import recipe

from dalle_jax.models.dvae import DVAEConfig
from dalle_jax.models.vqgan import VQGANConfig
from dalle_jax.weights import sources
from dalle_jax.weights.export import write_codec

CONFIGS = {
    "openai-dvae": ("openai-dvae", DVAEConfig()),
    "taming-vqgan": ("taming-vqgan", VQGANConfig(codes=16384)),
    "small": ("openai-dvae", DVAEConfig(width=16, blocks_per_group=1, codes=64, code_width=16)),
}

if __name__ == "__main__":
    layout, config = CONFIGS[sys.argv[1]]
    shapes = sources.shapes(config)
    arrays = {name: recipe.weights(name, shape) for name, shape in shapes.items()}
    print(*write_codec(layout, config, arrays, Path(sys.argv[2])))
