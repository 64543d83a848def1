#!/usr/bin/env bash
# One run on several nodes with DeepSpeed's launcher; start it on the first node, which reaches the others by ssh:
#   HOSTFILE=hosts launch/deepspeed.sh run.yaml [section.key=value …]
# A line of the hostfile: `node0 slots=8`. ZeRO-3, unless an argument says sharding.backend=zero1 or zero2.
set -euo pipefail
: "${HOSTFILE:=hosts}"
config=$1
shift
exec deepspeed --hostfile "$HOSTFILE" --module digrap_scale train "$config" sharding.backend=zero3 "$@"
