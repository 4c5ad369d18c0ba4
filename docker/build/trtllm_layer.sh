#!/bin/sh
# Lays smbench on an image that has TensorRT-LLM in its own Python: the command line in an environment of its own, and
# the stack as an environment that sees that Python's packages. Nothing of the image is replaced.
set -eu

# NVIDIA's images hold pip to versions of their own, which is for their packages
unset PIP_CONSTRAINT
# now, before environments of ours can stand in the path before it
python=$(command -v python3)
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("tensorrt_llm") is None)' || {
    echo "smbench: the base image has no tensorrt_llm in its python3: BASE_IMAGE= names another image" >&2
    exit 1
}

# an environment without pip of its own; the image's pip installs into it
into() {
    environment=$1
    shift
    "$python" -m pip --python "$environment/bin/python" install --quiet --no-deps --no-compile "$@"
}

"$python" -m venv --without-pip /opt/smbench/venv
into /opt/smbench/venv --find-links /wheelhouse --only-binary :all: --require-hashes --requirement /mnt/smbench.txt
into /opt/smbench/venv --no-index /dist/smbench-*.whl
ln -s /opt/smbench/venv/bin/smbench /usr/local/bin/smbench

"$python" -m venv --without-pip --system-site-packages /opt/smbench/stacks/trtllm
into /opt/smbench/stacks/trtllm --no-index /dist/smbench-*.whl
# the command line needs more than the stack has
rm -f /opt/smbench/stacks/trtllm/bin/smbench
for package in numpy nvidia-ml-py psutil; do
    module=$(echo "$package" | sed 's/nvidia-ml-py/pynvml/')
    if ! /opt/smbench/stacks/trtllm/bin/python -c "import $module" 2>/dev/null; then
        # its lines of the lock: the name, then its hashes
        sed -n "/^$package==/,/^[^ ]/{/^$package==/p;/^ /p}" /mnt/smbench.txt > /tmp/package.txt
        into /opt/smbench/stacks/trtllm --find-links /wheelhouse --only-binary :all: --require-hashes \
            --requirement /tmp/package.txt
        rm /tmp/package.txt
    fi
done
install -d -m 1777 /cache /workspace
