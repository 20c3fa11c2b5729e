#!/usr/bin/env bash
# Set up and run the tests in two processes of one thread each: bash scripts/test.sh [pytest arguments]
set -euo pipefail
extras=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if command -v npm >/dev/null && [ ! -d .venv/node/node_modules/gltf-validator ]; then  # Khronos' own check of what we write
  npm install --silent --no-audit --no-fund --prefix .venv/node gltf-validator@2.0.0-dev.3.10 || echo "gltf-validator could not be installed: its tests are skipped" >&2
fi
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 "$@"
