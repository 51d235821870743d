#!/usr/bin/env bash
# The ten-minute run of one GPU; see tools/gpu_session/session.py. PYTHON (default python3) has the requirements.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_session/session.py" "$@"
