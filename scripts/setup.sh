#!/usr/bin/env bash
# Makes or completes .venv with t2x and the tested versions of what it needs.
#
#   bash scripts/setup.sh [EXTRA...]       e.g. bash scripts/setup.sh test bench
#   PYTHON=python3.12 bash scripts/setup.sh
#
# Idempotent: a second call with the same extras returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamps=$venv/.t2x
if [[ ! -x $venv/bin/python ]]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: $python is $("$python" --version 2>&1 || true); t2x needs Python" \
      "3.11 or newer. Name one: PYTHON=python3.12 bash scripts/setup.sh" >&2
    exit 1
  fi
  "$python" -m venv "$venv"
elif [[ -n ${PYTHON:-} ]]; then
  version='import sys; print(*sys.version_info[:2], sep=".")'
  want=$("$PYTHON" -c "$version")
  have=$("$venv/bin/python" -c "$version")
  if [[ $want != "$have" ]]; then
    echo "setup: .venv holds Python $have and PYTHON is $want." \
      "Remove .venv to change it: rm -rf .venv" >&2
    exit 1
  fi
fi

# A stamp per extra, named by what it was installed from.
key=$(cat setup.py scripts/lock.txt | sha256sum | cut -c1-16)
missing=()
for extra in core "$@"; do
  [[ -e $stamps/$extra-$key ]] || missing+=("$extra")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

echo "setup: installing ${missing[*]} into .venv (once)" >&2
mkdir -p "$stamps"
# Extras installed before stay in the request, so that nothing is downgraded.
extras=$(IFS=,; echo "${missing[*]}" | sed 's/\bcore\b//; s/^,//; s/,$//')
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  -c scripts/lock.txt -e ".${extras:+[$extras]}"
for extra in "${missing[@]}"; do
  touch "$stamps/$extra-$key"
done
