"""Makes clip.npz: a small random CLIP of the package transformers, and what it gives.

python tests/golden/make_clip.py (with torch and transformers, which the project does not need)
"""

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

SIZES = {"num_hidden_layers": 2, "hidden_act": "quick_gelu"}
TEXT = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 22}
TEXT |= {"max_position_embeddings": 6, "eos_token_id": 21, "bos_token_id": 20}
VISION = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 48}
VISION |= {"image_size": 8, "patch_size": 4}
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

torch.manual_seed(0)
config = CLIPConfig(text_config=TEXT | SIZES, vision_config=VISION | SIZES, projection_dim=6)
model = CLIPModel(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.4)

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
text = np.array([[3, 19, 0, 7], [5, 21, 22, 23], [20, 21, 22, 23]], np.int32)  # 20 on: no token
ids = np.full((3, 6), 21)
ids[:, 0] = 20
ids[0, 1:5] = text[0]
ids[1, 1] = 5
pixels = ((images / 255 - MEAN) / SPREAD).transpose(0, 3, 1, 2)
with torch.no_grad():
    given = model(
        input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels, dtype=torch.float32)
    )
weights = {k: v.numpy() for k, v in model.state_dict().items() if not k.endswith("position_ids")}
np.savez_compressed(
    Path(__file__).with_name("clip.npz"),
    images=images,
    text=text,
    image_features=given.image_embeds.numpy(),
    text_features=given.text_embeds.numpy(),
    **weights,
)
