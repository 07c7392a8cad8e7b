#!/bin/sh
# Runs a command with passwords from files: for every NAME_FILE below NAME is what the file holds.
# So they are in no compose file, no image, no address and no command line.
set -eu
for name in PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_TRACKING_PASSWORD; do
  eval "file=\${${name}_FILE:-}"
  [ -n "$file" ] || continue
  if ! [ -f "$file" ] || ! [ -r "$file" ] || ! [ -s "$file" ]; then
    echo "${name}_FILE: expected a file with a password, got $file; docker/prepare.sh makes one" >&2
    exit 1
  fi
  value=$(cat "$file")
  export "$name=$value"
done
exec "$@"
