#!/usr/bin/env bash
# Lint, types and tests, in .venv, which it makes if need be.
#
#   bash scripts/test.sh               all tests that are quick, and a share of
#                                      the others, which goes by the commit
#   bash scripts/test.sh --all         every test
#   bash scripts/test.sh --fast        the tests that take least: three minutes
#   bash scripts/test.sh -k NAME ...   pytest arguments: only these tests
#   bash scripts/test.sh --skipped     only the tests that the last run skipped
#
# A test that needs a further extra is skipped with its name. What the extras
# add to a run that has passed:
#   bash scripts/setup.sh docs reference plan ray && bash scripts/test.sh --skipped
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test

export JAX_PLATFORMS=cpu
types=
if [[ ${1:-} != --skipped ]]; then
  .venv/bin/ruff format --check .
  .venv/bin/ruff check .
  # Beside the tests; what it says comes after theirs.
  said=$(mktemp)
  .venv/bin/pyright >"$said" 2>&1 &
  types=$!
  trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
fi
if [[ $# == 0 || $* == --skipped ]]; then
  # Without a commit, of a copy without history, all tests run.
  commit=$(git rev-parse HEAD 2>/dev/null || true)
  set -- "$@" ${commit:+--turn="$commit"}
fi
# A worker that dies is named and ends the run; replaced, xdist would wait for
# it for ever (pytest-xdist issue 1378).
status=0
.venv/bin/pytest -n 2 --dist loadfile --no-loadscope-reorder \
  --max-worker-restart=0 "$@" || status=$?
if [[ -n $types ]]; then
  wait "$types" || status=$((status ? status : $?))
  cat "$said"
fi
exit "$status"
