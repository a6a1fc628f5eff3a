"""Writes codes.json: what the shipped models sample; run with tests on the path.

Only captions whose codes stay the same when every weight is moved by a millionth of itself are
taken. Another machine's rounding moves logits about as much, so it samples the same codes: without
that, one code of two nearly equal ones would change all that are sampled after it.
"""

import json
from pathlib import Path

import jax
import numpy as np
import shipped

import dalle_jax
from dalle_jax.generate import model_folder

CAPTIONS = 3  # for each model and prior
MOVED = (1e-6, -1e-6, 4e-6)


def moved(params, share):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(x) * (1 + share * rng.standard_normal(x.shape)).astype(x.dtype), params
    )


def golden(model, captions):
    found = {}
    for part, (_, params) in model.priors.items():
        grids = shipped.sampled(model, part, captions)
        steady = np.ones(len(captions), bool)
        for share in MOVED:
            others = shipped.sampled(model, part, captions, params=moved(params, share))
            steady &= (grids == others).all((1, 2))
        print(model.name, part, f"{steady.sum()} of {len(steady)} captions are steady")
        chosen = np.flatnonzero(steady)[:CAPTIONS]
        entry = {"captions": [captions[i] for i in chosen], "codes": grids[chosen].tolist()}
        entry["tiles"] = np.rint(shipped.tiles(model, grids[chosen])).astype(int).tolist()
        if model.clip is not None:
            scores = shipped.scores(model, entry["captions"], grids[chosen])
            entry["scores"] = scores.round(4).tolist()
        found[part] = entry
    return {"priors": found, "encoded": shipped.encoded(model).tolist()}


if __name__ == "__main__":
    written = {}
    for name in model_folder.shipped_models():
        captions = (model_folder.SHIPPED / name / model_folder.CAPTIONS).read_text(encoding="utf-8")
        written[name] = golden(dalle_jax.load(name), captions.splitlines()[:12])
    text = json.dumps(written, separators=(",", ":")).replace("]],", "]],\n")
    (Path(__file__).parent / "codes.json").write_text(text + "\n")
