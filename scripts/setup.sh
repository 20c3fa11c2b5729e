# Sourced by quickstart.sh and test.sh: enters the checkout, makes .venv where there is none, installs into it.
# Usage: extras=dev; . scripts/setup.sh   (a variable: a sourced file without arguments sees its caller's)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  python=$(command -v python3 || command -v python || true)
  [ -n "$python" ] && "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or newer is needed; found ${python:-none}" >&2
    exit 1
  }
  "$python" -m venv .venv
fi
stamp=.venv/.installed-${extras:-run}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing into .venv (once; a few minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
  touch "$stamp"
fi
