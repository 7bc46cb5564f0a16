import math
import os
import pty
import re
import subprocess
import sys

from t2x.tracking import metrics
from t2x.tracking import progress_bar


def test_without_a_terminal_lines_are_rare_and_the_last_is_shown(
  tmp_path, capsys
):
  with metrics.MetricsWriter(
    tmp_path, start_step=0, num_steps=50, header='MFU = x'
  ) as writer:
    for step in range(1, 51):
      row = {'step': step, 'loss': 50 / step, 'tokens_per_second': 1234.5}
      if step == 20:
        row |= {'eval/a/loss': 2.5, 'eval/a/accuracy': 0.5, 'eval/b/loss': 3}
      writer.write(row)
  lines = capsys.readouterr().out.splitlines()
  assert lines == [
    'MFU = x',
    'step 1/50  loss 50  1,234 tokens/s  ETA -',
    'step 20  eval a: loss 2.5  accuracy 0.5',
    'step 20  eval b: loss 3',
    'step 50/50  loss 1  1,234 tokens/s  ETA 0:00:00',
  ]


def test_time_left_goes_by_the_rows_after_the_first(
  tmp_path, capsys, monkeypatch
):
  seconds = iter(range(0, 10_000, 30))
  monkeypatch.setattr(progress_bar.time, 'monotonic', lambda: next(seconds))
  shown = progress_bar.Progress(1000, 0, '')
  for step in (10, 20):
    shown.write({'step': step, 'loss': math.nan})
  # Each row reads the clock twice, so 10 steps took a minute.
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.endswith('ETA 1:38:00')


def test_a_terminal_shows_a_bar(tmp_path):
  program = (
    'from t2x.tracking import metrics\n'
    f'with metrics.MetricsWriter({str(tmp_path)!r}, start_step=0, num_steps=4,'
    " header='MFU [x] = 1') as writer:\n"
    '  for step in range(1, 5):\n'
    "    writer.write({'step': step, 'loss': 7 / step,"
    " 'tokens_per_second': 10, 'eval/a/loss': step})\n"
  )
  master, slave = pty.openpty()
  env = {**os.environ, 'TERM': 'xterm', 'COLUMNS': '100'}
  with subprocess.Popen(
    [sys.executable, '-c', program], stdout=slave, stderr=slave, env=env
  ) as process:
    os.close(slave)
    chunks = []
    try:
      while chunk := os.read(master, 4096):
        chunks.append(chunk)
    except OSError:
      pass  # The other end is closed.
    os.close(master)
  assert process.returncode == 0
  text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', b''.join(chunks).decode())
  assert 'MFU [x] = 1' in text
  assert 'step 3  eval a: loss 3' in text
  assert '4/4 loss 1.75  10 tokens/s  ETA 0:00:00' in text
