#!/usr/bin/env bash
# Train on several machines: run this on each of them, with the same arguments and another NODE_RANK.
# Data and run folder lie on a file system that all of them see.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host-a launch/node.sh --config my.toml     # on host-a
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=host-a launch/node.sh --config my.toml     # on host-b
set -euo pipefail

: "${NNODES:?number of machines}" "${NODE_RANK:?number of this machine, from 0}" "${MASTER_ADDR:?name or address of machine 0}"
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
threads=$(($(getconf _NPROCESSORS_ONLN) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}  # the ranks share the cores out
export THP_MEM_ALLOC_ENABLE=1  # huge pages for torch's tensors: up to a third faster on a CPU
exec torchrun --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$ranks" \
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" -m lmdist.train "$@"
