#!/bin/sh
# One machine of a job on several machines. Run it on each, with its number from 0 and the same other arguments:
#
#     launch/node.sh 0 2 host-a --config my.toml      # on host-a
#     launch/node.sh 1 2 host-a --config my.toml      # on host-b
#
# It resumes from the newest checkpoint, and restarts with the others when a rank, a machine or the network fails.
# PET_MASTER_PORT (29500) and PET_NPROC_PER_NODE (one rank a GPU; the same on all) are used if set. Exit codes are those of
# lmdist-train.
#
# The machines need, under the same names relative to the current folder:
#   lmdist and the recipe    of the same version
#   the data folder          shared, or a copy on each machine; shared if the job prepares it
#   the run folder           shared: machine 0 writes it, and all machines read the checkpoint that they resume from
set -eu

usage="usage: launch/node.sh NODE_RANK NNODES MASTER_ADDR [flags of lmdist-train]"

wrong() {
    printf 'launch/node.sh: error: %s\n%s\n' "$1" "$usage" >&2
    exit 64
}

case ${1-} in -h | --help) echo "$usage" && exit ;; esac
[ $# -ge 3 ] || wrong "$# arguments are given, at least three expected"
{ [ "$1" -ge 0 ] && [ "$1" -lt "$2" ]; } 2>/dev/null || wrong "machine $1 of $2: a number from 0 below the second is expected"
case $3 in '' | -*) wrong "'$3' is given where the name or address of machine 0 is expected" ;; esac
rank=$1 nodes=$2 master=$3
shift 3

# A shell started by ssh has no activated environment, so the one that `make` creates is searched last.
PATH="$PATH:$(dirname "$0")/../.venv/bin"
exec lmdist-train --nnodes "$nodes" --node-rank "$rank" --master-addr "$master" --restarts 20 --resume auto "$@"
