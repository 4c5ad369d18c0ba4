#!/bin/sh
# Writes requirements.lock, every package of `make setup` but torch, for each Python from 3.11 on, with hashes; then the
# stacks' locks. No index is named in them, so that pip's own configuration decides where the packages come from.
set -eu
cd "$(dirname "$0")/.."

# uv is for maintainers only: kept beside .venv, not in it
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/uv uv
build/uv/bin/uv pip compile pyproject.toml --group dev --group build --group beside-torch \
    --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
    --output-file requirements.lock "$@"
echo "requirements.lock: $(grep -c == requirements.lock) packages"
.venv/bin/python -B bench/lock_stacks.py build/uv/bin/uv "$@"
