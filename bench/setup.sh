#!/bin/sh
# Makes .venv what it has to be, in milliseconds where it already is. Finds a Python; setup_venv.py does the work.
set -eu
cd "$(dirname "$0")/.."

# -E -s -S: nothing of site or the user's environment is needed to compare a stamp, and both cost time
if [ -x .venv/bin/python ] && .venv/bin/python -E -s -S -B bench/setup_venv.py --fresh; then
    exit 0
fi
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" -B bench/setup_venv.py
    fi
done
echo "smbench: ${PYTHON:-python3} is not Python 3.11 or newer; install one (Debian, Ubuntu:" \
    "apt-get install python3 python3-venv) or name it with PYTHON=/path/to/python" >&2
exit 2
