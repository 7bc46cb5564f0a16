"""Threads for the devices that the CPU simulates."""

import os

import pytest

from t2x.parallel import simulated_devices


@pytest.mark.parametrize(
  'flags, given, expected',
  [
    ('', None, None),
    (f'{simulated_devices.COUNT}=1', None, None),
    (f'--other=1 {simulated_devices.COUNT}=4', None, '8'),
    (f'{simulated_devices.COUNT}=4 {simulated_devices.COUNT}=8', None, '16'),
    (f'{simulated_devices.COUNT}=4', '5', '5'),
  ],
)
def test_twice_as_many_threads_as_devices(monkeypatch, flags, given, expected):
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  environment = {'XLA_FLAGS': flags} | ({'NPROC': given} if given else {})
  monkeypatch.setattr(os, 'environ', environment)
  simulated_devices.give_threads()
  assert environment.get('NPROC') == expected


def test_a_number_of_devices_is_asked_for_once(monkeypatch):
  environment = {'XLA_FLAGS': '--other=1'}
  monkeypatch.setattr(os, 'environ', environment)
  simulated_devices.ask_for(8)
  simulated_devices.ask_for(4)  # The first is kept, as XLA keeps it.
  assert environment['XLA_FLAGS'] == f'--other=1 {simulated_devices.COUNT}=8'
