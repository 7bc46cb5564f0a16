"""Programs compiled ahead of time, kept in a file and loaded by a run.

executables.save('step.t2x', config, mesh)    # on any machine
run.program.replace(executables.load('step.t2x', run.program))   # on the pod

The file is a zip: manifest.json, and a payload for each program of
`Program.lowered`. A run lowers its own programs, which takes seconds, and takes
the file's where the lowered texts are the same, and versions, devices and
options (fingerprint.py); or it refuses and says what differs.

Trust: the manifest is JSON and the hashes in it find damage and mistakes. A
payload is a pickle of `jax.experimental.serialize_executable` around machine
code: it is unpickled once all else matches, and whoever wrote the file can run
anything then. Load files that you made. No trees are kept: those of arguments
and results are the run's own.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import hashlib
import io
import json
import logging
import time
from typing import Any
import zipfile
import zlib

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from t2x import files
from t2x.compilation import fingerprint
from t2x.compilation import program as program_lib
from t2x.config import experiment
from t2x.data import config as data_config
from t2x.hardware import target_devices
from t2x.parallel import sharding

_log = logging.getLogger(__name__)

FORMAT = 1  # Of the file; higher with each change that a reader must know.
_MANIFEST = 'manifest.json'
_AGAIN = (
  'Compile again by scripts/compile_step.py, for what is here, or '
  'leave --executable out.'
)


def save(
  file: str,
  config: experiment.Experiment,
  mesh: jax.sharding.Mesh,
  *,
  say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
  """Compiles what a run compiles, and writes it to one file.

  Args:
    file: the path to write to, local or gs://; the file appears whole or not
      at all.
    config: the experiment of the run.
    mesh: the mesh, whose devices may be absent.
    say: the function that takes a line for each program as it is done.

  Returns:
    The manifest.

  Raises:
    ValueError: rows have several lengths, each of which is a program; or the
      number of steps, which schedules depend on, is not known from the config.
    DivergenceError: a pipeline's program that would wait forever.
  """
  _check_one_length(config)
  program = program_lib.Program(config, mesh, num_steps=_num_steps(config))
  manifest = {
    'format': FORMAT,
    'target': fingerprint.of_target(program),
    'source': fingerprint.of_source(config),
    'programs': {},
  }
  payloads = {}
  for name, lowered in _lowered(program).items():
    start = time.perf_counter()
    with _no_cache():
      compiled = target_devices.compile(lowered)
    seconds = time.perf_counter() - start
    if program.check is not None:
      program.check(compiled.as_text() or '')
    payloads[name], _, _ = serialize_executable.serialize(compiled)
    manifest['programs'][name] = {
      'lowered': fingerprint.of_lowered(lowered),
      'payload': hashlib.sha256(payloads[name]).hexdigest(),
      'compile_seconds': round(seconds, 2),
      'memory_bytes': _memory(compiled),
    }
    say(
      f'{name}: compiled in {seconds:.1f} s, {len(payloads[name]):,} bytes of '
      'program'
    )
  _write(file, manifest, payloads)
  return manifest


def load(
  file: str, program: program_lib.Program
) -> dict[str, jax.stages.Compiled]:
  """Returns the programs of a file, for `Program.replace`.

  Args:
    file: the path of a file that `save` wrote, local or gs://, the same for
      every process.
    program: the program of the run, on the devices that run it.

  Raises:
    ValueError: no such file, a damaged one, or one made for something else,
      with what differs. Nothing of it was unpickled then.
  """
  start = time.perf_counter()
  manifest, payloads = _read(file)
  target = fingerprint.of_target(program)
  found = fingerprint.target_differences(manifest['target'], target)
  if found:
    raise ValueError(_refusal(file, found))
  lowered = _lowered(program)
  made = manifest['programs']
  unlike = [
    name
    for name, own in lowered.items()
    if made[name]['lowered'] != fingerprint.of_lowered(own)
  ]
  if unlike:
    raise ValueError(_refusal(file, _reasons(manifest, program, unlike)))
  mesh = program.batch_sharding.mesh
  assert isinstance(mesh, jax.sharding.Mesh)
  loaded = {
    name: _deserialize(payloads[name], own, [*mesh.devices.flat])
    for name, own in lowered.items()
  }
  _log.info(
    'Programs of %s loaded in %.1f s; they were compiled in %.1f s.',
    file,
    time.perf_counter() - start,
    sum(entry['compile_seconds'] for entry in made.values()),
  )
  return loaded


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
  """Leaves JAX's persistent cache alone.

  A program read from it cannot be written again: on CPUs its file loads, and
  then lacks functions (jax 0.10.2).
  """
  name = 'jax_enable_compilation_cache'
  before = getattr(jax.config, name)
  jax.config.update(name, False)
  compilation_cache.reset_cache()  # It asks once whether there is one.
  try:
    yield
  finally:
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def _deserialize(
  payload: bytes, lowered: jax.stages.Lowered, devices: list[Any]
) -> jax.stages.Compiled:
  return serialize_executable.deserialize_and_load(
    payload,
    jax.tree.structure(lowered.args_info),
    lowered.out_tree,
    backend=devices[0].client,
    execution_devices=devices,
  )


def _lowered(program: program_lib.Program) -> dict[str, jax.stages.Lowered]:
  mesh = program.batch_sharding.mesh
  assert isinstance(mesh, jax.sharding.Mesh)
  with sharding.use(mesh, program.config.rules):
    # The text of a TPU's kernels holds the names of their files, which would
    # forbid another directory.
    name = 'jax_hlo_source_file_canonicalization_regex'
    before = getattr(jax.config, name)
    jax.config.update(name, '.*')
    try:
      return program.lowered()
    finally:
      jax.config.update(name, before)


def _refusal(file: str, differences: list[str]) -> str:
  return (
    f'--executable={file} was made for another run: '
    f'{fingerprint.sentence(differences)}. {_AGAIN}'
  )


def _reasons(
  manifest: dict[str, Any], program: program_lib.Program, unlike: list[str]
) -> list[str]:
  """Returns why programs differ, as far as it is known."""
  source = fingerprint.of_source(program.config)
  reasons = fingerprint.source_differences(manifest['source'], source)
  if reasons:
    return reasons
  return [
    f'the lowered {" and ".join(unlike)} differ, although settings, libraries '
    'and the files of t2x are the same; code outside of them, or the number of '
    'steps that a schedule is given, is not'
  ]


def _check_one_length(config: experiment.Experiment) -> None:
  buckets = data_config.buckets(config.data)
  if len(buckets) > 1:
    raise ValueError(
      f'data.batching.buckets={",".join(map(str, buckets))}: each length is a '
      'program of its own, and a file holds one. Set one length, or let the '
      'run compile.'
    )


def _num_steps(config: experiment.Experiment) -> int:
  num_steps = experiment.num_steps(config)
  if num_steps is None:
    by_epochs = config.train.num_epochs is not None
    name = 'num_epochs' if by_epochs else 'num_tokens'
    raise ValueError(
      f'train.{name}={getattr(config.train, name)}: how many steps that is, is '
      'known once the corpus is read, and a schedule is part of the program. '
      f'Give --set train.{name}=none --set train.num_steps=N.'
    )
  return num_steps


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the compiler's figures for one device; those that are not 0."""
  stats = compiled.memory_analysis()
  kinds = ('argument', 'output', 'alias', 'temp', 'generated_code')
  sizes = {k: getattr(stats, f'{k}_size_in_bytes', 0) for k in kinds}
  return {kind: size for kind, size in sizes.items() if size}


def _write(
  file: str, manifest: dict[str, Any], payloads: dict[str, bytes]
) -> None:
  buffer = io.BytesIO()
  with zipfile.ZipFile(
    buffer, 'w', zipfile.ZIP_DEFLATED, compresslevel=1
  ) as archive:
    archive.writestr(_MANIFEST, json.dumps(manifest, indent=1))
    for name, payload in payloads.items():
      archive.writestr(name, payload)
  path = files.path(file)
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, buffer.getvalue())


def _read(file: str) -> tuple[dict[str, Any], dict[str, bytes]]:
  path = files.path(file)
  if not path.exists():
    raise ValueError(
      f'--executable={file}: there is no such file. scripts/compile_step.py '
      'makes one; every process of a run reads it.'
    )
  try:
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
      manifest = json.loads(archive.read(_MANIFEST))
      if manifest['format'] != FORMAT:
        raise ValueError(
          f'--executable={file} is of format {manifest["format"]}, and this '
          f't2x reads format {FORMAT}. {_AGAIN}'
        )
      payloads = {name: archive.read(name) for name in program_lib.NAMES}
    for name, payload in payloads.items():
      found = hashlib.sha256(payload).hexdigest()
      if found != manifest['programs'][name]['payload']:
        raise zipfile.BadZipFile(f'{name} is not what was written')
  except (
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    json.JSONDecodeError,
  ) as error:
    raise ValueError(
      f'--executable={file} is damaged, or no file of scripts/compile_step.py '
      f'({error}). Copy it again, compile again, or leave --executable out.'
    ) from error
  return manifest, payloads
