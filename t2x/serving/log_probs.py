"""Log-probabilities in the forms of the two interfaces.

The older form keys the likeliest tokens by their text. Tokens may have one
text, as a letter and its byte; the likelier one has it then, and the others are
called by their ids, so that none is lost.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
  """A token of an answer.

  Attributes:
    token: its id.
    log_prob: under the model itself; None of a text's first token.
    top: the likeliest tokens in its place with theirs, the likeliest first;
      None of a text's first token.
    place: where in the answer's text what it adds begins, in characters.
    is_end: whether it ended the text.
  """

  token: int
  log_prob: float | None
  top: Sequence[tuple[int, float]] | None = ()
  place: int = 0
  is_end: bool = False


def completion(
  tokens: Sequence[Told], token_bytes: Sequence[bytes], with_top: bool
) -> dict[str, Any]:
  """Returns `logprobs` of a completion.

  Args:
    tokens: of the answer.
    token_bytes: what each token of the model adds to a text.
    with_top: whether the likeliest are told.
  """
  named = [_names(told, token_bytes) for told in tokens]
  tops = [
    told.top and {names[token]: log_prob for token, log_prob in told.top}
    for told, names in zip(tokens, named)
  ]
  return {
    'tokens': [names[told.token] for told, names in zip(tokens, named)],
    'token_logprobs': [told.log_prob for told in tokens],
    'top_logprobs': tops if with_top else None,
    'text_offset': [told.place for told in tokens],
  }


def chat(
  tokens: Sequence[Told], token_bytes: Sequence[bytes]
) -> dict[str, Any]:
  """Returns `logprobs` of a chat's answer; arguments as for `completion`."""

  def one(token: int, log_prob: float | None) -> dict[str, Any]:
    data = token_bytes[token]
    name = token_name(data)
    return {'token': name, 'logprob': log_prob, 'bytes': list(data)}

  # The end is no part of a message.
  return {
    'content': [
      {
        **one(told.token, told.log_prob),
        'top_logprobs': [one(*likely) for likely in told.top or ()],
      }
      for told in tokens
      if not told.is_end
    ]
  }


def token_name(data: bytes) -> str:
  r"""Returns a token's text, or for part of a character bytes:\xNN."""
  try:
    return data.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)


def _names(told: Told, token_bytes: Sequence[bytes]) -> dict[int, str]:
  """Returns what the tokens in one place are called, each by another name."""
  found: dict[int, str] = {}
  taken = set()
  for token in [*(token for token, _ in told.top or ()), told.token]:
    if token not in found:
      name = token_name(token_bytes[token])
      found[token] = f'token_id:{token}' if name in taken else name
      taken.add(found[token])
  return found
