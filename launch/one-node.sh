#!/usr/bin/env bash
# Train on this machine: one rank a GPU, or two on the CPU.
#
#     launch/one-node.sh --config launch/demo.toml
#     RANKS=4 launch/one-node.sh --config my.toml --resume auto
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
export THP_MEM_ALLOC_ENABLE=1  # huge pages for torch's tensors: up to a third faster on a CPU
exec torchrun --standalone --nproc_per_node="$ranks" -m lmdist.train "$@"
