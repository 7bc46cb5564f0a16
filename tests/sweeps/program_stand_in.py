"""A program that notes its calls and gives the answers that a test has written.

`install(directory, name)` writes such a program. `answers` maps the start of a
call's arguments to what comes in turn, of which the last comes for ever.
"""

import json
import os
import pathlib
import sys
from typing import Any


class Program:
  """A stand-in for one program, and what it was called with.

  Args:
    directory: directory for the program, for PATH.
    name: name of the program.
  """

  def __init__(self, directory: pathlib.Path, name: str):
    directory.mkdir(parents=True, exist_ok=True)
    self._folder = directory / f'{name}.stand_in'
    self._folder.mkdir()
    file = directory / name
    file.write_text(
      f'#!/bin/bash\nexec {sys.executable} -S -E {__file__} '
      f'{self._folder} "$@"\n'
    )
    file.chmod(0o755)

  def answers(self, start: str, *answers: Any) -> None:
    """Sets what comes for calls whose arguments contain `start`.

    Args:
      start: words of the call.
      *answers: text to print; JSON values; or (exit status, message).
    """
    file = self._folder / 'answers.json'
    known = json.loads(file.read_text()) if file.exists() else []
    known = [entry for entry in known if entry[0] != start]
    file.write_text(json.dumps([*known, [start, list(answers)]]))

  def calls(self) -> list[tuple[str, str]]:
    """Returns (arguments, standard input) of each call so far."""
    file = self._folder / 'calls.jsonl'
    if not file.exists():
      return []
    lines = file.read_text().splitlines()
    return [tuple(json.loads(line)) for line in lines]


def _main(folder: pathlib.Path, arguments: list[str]) -> int:
  text = ' '.join(arguments)
  given = '' if sys.stdin.isatty() else sys.stdin.read()
  with open(folder / 'calls.jsonl', 'a') as f:
    f.write(json.dumps([text, given]) + '\n')
  file = folder / 'answers.json'
  known = json.loads(file.read_text()) if file.exists() else []
  for entry in known:
    start, answers = entry
    if start in text and answers:
      answer = answers.pop(0) if len(answers) > 1 else answers[0]
      temporary = folder / f'answers.{os.getpid()}'
      temporary.write_text(json.dumps(known))
      os.replace(temporary, file)
      if isinstance(answer, list) and answer and isinstance(answer[0], int):
        print(answer[1], file=sys.stderr)
        return answer[0]
      print(answer if isinstance(answer, str) else json.dumps(answer))
      return 0
  return 0


if __name__ == '__main__':
  sys.exit(_main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
