#!/bin/sh
# Every check of `make check`; all of them run, and the exit status is 0 only if all passed.
set -u
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
status=0

echo "ruff format" && ruff format --check --quiet . || { echo "  run .venv/bin/ruff format"; status=1; }
echo "ruff check" && ruff check --quiet . || status=1
echo "ruff check, what values may import" && ruff check --quiet --config bench/values.ruff.toml bench/smbench || status=1
echo "Dockerfiles are what is rendered" && python -m smbench.images dockerfiles --check || status=1
# its wheels are for few machines, and the lint is the same on all
if command -v hadolint >/dev/null; then
    echo "hadolint" && hadolint docker/*.Dockerfile || status=1
else
    echo "hadolint: no build of it for this machine, Dockerfiles are not linted"
fi
echo "mypy" && mypy --no-error-summary || status=1
exit $status
