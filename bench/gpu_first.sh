#!/usr/bin/env bash
# The first minutes on a GPU, from a bare checkout, with whatever Python and packages the machine has:
#
#   bench/gpu_first.sh tests      the GPU tests
#   bench/gpu_first.sh layers     twelve 3x3 shapes beside fused cuDNN, untuned, then tuned for three minutes
#   bench/gpu_first.sh networks   VGG16 and ResNet50, whole
#   bench/gpu_first.sh counters   what Nsight Compute says of three kernels, if it is there
#
# Each part ends within nine minutes, leaves one archive and one log in the folder of --out, and prints a short
# table last; without a name all of them run. See --help for the rest.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels:bench
exec "${PYTHON:-python3}" -m lhc_bench.reports.gpu_first "$@"
