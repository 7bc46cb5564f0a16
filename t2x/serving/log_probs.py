"""Log-probabilities in the formats of /v1/completions and chat completions.

The format of /v1/completions keys the likeliest tokens by their text. Several
tokens may have the same text, such as a letter and its byte. The likeliest of
them keeps the text, and the others are named by their ids, so that none is
lost.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenScore:
  """A token of an answer, with its log-probability and its place.

  Attributes:
    token: id of the token.
    log_prob: log-probability under the model, before temperature and the like;
      None for the first token of an echoed prompt.
    top: ids and log-probabilities of the likeliest tokens at this position, the
      likeliest first; None for the first token of an echoed prompt.
    place: offset of the token's text in the answer's text, in characters.
    is_end: whether the token ended the text.
  """

  token: int
  log_prob: float | None
  top: Sequence[tuple[int, float]] | None = ()
  place: int = 0
  is_end: bool = False


def completion(
  tokens: Sequence[TokenScore], token_bytes: Sequence[bytes], with_top: bool
) -> dict[str, Any]:
  """Returns the field `logprobs` of a completion.

  Args:
    tokens: tokens of the answer.
    token_bytes: bytes that each token of the model adds to a text.
    with_top: whether to include the likeliest tokens at each position.
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
  tokens: Sequence[TokenScore], token_bytes: Sequence[bytes]
) -> dict[str, Any]:
  """Returns the field `logprobs` of a chat completion.

  Args:
    tokens: tokens of the answer.
    token_bytes: bytes that each token of the model adds to a text.
  """

  def one(token: int, log_prob: float | None) -> dict[str, Any]:
    data = token_bytes[token]
    name = token_name(data)
    return {'token': name, 'logprob': log_prob, 'bytes': list(data)}

  # The end token is not part of a message.
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
  r"""Returns a token's text, or bytes:\xNN for a part of a character."""
  try:
    return data.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)


def _names(told: TokenScore, token_bytes: Sequence[bytes]) -> dict[int, str]:
  """Returns distinct names of a token and the likeliest at its position."""
  names: dict[int, str] = {}
  for token in [*(token for token, _ in told.top or ()), told.token]:
    if token not in names:
      name = token_name(token_bytes[token])
      is_taken = name in names.values()
      names[token] = f'token_id:{token}' if is_taken else name
  return names
