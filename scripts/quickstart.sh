#!/usr/bin/env bash
# Set up and turn a sentence into a mesh and a turntable: bash scripts/quickstart.sh "a red teapot" [more overrides]
set -euo pipefail
if [ $# -lt 1 ]; then
  echo 'usage: bash scripts/quickstart.sh "a red teapot" [key=value ...]' >&2
  exit 2
fi
extras=""
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python scripts/text_to_3d.py "prompt=$1" "${@:2}"
