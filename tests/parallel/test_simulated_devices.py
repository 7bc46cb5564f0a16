"""Threads for the devices that the CPU simulates."""

import os

import pytest

from t2x.parallel import simulated_devices as simulated


@pytest.mark.parametrize(
  'flags, given, expected',
  [
    ('', None, None),
    (f'{simulated.COUNT}=1', None, None),
    (f'--other=1 {simulated.COUNT}=4', None, '8'),
    (f'{simulated.COUNT}=4 {simulated.COUNT}=8', None, '16'),
    (f'{simulated.COUNT}=4', '5', '5'),
  ],
)
def test_twice_as_many_threads_as_devices(monkeypatch, flags, given, expected):
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  environment = {'XLA_FLAGS': flags} | ({'NPROC': given} if given else {})
  monkeypatch.setattr(os, 'environ', environment)
  simulated.give_threads()
  assert environment.get('NPROC') == expected


def test_a_number_of_devices_is_asked_for_once(monkeypatch):
  environment = {'XLA_FLAGS': '--other=1'}
  monkeypatch.setattr(os, 'environ', environment)
  simulated.ask_for(8)
  simulated.ask_for(4)  # The first is kept, as XLA keeps it.
  assert environment['XLA_FLAGS'] == f'--other=1 {simulated.COUNT}=8'
