"""Import before the peers: two repairs that let 2021-2022 packages load under torch 2.13 (CPU)."""

import contextlib
import sys

import torch

# 1. CPU torch next to the CUDA build of torchvision: declare the operators that its import expects.
_lib = None
if not torch.cuda.is_available():
    _lib = torch.library.Library("torchvision", "FRAGMENT")
    for _n in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # a matching torchvision has already defined it
            _lib.define(_n + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# 2. taming-transformers imports a module that pytorch-lightning has since moved.
try:
    import pytorch_lightning.utilities.rank_zero as _rz

    sys.modules.setdefault("pytorch_lightning.utilities.distributed", _rz)
except ImportError:
    pass
