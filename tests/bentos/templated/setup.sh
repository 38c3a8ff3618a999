#!/usr/bin/env bash
set -eu
ls src > /opt/seen
