#!/bin/bash
# Trains on all GPUs of one host: one process sees them all, so nothing has to be joined.
# WORKDIR=runs/first experiments/launch/gpu_host.sh --config.sparsity=0.95
set -euo pipefail
cd "$(dirname "$0")/../.."
test -x .venv/bin/python || make env
.venv/bin/python -c 'import jax; jax.devices("cuda")' 2>/dev/null ||
  .venv/bin/pip install -q -c constraints.txt 'jax[cuda12]'
exec .venv/bin/python -m experiments.train --config=experiments/configs/cifar10_resnet20.py \
  --config.parallel=pmap --config.batch_size=128 --workdir="${WORKDIR:-runs/gpu}" "$@"
