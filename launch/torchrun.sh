#!/usr/bin/env bash
# One run on several nodes with torchrun; start it on every node:
#   NODES=2 HEAD=node0 launch/torchrun.sh run.yaml [section.key=value …]
# RESTARTS=3 starts the processes again, up to so many times, when one of them is lost: they go on from the last checkpoint.
set -euo pipefail
: "${NODES:=1}" "${PROCESSES_PER_NODE:=gpu}" "${HEAD:=}" "${PORT:=29500}" "${RESTARTS:=0}"
if [ "$NODES" != 1 ] && [ -z "$HEAD" ]; then
  echo "HEAD: expected the first node's name with NODES=$NODES, found nothing" >&2
  exit 2
fi
# A store of its own for every start: in one that is kept, a rank may find the address of a process that is gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Asked to stop (SIGTERM), torchrun passes it on, and kills after so many seconds what has not saved and left by then.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES_PER_NODE" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:$PORT" -m digrap_scale train "$@"
