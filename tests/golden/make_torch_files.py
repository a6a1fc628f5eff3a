"""Writes torch_zip.pt and torch_older.pt beside this file; needs PyTorch."""

import collections
from pathlib import Path

import torch

base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
state = collections.OrderedDict(
    whole=base,
    turned=base[1].T,
    part=base[:, 1:, ::2],
    half=base.half(),
    brain=base.bfloat16(),
    count=torch.tensor(7),
    yes=torch.tensor([True, False]),
    none=torch.zeros(0, 3),
    parameter=torch.nn.Parameter(base[0, 0].clone()),
)
state._metadata = {"version": 1}
tree = {"state_dict": state, "epoch": 3, "names": ["a", ("b", None)], "rate": 0.5}
folder = Path(__file__).parent
torch.save(tree, folder / "torch_zip.pt")
torch.save(tree, folder / "torch_older.pt", _use_new_zipfile_serialization=False)
