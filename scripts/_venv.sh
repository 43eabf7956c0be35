# Sourced by the scripts beside it: makes .venv in the repository, once, and again when pyproject.toml changes.
# torch comes first, pinned: left to the dependencies of others, pip takes the newest build with gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed
if ! cmp -s pyproject.toml "$stamp"; then
    echo "setting up .venv (once)" >&2
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/pip install --quiet "${TORCH:-torch==2.13.0}"
    .venv/bin/pip install --quiet --editable '.[parity,test]'
    cp pyproject.toml "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
