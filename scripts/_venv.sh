# Sourced by the scripts beside it: makes .venv in the repository, once, and again when what it is made of changes.
# torch comes first, pinned: left to the dependencies of others, pip takes the newest. On Linux PyPI's build has gigabytes of
# CUDA; TORCH=torch==2.13.0+cpu with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the one for CPUs.
# Everything else is constrained to the newest versions that were run (scripts/matrix renews them), so that a new release
# of somebody else's breaks nothing on the day it appears. CONSTRAINTS= (empty) takes the newest there are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
constraints="${CONSTRAINTS-scripts/constraints.txt}"
torch="${TORCH:-torch==2.13.0}"
wanted="$(cat pyproject.toml $constraints; echo "${PYTHON:-python3} $torch")"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (once)" >&2
    "${PYTHON:-python3}" -m venv --clear .venv
    .venv/bin/pip install --quiet "$torch"
    .venv/bin/pip install --quiet ${constraints:+--constraint "$constraints"} --editable '.[parity,test]'
    echo "$wanted" > .venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
