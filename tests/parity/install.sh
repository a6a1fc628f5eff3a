#!/usr/bin/env bash
# Builds the environment of the parity checks: others' code, with PyTorch. Usage: install.sh FOLDER
# About 1.5 GB with a CPU build of PyTorch; what is there already is kept.
set -euo pipefail
folder=$1; here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$folder"

checkout() {  # NAME ADDRESS COMMIT: networks that no package holds; their Python alone, without pictures
  [ -d "$folder/$1" ] && return
  rm -rf "$folder/$1.part"
  git clone -q --filter=blob:none --no-checkout "$2" "$folder/$1.part"
  git -C "$folder/$1.part" sparse-checkout set --no-cone '*.py'
  git -C "$folder/$1.part" -c advice.detachedHead=false checkout -q "$3"
  mv "$folder/$1.part" "$folder/$1"  # a download that was cut is not taken for a whole one
}
checkout LlamaGen https://github.com/FoundationVision/LlamaGen ce98ec41803a74a90ce68c40ababa9eaeffeb4ec
checkout 1d-tokenizer https://github.com/bytedance/1d-tokenizer 942a96fbdd873780179d1b78d5462911528bf8c8
checkout vqgan-jax https://github.com/patil-suraj/vqgan-jax 10ef240f8ace869e437f3c32d14898f61512db12
checkout dalle-mini https://github.com/borisdayma/dalle-mini f0be4de610285a002052024a1e096126f9452cc4
checkout minDALL-E https://github.com/kakaobrain/minDALL-E e5480076b9634e9dc097e1892157ed2cf15a2f86
checkout CLIP https://github.com/openai/CLIP d05afc436d78f1c48dc0dbf8e5980a9d471f35f6

# the last transformers with flax, beside our own JAX
[ -d "$folder/flax/transformers" ] || "${PYTHON:-python3}" -m pip install -qq --no-deps --target "$folder/flax" \
  transformers==4.40.2 tokenizers==0.19.1 huggingface_hub==0.23.4 einops==0.8.0 filelock fsspec tqdm \
  requests packaging pyyaml regex urllib3 idna typing_extensions

ready() {
  [ -x "$folder/venv/bin/python" ] && (cd "$here" && "$folder/venv/bin/python" -W ignore -c \
    "import shims, dall_e, taming.models.vqgan, transformers, ftfy, pywt, youtokentome" 2>/dev/null)
}
if ! ready; then
  [ -x "$folder/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/venv"
  pip() { "$folder/venv/bin/python" -m pip -qq --disable-pip-version-check "$@"; }
  pip install torch==2.13.0 numpy pillow attrs requests einops ftfy regex packaging tqdm omegaconf \
    "transformers==5.23.0" safetensors lightning-utilities torchmetrics pyyaml fsspec \
    "setuptools<81"
  pip install --no-deps torchvision==0.28.0 dall-e==0.1 taming-transformers-rom1504==0.0.6 \
    pytorch-lightning==2.6.6 rudalle==1.1.3 PyWavelets==1.9.0 "Cython<3" wheel click
  pip install --no-deps --no-build-isolation youtokentome==1.0.6  # built here; needs a C++ compiler
  ready
fi
