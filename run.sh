#!/usr/bin/env bash
# Finds or makes the environment, then hands over to `python -m stages`. See: bash run.sh stage=help
# Where Tiffin is installed (pip install .), `tiffin` says the same.
# PYTHON=/path/to/python chooses the interpreter. Paths in settings, and runs/, are relative to where you call it from.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # folders called stages or pipeline where you are do not hide ours (Python >= 3.11)

python=""
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    python="$candidate"
    break
  fi
  if [[ -n "${PYTHON:-}" ]]; then
    break
  fi
done
if [[ -z "$python" ]]; then
  echo "tiffin: ${PYTHON:-python3} is not Python 3.10 or newer; install one, or set PYTHON=/path/to/python" >&2
  exit 2
fi

extras=()
for word in "$@"; do
  if [[ "$word" == "stage=test" ]]; then
    extras=(dev)
  fi
done
python="$("$python" -m pipeline.launch.environment "${extras[@]+"${extras[@]}"}")"
exec "$python" -m stages "$@"
