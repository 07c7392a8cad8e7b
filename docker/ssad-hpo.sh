#!/bin/sh
# The command line; a sweep goes to the cluster at RAY_HEAD, its study into the database at STUDIES.
set -eu
[ "${1:-}" = sweep ] || exec ssad-hpo "$@"
shift

# A process that drives Ray has to be on a node of the cluster. This one runs no trial and ends with the sweep.
log=$(mktemp)
PYTHONUNBUFFERED=1 ray start --block --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0 \
  --object-store-memory=1500000000 >"$log" 2>&1 &
node=$!
trap 'kill "$node" 2>/dev/null || :; wait "$node" || :; rm -f "$log"' EXIT
trap : INT # Ctrl-C is for the sweep, which then says how to go on
until grep -q 'Ray runtime started' "$log"; do
  kill -0 "$node" 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.2
done

export SSAD_HPO_STORAGE="$STUDIES" # of a new run, and of one that goes on: it has kept no user
ssad-hpo sweep --address="$RAY_HEAD" "$@"
