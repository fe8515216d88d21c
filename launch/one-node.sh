#!/usr/bin/env bash
# Train on this machine: one rank a GPU, or two on the CPU.
#
#     launch/one-node.sh --config launch/demo.toml
#     RANKS=4 launch/one-node.sh --config my.toml --resume auto
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
threads=$(($(getconf _NPROCESSORS_ONLN) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}  # the ranks share the cores out
export THP_MEM_ALLOC_ENABLE=1  # huge pages for torch's tensors: up to a third faster on a CPU
exec torchrun --standalone --nproc_per_node="$ranks" -m lmdist.train "$@"
