#!/usr/bin/env bash
# One run on several nodes with DeepSpeed's launcher; start it on the first node, which reaches the others by ssh:
#   HOSTFILE=hosts launch/deepspeed.sh run.yaml [section.key=value …]
# (pdsh does that; it passes PYTHON* and the accelerator's variables on, and what a file .deepspeed_env lists as NAME=value)
# Without ssh between the nodes, start it on every node, with its number in the hostfile:
#   HOSTFILE=hosts NODE_RANK=0 HEAD=node0 launch/deepspeed.sh run.yaml [section.key=value …]
# A line of the hostfile: `node0 slots=8`. ZeRO-3, unless an argument says sharding.backend=zero1 or zero2.
set -euo pipefail
: "${HOSTFILE:=hosts}" "${NODE_RANK:=}" "${HEAD:=localhost}" "${PORT:=29500}"
config=$1
shift
alone=()
if [ -n "$NODE_RANK" ]; then
  alone=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$HEAD")
fi
exec deepspeed --hostfile "$HOSTFILE" --master_port "$PORT" "${alone[@]}" --module digrap_scale train "$config" sharding.backend=zero3 "$@"
