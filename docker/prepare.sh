#!/bin/sh
# prepare.sh IMAGES: makes the secrets, and a .env that names them and the folder IMAGES. What is there
# already stays, for the databases keep the passwords that they first saw.
set -eu
[ $# -eq 1 ] && [ -d "$1" ] || { echo "usage: $0 IMAGES, the folder with your images" >&2; exit 2; }
images=$(cd "$1" && pwd)
cd "$(dirname "$0")"

umask 077
mkdir -p secrets
chmod 700 secrets
for name in ray_token postgres_password mlflow_database_password optuna_database_password mlflow_password \
  mlflow_secret_key; do
  [ -s "secrets/$name" ] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"secrets/$name"
done
# Containers have users of their own, who must read the files; on this machine the folder shuts others out.
chmod 644 secrets/*

[ -e .env ] || printf "SSAD_HPO_SECRETS=./secrets\nSSAD_HPO_DATA='%s'\n" "$images" >.env
echo "docker/secrets and docker/.env are there; docker/.env.example tells what else can be set."
