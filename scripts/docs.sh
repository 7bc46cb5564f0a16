#!/usr/bin/env bash
# The documentation site: the pages of docs/, a reference of every config field,
# and a reference of the API from docstrings.
#
#   bash scripts/docs.sh             builds runs/docs/site; a warning is an error
#   bash scripts/docs.sh --serve     builds it, and serves it at 127.0.0.1:8001
#
# Installs the extra `docs` into .venv. PORT=9000 takes another port.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh docs

python=$PWD/.venv/bin/python
folder=$PWD/runs/docs
mkdir -p "$folder"
JAX_PLATFORMS=cpu $python scripts/docs_pages.py "$folder"
cd "$folder"
$python -m zensical build --strict --clean
echo "docs: $folder/site/index.html"
if [[ ${1:-} == --serve ]]; then
  # As built: after a change, call this again.
  $python -m http.server --directory site --bind 127.0.0.1 "${PORT:-8001}"
fi
