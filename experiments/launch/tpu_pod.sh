#!/bin/bash
# Trains on all workers of a Cloud TPU slice: creates it, installs, and runs the same command on each host.
# Edit the names. Run it again to go on after a preemption.
#
# The work directory must be shared by all hosts: a Filestore (NFS) share, or a bucket with a hierarchical
# namespace mounted by Cloud Storage FUSE, where the renaming of a directory is atomic, as in checkpoints.
set -euo pipefail

NAME=${NAME:-jaxsparse}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}             # 16 chips on 4 hosts
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite}
REPOSITORY=${REPOSITORY:?the address to clone the project from}
SHARE=${SHARE:?host:/share of the NFS server, mounted at /mnt/shared}
CONFIG=${CONFIG:-experiments/configs/imagenet_resnet50.py}

on_all() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"; }

gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" >/dev/null 2>&1 ||
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" --accelerator-type="$TYPE" --version="$IMAGE" --spot

on_all "sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/shared &&
  (mountpoint -q /mnt/shared || sudo mount -t nfs $SHARE /mnt/shared) &&
  (test -d jaxsparse || git clone -q $REPOSITORY jaxsparse) &&
  cd jaxsparse && (test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh) &&
  ~/.local/bin/uv venv -q --allow-existing --python 3.12 .venv &&
  ~/.local/bin/uv pip install -q -c constraints.txt -e '.[train,tpu]'"

# --distributed: JAX asks the TPU runtime who the other hosts are. A host that was left over from a run
# before holds its chips: end it first.
on_all "pkill -u \$USER -f '[e]xperiments.train'; cd jaxsparse &&
  exec .venv/bin/python -m experiments.train --distributed --config=$CONFIG \
    --config.parallel=fsdp --config.data_dir=/mnt/shared/tfds --workdir=/mnt/shared/runs/$NAME $*"
