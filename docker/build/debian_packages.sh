#!/bin/sh
# Installs Debian packages into an image: no recommendations, and nothing left of lists, logs or caches, which differ from
# build to build. Build secrets it takes where they are given: apt_conf (configuration, such as a proxy), apt_sources.
set -eu

sources=
if [ -e /media/apt_conf ]; then
    APT_CONFIG=/media/apt_conf
    export APT_CONFIG
fi
if [ -e /media/apt_sources ]; then
    sources='-o Dir::Etc::SourceList=/media/apt_sources -o Dir::Etc::SourceParts=-'
fi
# shellcheck disable=SC2086
apt-get $sources --quiet update
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get $sources --quiet install --yes --no-install-recommends "$@"
find /var/lib/apt/lists /var/cache/apt /var/cache/debconf /var/cache/ldconfig /var/log -type f -delete
rm -f /var/lib/dpkg/*-old /etc/*-
