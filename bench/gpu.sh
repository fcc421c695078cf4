#!/usr/bin/env bash
# Everything that needs a GPU, in at most 480 s on one: bash bench/gpu.sh [FOLDER]
# Writes gpu.md (the table), gpu.json and gpu.log there; a row is printed as soon as it is known.
# Needs torch, torchvision, accelerate, safetensors, rich, numpy, pyyaml; CIFAR-10 where it is named
# (its parquet files need pyarrow and Pillow too, a file of `python -m data prepare` does not):
#   CIFAR10_DIR=.cifar10 bash bench/gpu.sh
# REHEARSE=1 runs the code of every row on a CPU, in small. bench/gpu.py --rows takes some of them.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m bench.gpu "${1:-bench/results/gpu}" ${REHEARSE:+--rehearse}
