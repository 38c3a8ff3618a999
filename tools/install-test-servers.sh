#!/bin/sh
# Installs the real servers and tools that tests start by themselves, where they are missing and apt-get is there.
# The S3 server, the OCI registry, the OCI conformance suite, helm and the readers of lazy layers are Go programs, built once below ~/.cache/ekiben-tests where there is Go (1.26 or newer).
# With EKIBEN_TEST_KUBERNETES=1 also what a cluster of two nodes on this machine needs; its programs are built meanwhile, at
# a low priority (a quarter of an hour of two cores, once), and the tests that need them wait. No server is started. Tests that miss one are skipped with a reason that names the package.
set -eu
cd "$(dirname "$0")/.."
if command -v go >/dev/null 2>&1; then
    "${PYTHON:-python3}" -m tests.s3 >/dev/null
    "${PYTHON:-python3}" -m tests.oci_registry >/dev/null
    "${PYTHON:-python3}" -m tests.oci_conformance >/dev/null
    "${PYTHON:-python3}" -m tests.lazyread >/dev/null
    "${PYTHON:-python3}" -m tests.helm >/dev/null
fi
missing=""
need() { # need PROGRAM PACKAGE
    for found in $(command -v "$1" 2>/dev/null) /usr/lib/postgresql/*/bin/"$1"; do
        [ -x "$found" ] && return 0
    done
    missing="$missing $2"
}
need initdb postgresql
need promtool prometheus
need podman podman
need buildah buildah
need containerd containerd
need runc runc
need skopeo skopeo
need umoci umoci
need debootstrap debootstrap
if [ "${EKIBEN_TEST_KUBERNETES:-}" ]; then
    need conntrack conntrack
    need socat socat
    need ip iproute2
    need iptables iptables
    need kubectl kubernetes-client
    need gcc gcc
    need openssl openssl
    [ -x /usr/lib/cni/bridge ] || missing="$missing containernetworking-plugins"
    if command -v go >/dev/null 2>&1 && [ -x .venv/bin/python ]; then
        (nice -n 5 .venv/bin/python -m tests.cluster build; nice -n 5 .venv/bin/python -m tests.ingress_controller) \
            >/dev/null 2>"${TMPDIR:-/tmp}/ekiben-cluster-build.log" </dev/null &
    fi
fi
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "These are missing, and the tests that need them are skipped; install them with this system's package manager:$missing" >&2
    exit 0
fi
if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo"; else
    echo "These are missing, and the tests that need them are skipped; install them with: sudo apt-get install$missing" >&2
    exit 0
fi
echo "Installing$missing"
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
# shellcheck disable=SC2086
$sudo apt-get install -y -qq --no-install-recommends $missing >/dev/null
