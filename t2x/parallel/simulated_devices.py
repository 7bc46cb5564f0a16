"""Requests devices that the CPU simulates, before the first is used."""

import os
import re

COUNT = '--xla_force_host_platform_device_count'
_THREADS = 'NPROC'  # XLA reads this variable when it starts.


def ask_for(number: int) -> None:
  """Asks XLA to simulate devices, unless XLA_FLAGS has their number already.

  Args:
    number: number of devices.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if COUNT not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {COUNT}={number}'.strip()
  give_threads()


def give_threads() -> None:
  """Makes XLA start two threads for each simulated device.

  By default it starts one for each device, or one for each core if there are
  more cores. In a collective each device holds a thread until the last device
  has joined. If other work holds a thread too, all wait, and XLA ends the
  process after 40 s. A number that the environment has in NPROC is kept.
  """
  counts = re.findall(rf'{COUNT}=(\d+)', os.environ.get('XLA_FLAGS', ''))
  if counts and int(counts[-1]) > 1:  # As XLA does, the last counts.
    threads = max(2 * int(counts[-1]), os.cpu_count() or 1)
    os.environ.setdefault(_THREADS, str(threads))
