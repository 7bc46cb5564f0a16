"""Command-line flags of the programs that use a trained run."""

from typing import Any

from absl import flags

from t2x import main

flags.disclaim_key_flags()  # They are the script's: --helpshort lists them.


def define() -> None:
  """Defines --workdir, --step and --set; see `load_arguments`."""
  flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
  flags.DEFINE_string('workdir', None, 'The run.')
  main.define_set_flag()


def load_arguments() -> dict[str, Any]:
  """Returns the arguments of `loading.load` that the flags of `define` give."""
  return {
    'workdir': main.workdir(),
    'step': flags.FLAGS.step,
    'settings': flags.FLAGS.set,
  }


def define_texts() -> None:
  """Defines --text and --text_file; see `texts`."""
  flags.DEFINE_multi_string('text', [], 'A text; may repeat.')
  flags.DEFINE_string('text_file', None, 'One text a line.')


def texts() -> list[str]:
  """Returns the texts of --text, then those of --text_file, one a line.

  Raises:
    ValueError: there are no texts, or the file does not exist or is not UTF-8.
  """
  return main.read_lines(flags.FLAGS.text, flags.FLAGS.text_file, 'text')
