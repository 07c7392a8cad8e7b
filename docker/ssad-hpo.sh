#!/bin/sh
# The command line; a sweep goes to the cluster at RAY_HEAD, its study into the database at STUDIES, whose password
# no run folder keeps.
set -eu
case "${1:-}" in
  search | tune | demo) ;; # their studies lie in the run folder
  *) SSAD_HPO_STORAGE=${STUDIES:-} && export SSAD_HPO_STORAGE ;; # of a sweep, and of what reads its run
esac
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

ssad-hpo sweep --address="$RAY_HEAD" "$@"
