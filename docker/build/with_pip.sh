#!/bin/sh
# Runs a command in which pip is configured as on the machine that builds. Build secrets it takes where they are given:
# pip_conf (a pip.conf) and ca_bundle (certificates to trust). They exist while the command runs, in no layer.
set -eu

if [ -e /media/pip_conf ]; then
    PIP_CONFIG_FILE=/media/pip_conf
    export PIP_CONFIG_FILE
fi
if [ -e /media/ca_bundle ]; then
    PIP_CERT=/media/ca_bundle
    export PIP_CERT
fi
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
exec "$@"
