#!/usr/bin/env bash
# One run on several nodes with torchrun; start it on every node:
#   NODES=2 HEAD=node0 launch/torchrun.sh run.yaml [section.key=value …]
set -euo pipefail
: "${NODES:=1}" "${PROCESSES_PER_NODE:=gpu}" "${HEAD:=localhost}" "${PORT:=29500}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES_PER_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" -m digrap_scale train "$@"
