#!/bin/sh
# Compiles our kernels for the image's arch, so that nobody rents a card to wait for a compiler: bake.sh ARCH STACK...
# What a stack ships goes to /opt/smbench/baked/STACK, laid over its environment later. A stack that no recipe runs our
# kernels in ships none.
set -eu

arch=$1
shift
mkdir -p /opt/smbench/baked
for stack in "$@"; do
    list=$(mktemp)
    python -m smbench.baking --arch "$arch" --stack "$stack" > "$list"
    if ! grep -q '"points": {}' "$list"; then
        "/opt/smbench/stacks/$stack/bin/python" -m smbench.worker.bake "$list" \
            --output "/opt/smbench/baked/$stack/share/smbench/triton"
    fi
    rm "$list"
done
