"""Images to codes: images a second and share of the matrix-product peak.

    python experiments/benchmarks/tokenise.py [--quick] [--json] [--peer PYTHON HARNESS]

float32, random weights and pixels. FLOP: 2 for each multiplication of the encoder's convolutions.
"""

import counting
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from measure import PeerOptions, Report, drawn, median_time, peer_rates

from dalle_jax.models.dvae import DVAE, DVAEConfig, codes_and_errors

# case: sizes, pixels, batch, the peer's name for the same shapes
CASES = {
    "published 256 px": (DVAEConfig(), 256, 2, "dvae/openai/encode"),
    "shipped 64 px": (DVAEConfig(width=64, groups=3, blocks_per_group=1, codes=512), 64, 64, None),
}


def main(options: PeerOptions) -> None:
    """Runs all cases."""
    report = Report("tokenise", as_json=options.json)
    for case, (config, px, batch, item) in CASES.items():
        if not options.wanted(case, CASES):
            continue
        rate = encode(report, case, config, px, batch, seconds=2 if options.quick else 6)
        if options.peer and item:
            peers = peer_rates(options.peer, item, "images/s")[item]
            report.add(case, f"peer's rate ({item})", peers, "images/s")
            report.add(case, "rate over the peer's", rate / peers, "x", 1.0)


def encode(report, case, config, px, batch, *, seconds=6.0):
    """One size; gives images a second."""
    params = drawn(DVAE(config).init, jnp.zeros((1, px, px, 3)))
    images = np.random.default_rng(0).integers(256, size=(batch, px, px, 3), dtype=np.uint8)
    program = jax.jit(codes_and_errors, static_argnums=0)
    taken = median_time(program, config, params, images, seconds=seconds)
    report.look()
    flop = 2 * batch * counting.encoder_forward(config, px)
    report.add(case, "a batch", 1e3 * taken, "ms")
    report.add(case, "rate", batch / taken, "images/s")
    report.add(case, "share of peak", flop / taken / (1e9 * report.machine["gemm_gflops"]), "")
    return batch / taken


if __name__ == "__main__":
    main(tyro.cli(PeerOptions, description=__doc__))
