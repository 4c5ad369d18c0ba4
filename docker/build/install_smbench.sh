#!/bin/sh
# Installs smbench's wheel: into the command line's environment, and once for each stack named, whose own environment is
# laid over it later. Needs no network.
set -eu

install() {
    /opt/build/bin/python -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
        --root-user-action ignore "$@" /dist/smbench-*.whl
}

/opt/build/bin/python -m pip --python /opt/smbench/venv/bin/python install --quiet --no-index --no-deps --no-compile \
    --disable-pip-version-check --root-user-action ignore /dist/smbench-*.whl
ln -s /opt/smbench/venv/bin/smbench /usr/local/bin/smbench
for stack in "$@"; do
    install --prefix "/opt/smbench/ours/$stack"
    # the command line needs more than a stack has
    rm -r "/opt/smbench/ours/$stack/bin"
done
python3 -m compileall -qq -f --invalidation-mode unchecked-hash /opt/smbench/venv/lib/python3*/site-packages/smbench* /opt/smbench/ours
