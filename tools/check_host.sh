#!/usr/bin/env bash
# What `make` needs before it makes a virtual environment. What is missing is one line and exit status 1.
#   tools/check_host.sh PYTHON FOLDER [uv]    FOLDER will be the environment; with uv, Python's module venv is not needed
set -euo pipefail
python=$1
folder=$2
maker=${3:-venv}
needed_gib=${MEDLLM_NEEDED_GIB:-4} # torch for CPUs and the rest unpack to 3 GiB

refuse() {
  echo "error: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || refuse "$python is not installed; name a Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 demo"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || refuse "$python does not start"
case $version in
  3.11 | 3.12 | 3.13) ;;
  *) refuse "$python is Python $version, 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.12 demo" ;;
esac
if [ "$maker" != uv ] && ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  refuse "$python lacks the module venv; on Debian and Ubuntu: apt install python$version-venv"
fi
place=$(dirname "$folder")
if ! mkdir -p "$place" 2>/dev/null || [ ! -w "$place" ]; then refuse "$place is not writable"; fi
free_gib=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free_gib" -ge "$needed_gib" ] ||
  refuse "$place has $free_gib GiB free, $needed_gib are needed (12 with torch's CUDA build); another place: make VENV=/elsewhere/venv demo"
