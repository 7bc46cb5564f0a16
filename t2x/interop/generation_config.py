"""Reads the text generation settings of a checkpoint.

As in `transformers`, they are in generation_config.json, or in config.json if
that file does not exist; ids of special tokens that the first file leaves out
are taken from the second. Settings that t2x does not have are listed.

>>> result = read({'eos_token_id': [2, 41], 'num_beams': 4}, {}, vocab_size=50)
>>> result.ends, result.ignored
((2, 41), ('num_beams=4',))
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import math
import re
from typing import Any

from t2x.decode import beams as beams_lib
from t2x.decode import settings as settings_lib
from t2x.interop import values

FILE = 'generation_config.json'
Sampling = settings_lib.SamplingConfig

_ENDS, _BOS, _PAD = 'eos_token_id', 'bos_token_id', 'pad_token_id'
_START = 'decoder_start_token_id'
_WORDS = 'bad_words_ids'
_SUPPRESSED = 'suppress_tokens', 'begin_suppress_tokens'
# Settings of sampling, which transformers applies only if `do_sample` is true.
_DRAWS = ('temperature', 'top_k', 'top_p', 'min_p', 'typical_p')
_STOPPING = {True: 'first', False: 'heuristic', 'never': 'never'}
# Keys that have no effect on the generated text.
_NO_TEXT = {
  'transformers_version',
  '_from_model_config',
  '_commit_hash',
  'use_cache',
  'cache_implementation',
  'cache_config',
  'max_cache_len',
  'low_memory',
  'return_dict_in_generate',
  'output_attentions',
  'output_hidden_states',
  'output_scores',
  'output_logits',
  'is_assistant',
  'num_assistant_tokens',
  'num_assistant_tokens_schedule',
  'assistant_confidence_threshold',
  'assistant_early_exit',
  'assistant_lookbehind',
  'target_lookbehind',
  'prompt_lookup_num_tokens',
  'max_matching_ngram_size',
  'prefill_chunk_size',
  'compile_config',
  'disable_compile',
}
# Keys that t2x does not take from a file, and their values without effect.
_IGNORED: dict[str, tuple[Any, ...]] = {
  'max_length': (),
  'max_new_tokens': (),
  'min_length': (0,),
  'max_time': (),
  'stop_strings': ([],),
  'num_beams': (1,),
  'num_beam_groups': (1,),
  'diversity_penalty': (0,),
  'num_return_sequences': (1,),
  'penalty_alpha': (0,),
  'dola_layers': (),
  'use_mtp': (False,),
  'top_h': (),
  'epsilon_cutoff': (0,),
  'eta_cutoff': (0,),
  'encoder_repetition_penalty': (1,),
  'no_repeat_ngram_size': (0,),
  'encoder_no_repeat_ngram_size': (0,),
  'renormalize_logits': (False,),
  'remove_invalid_values': (False,),
  'exponential_decay_length_penalty': (),
  'forced_eos_token_id': (),
  'sequence_bias': ([], {}),
  'token_healing': (False,),
  'guidance_scale': (1,),
  'watermarking_config': (),
  'assistant_ensemble_weight': (),
  'speculation_type': (),
  'constraints': (),
  'force_words_ids': (),
}
_HONOURED = {
  _ENDS, _BOS, _PAD, _START, _WORDS, *_SUPPRESSED, *_DRAWS,
  'do_sample', 'forced_bos_token_id', 'repetition_penalty', 'min_new_tokens',
  'length_penalty', 'early_stopping',
}  # fmt: skip
# The keys of a config.json that concern generation.
_KEYS = _HONOURED | set(_IGNORED)
_IDS = (_ENDS, _BOS, _PAD, _START)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
  """Generation settings of a checkpoint; the defaults are those of t2x.

  Attributes:
    ends: token ids that end a text; empty for the tokenizer's EOS.
    bos: token id that begins a decoder's text without a prompt; None for the
      tokenizer's BOS.
    start: token id that an encoder-decoder's answer starts from, which is not
      part of it; None if no file gives one.
    first: token id that is forced to be the first of an answer; None for no
      such token.
    not_first: token ids that are banned at the beginning of a text.
    suppressed: token ids that are never generated.
    banned: words, as token ids, that are never generated.
    sampling: fields of `SamplingConfig` for calls that give no settings.
    search: fields of `BeamConfig` for calls that give no settings.
    ignored: settings that t2x does not apply, as `key=value`.
    source: entries of the files that were read.
  """

  ends: tuple[int, ...] = ()
  bos: int | None = None
  start: int | None = None
  first: int | None = None
  not_first: tuple[int, ...] = ()
  suppressed: tuple[int, ...] = ()
  banned: tuple[tuple[int, ...], ...] = ()
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  search: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = ()
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def searching(self) -> dict[str, Any]:
    """The fields in `sampling` that also apply to beam search."""
    return {k: v for k, v in self.sampling.items() if k not in _DRAWS}

  def constrain(self, sampling: Sampling) -> Sampling:
    """Returns sampling settings with the checkpoint's bans and first token."""
    bias = {i: -math.inf for i in self.suppressed}
    return dataclasses.replace(
      sampling,
      bias={**sampling.bias, **bias},
      banned=(*sampling.banned, *self.banned),
      first=self.first if sampling.first is None else sampling.first,
      not_first=(*sampling.not_first, *self.not_first),
    )


def read(
  own: Mapping[str, Any] | None,
  hf: Mapping[str, Any],
  *,
  vocab_size: int,
  answers: bool = False,
) -> GenerationConfig:
  """Returns the settings in the files of a checkpoint.

  Args:
    own: parsed generation_config.json; None if there is no such file.
    hf: parsed config.json.
    vocab_size: number of tokens of the model.
    answers: whether the model is an encoder-decoder.

  Raises:
    ValueError: a value is invalid; the message names the file.
  """
  source = {k: v for k, v in hf.items() if k in _KEYS and v is not None}
  if own is not None:
    ids = {key: source[key] for key in _IDS if key in source}
    # A BOS in this file takes precedence over a start in the other.
    if own.get(_BOS) is not None:
      ids.pop(_START, None)
    source = ids | {k: v for k, v in own.items() if v is not None}
  own = own or {}
  name = lambda key: FILE if own.get(key) is not None else 'config.json'
  reader = _Reader(source, vocab_size, answers)
  try:
    return reader.read()
  except values.Wrong as wrong:
    raise ValueError(f'{name(wrong.key)}: {wrong}') from None


class _Reader:
  """Reads settings from one dictionary without nulls; see `read`."""

  def __init__(self, given: Mapping[str, Any], vocab_size: int, answers: bool):
    self._given, self._answers = given, answers
    self._id = functools.partial(values.token, vocab_size=vocab_size)
    self._ignored: list[str] = []

  def read(self) -> GenerationConfig:
    banned = self._words()
    starts = [self._one(key) for key in (_START, _BOS, _PAD)]
    starts = [i for i in starts if i is not None and self._answers]
    return GenerationConfig(
      ends=self._ends,
      bos=self._one(_BOS),
      start=starts[0] if starts else None,
      first=self._first(),
      suppressed=self._ids(_SUPPRESSED[0]),
      not_first=self._ids(_SUPPRESSED[1]),
      banned=banned,
      sampling=self._sampling(),
      search=self._search(),
      ignored=self._rest(),
      source=dict(self._given),
    )

  def _one(self, key: str) -> int | None:
    value = self._given.get(key)
    return None if value is None else self._id(key, value)

  def _ids(self, key: str) -> tuple[int, ...]:
    value = self._given.get(key, ())
    if not isinstance(value, list | tuple):
      raise values.Wrong(key, value, 'a list of token ids')
    return tuple(self._id(key, i) for i in value)

  @property
  def _ends(self) -> tuple[int, ...]:
    value = self._given.get(_ENDS)
    if isinstance(value, list) and value:
      return self._ids(_ENDS)
    one = self._one(_ENDS)
    return () if one is None else (one,)

  def _words(self) -> tuple[tuple[int, ...], ...]:
    """Returns the banned words; an end by itself is not banned."""
    value = self._given.get(_WORDS, [])
    is_right = isinstance(value, list) and all(
      isinstance(word, list) and word for word in value
    )
    if not is_right:
      raise values.Wrong(_WORDS, value, 'a list of lists of token ids')
    words = [tuple(self._id(_WORDS, i) for i in word) for word in value]
    ends = {(end,) for end in self._ends}
    return tuple(word for word in words if word not in ends)

  def _first(self) -> int | None:
    key = 'forced_bos_token_id'
    first = self._one(key)
    if first is None or self._answers:
      return first
    # For a decoder, transformers applies it to prompts of one token alone.
    self._ignore(key)
    return None

  def _sampling(self) -> dict[str, Any]:
    """Returns the fields of `SamplingConfig` that differ from its defaults."""
    given, fields = self._given, {}
    draws = values.flag('do_sample', given.get('do_sample'))
    if draws is False:
      fields['temperature'] = 0.0
    for key in (*_DRAWS, 'repetition_penalty', 'min_new_tokens'):
      if given.get(key) is None:
        continue
      whole = key in ('top_k', 'min_new_tokens')
      value = values.number(key, given[key], whole=whole)
      neutral = {'temperature': 1, 'top_p': 1, 'typical_p': 1}
      if value == neutral.get(key, 1 if 'penalty' in key else 0):
        continue
      name = {'min_new_tokens': 'min_tokens'}.get(key, key)
      _check(key, value, lambda n=name, v=value: Sampling(**{n: v}))
      if key not in _DRAWS or draws:
        fields[name] = value
      elif draws is None:
        self._ignore(key)
    return fields

  def _search(self) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    penalty = self._given.get('length_penalty')
    if penalty is not None:
      fields['length_penalty'] = values.number('length_penalty', penalty)
    stopping = self._given.get('early_stopping')
    if stopping is not None:
      if not isinstance(stopping, bool | str) or stopping not in _STOPPING:
        raise values.Wrong('early_stopping', stopping, 'true, false or "never"')
      fields['early_stopping'] = _STOPPING[stopping]
    defaults = beams_lib.BeamConfig()
    return {k: v for k, v in fields.items() if v != getattr(defaults, k)}

  def _rest(self) -> tuple[str, ...]:
    """Returns all ignored settings; to be called after the other methods."""
    for key, value in self._given.items():
      if key in _HONOURED | _NO_TEXT or value in _IGNORED.get(key, ()):
        continue
      self._ignore(key)
    return tuple(self._ignored)

  def _ignore(self, key: str) -> None:
    self._ignored.append(f'{key}={values.short_repr(self._given[key])}')


def _check(key: str, value: object, make: Callable[[], object]) -> None:
  """Calls `make`, and turns a ValueError of it into one about `key`."""
  try:
    make()
  except ValueError as error:
    needed = re.split('; it (?:must be|is) ', str(error))[-1]
    raise values.Wrong(key, value, needed) from None
