"""YAML, and what clusters ask of jobs before they take one."""

import re
from typing import Any

from t2x.sweeps.launchers import launcher


def dump(value: object) -> str:
  """Returns JSON values as YAML, scripts as blocks."""
  import yaml

  class Dumper(yaml.SafeDumper):
    pass

  def text(dumper: Any, value: str) -> Any:
    style = '|' if '\n' in value else None
    return dumper.represent_scalar('tag:yaml.org,2002:str', value, style=style)

  Dumper.add_representer(str, text)
  return yaml.dump(value, Dumper=Dumper, sort_keys=False, width=10**6)


def check_remote(job: launcher.LaunchJob) -> None:
  """Raises ValueError if a job needs files that its machines do not have.

  They have t2x and what lies in its directory, and a bucket.
  """
  if '://' not in job.workdir:
    raise ValueError(
      f'--study={job.workdir.rpartition("/trials/")[0]} is a local directory, '
      'which goes away with the machines of a run: name a bucket, as in '
      '--study=gs://BUCKET/studies/first.'
    )
  for argument in job.command[1:]:
    if argument.startswith(('/', '--config=/')):
      raise ValueError(
        f'{argument} is a file of this machine, and the machines of a run have '
        't2x alone. Put it in experiments/, or a --config in a bucket.'
      )


def check_label(name: str, value: str, most: int = 63) -> None:
  """Raises ValueError if Kubernetes or Google Cloud would refuse a name.

  Args:
    name: name of the setting, for the message.
    value: the name that is given.
    most: most characters.
  """
  if len(value) > most or not re.fullmatch('[a-z]([-a-z0-9]*[a-z0-9])?', value):
    raise ValueError(
      f'{name}={value!r}: it is up to {most} lower-case letters, digits and '
      'dashes, and begins with a letter and does not end with a dash.'
    )
