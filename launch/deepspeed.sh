#!/usr/bin/env bash
# One run on several nodes with DeepSpeed's launcher; start it on the first node, which reaches the others by ssh:
#   HOSTFILE=hosts launch/deepspeed.sh run.yaml [section.key=value …]
# (pdsh does that; it passes PYTHON* and the accelerator's variables on, and what a file .deepspeed_env lists as NAME=value)
# Without ssh between the nodes, start it on every node, with its number in the hostfile:
#   HOSTFILE=hosts NODE_RANK=0 HEAD=node0 launch/deepspeed.sh run.yaml [section.key=value …]
# A line of the hostfile: `node0 slots=8`. ZeRO-3, unless an argument says sharding.backend=zero1 or zero2.
set -euo pipefail
: "${HOSTFILE:=hosts}" "${NODE_RANK:=}" "${HEAD:=}" "${PORT:=29500}"
# deepspeed itself would go on alone, on this node.
[ -f "$HOSTFILE" ] || { echo "HOSTFILE: expected a file with a line a node, found no $HOSTFILE" >&2; exit 2; }
if [ -n "$NODE_RANK" ] && [ -z "$HEAD" ] && [ "$(grep -c 'slots=' "$HOSTFILE")" -gt 1 ]; then
  echo "HEAD: expected the first node's name with NODE_RANK and several nodes in $HOSTFILE, found nothing" >&2
  exit 2
fi
config=$1
shift
alone=()
if [ -n "$NODE_RANK" ]; then
  alone=(--no_ssh --node_rank "$NODE_RANK" --master_addr "${HEAD:-localhost}")
fi
command=(deepspeed --hostfile "$HOSTFILE" --master_port "$PORT" "${alone[@]}" --module digrap_scale train "$config" sharding.backend=zero3 "$@")
if [ -z "$NODE_RANK" ]; then
  exec "${command[@]}"
fi
# deepspeed passes SIGTERM on to nobody, and its launch.py, which does, kills after 30 s. So this node's ranks, the children of
# launch.py, are asked themselves: they save and leave, and the launcher after them.
"${command[@]}" &
runner=$!
asked=
# shellcheck disable=SC2317 # the trap calls it
ask() {
  if pkill -TERM -P "$(pgrep -d , -P "$runner")" 2> /dev/null; then
    asked=yes
  elif [ -z "$asked" ]; then # there are no ranks yet
    pkill -TERM -P "$runner" || true
    kill -TERM "$runner" || true
  fi
}
trap ask TERM
status=0
wait "$runner" || status=$?
while kill -0 "$runner" 2>/dev/null; do
  status=0
  wait "$runner" || status=$?
done
exit "$status"
