#!/usr/bin/env bash
# All that is to be measured where there is an NVIDIA GPU, in one go:
#
#   pip install -e '.[cuda,test]' && benchmarks/gpu.sh | tee gpu.log
#
# torch has to be a build for CUDA. First that numbers are right (the parity ladder, on the GPU), then
# the forward pass and the training step in bfloat16 beside torch, as fractions of the matrix peak.
set -euo pipefail
cd "$(dirname "$0")/.."

python -c 'import jax; assert jax.default_backend() == "gpu", "jax finds no GPU: pip install jax[cuda12]"'
python -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU: install a CUDA build"'
export XLA_PYTHON_CLIENT_PREALLOCATE=false # torch needs memory, too

JAX_PLATFORMS=cuda XLA_FLAGS='' python -m pytest -q -p no:cacheprovider tests/model tests/test_embedder.py
python benchmarks/forward.py --dtype bfloat16 --layers 12 --length 2048 --rows 8
python benchmarks/train_step.py --dtype bfloat16 --layers 12 --width 1536 --pairs 1024 \
    --mini-batch 256 --longest 450 --vocab-size 151936
python benchmarks/compile_time.py
