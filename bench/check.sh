#!/bin/sh
# Every check of `make check`; all of them run, and the exit status is 0 only if all passed.
set -u
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
status=0

echo "ruff format" && ruff format --check --quiet . || { echo "  run .venv/bin/ruff format"; status=1; }
echo "ruff check" && ruff check --quiet . || status=1
echo "ruff check, what values may import" && ruff check --quiet --config bench/values.ruff.toml bench/smbench || status=1
echo "mypy" && mypy --no-error-summary || status=1
exit $status
