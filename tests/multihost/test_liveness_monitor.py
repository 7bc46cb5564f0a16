"""A process that is lost takes the others down, which say who it was."""

import signal

import faulty
import pytest
import tiny


@pytest.mark.slow
@pytest.mark.parametrize('pid, number', [(0, 'SIGKILL'), (1, 'SIGSTOP')])
def test_a_lost_process_is_named(tmp_path, monkeypatch, pid, number):
  workdir = tmp_path / 'run'
  started = faulty.start_two(
    tmp_path, workdir, monkeypatch, pause=0.4, train__num_steps=500
  )
  tiny.wait_for(workdir / 'checkpoints' / '4', started)
  started[pid].send_signal(getattr(signal, number))
  try:
    _, error = started[1 - pid].communicate(timeout=60)
  finally:
    started[pid].kill()
    started[pid].communicate()
    started[1 - pid].kill()
  assert started[1 - pid].returncode == 1
  last = error.splitlines()[-1]
  assert f'error: process {pid} of 2 died' in last, error
  latest = tiny.saved_steps(workdir)[-1]
  assert f'the last checkpoint in {workdir} is that of step {latest}' in last
  assert f'This process ({1 - pid}) ends too.' in last
