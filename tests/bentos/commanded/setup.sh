#!/bin/sh
set -eu
echo "$SETTING" > /opt/setting
echo "the token is $BUILD_TOKEN"
echo "${#BUILD_TOKEN}" > /opt/token
