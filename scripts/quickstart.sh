#!/usr/bin/env bash
# Trains a small Transformer on real text, on eight simulated devices.
#
#   bash scripts/quickstart.sh [WORKDIR]      (default runs/quickstart)
#
# Needs Python 3.11 or newer and nothing else: it installs into .venv, builds a
# corpus from the documentation inside this Python installation, trains a
# tokenizer and a decoder, evaluates, checkpoints, samples and writes a report.
# A second call goes on where the first was interrupted.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
workdir=$(realpath -m "${1:-$here/runs/quickstart}")
cd "$here"
bash scripts/setup.sh

export JAX_PLATFORMS=cpu
# Large pages for large arrays: a quarter off a step on a CPU (glibc 2.35+).
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export XLA_FLAGS=--xla_force_host_platform_device_count=8
python=.venv/bin/python

echo "quickstart: training in $workdir"
$python experiments/quickstart.py --workdir="$workdir" \
  --set mesh.data=2 --set mesh.fsdp=2 --set mesh.tensor=2

echo 'quickstart: sampling'
$python experiments/generate.py --workdir="$workdir" \
  --prompt='The function returns' --prompt='This module' \
  --prompt='If the file does not exist,' --prompt='A list of' \
  --num_tokens=48 --temperature=0.7 --top_p=0.9 --ignore_end \
  --output="$workdir/samples.json"
$python - "$workdir" <<'PYTHON'
import sys
from t2x.tracking import metrics
from t2x.tracking import run_report

run_report.write(sys.argv[1])
row = [r for r in metrics.read_rows(sys.argv[1])
       if 'eval/validation/loss' in r][-1]
print(f"Held-out text after {row['step']} steps: "
      f"perplexity {row['eval/validation/perplexity']:.1f}, "
      f"{row['eval/validation/bits_per_byte']:.3f} bits per byte.")
PYTHON

cat <<TEXT

Where everything lies:
  $workdir/report.html      the report, with curves and samples
  $workdir/metrics.jsonl    one line a step
  $workdir/tensorboard      events; see: .venv/bin/tensorboard --logdir DIR
  $workdir/checkpoints      parameters, optimizer, data position
  $workdir/config.json      everything that was set

What to try next:
  .venv/bin/python experiments/generate.py --workdir=$workdir \\
      --prompt='Return the' --num_tokens=64 --temperature=0.8 --top_p=0.9
  .venv/bin/python experiments/quickstart.py --workdir=runs/wider \\
      --set model.embed_dim=256 --set optim.learning_rate=2e-3
  .venv/bin/python experiments/quickstart.py --workdir=runs/mine \\
      --set data.source=text_files --set data.files='DIR/*.txt'
TEXT
