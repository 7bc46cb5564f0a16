"""Devices that the CPU simulates, asked for before the first is touched."""

import os
import re

COUNT = '--xla_force_host_platform_device_count'
_THREADS = 'NPROC'  # Read by XLA when it starts.


def ask_for(number: int) -> None:
  """Asks XLA for so many devices, unless XLA_FLAGS says how many already."""
  given = os.environ.get('XLA_FLAGS', '')
  if COUNT not in given:
    os.environ['XLA_FLAGS'] = f'{given} {COUNT}={number}'.strip()
  give_threads()


def give_threads() -> None:
  """Lets two threads run the programs of each simulated device.

  XLA starts one a device, or one a core if those are more. In a collective each
  device holds a thread until the last has come: where something else holds one
  too, all wait, and XLA ends the process after 40 s. A number that is given in
  NPROC is kept.
  """
  counts = re.findall(rf'{COUNT}=(\d+)', os.environ.get('XLA_FLAGS', ''))
  if counts and int(counts[-1]) > 1:  # As XLA does, the last counts.
    threads = max(2 * int(counts[-1]), os.cpu_count() or 1)
    os.environ.setdefault(_THREADS, str(threads))
