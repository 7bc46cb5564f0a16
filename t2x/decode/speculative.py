"""Speculative decoding: several tokens in one pass of the model.

A cheap draft proposes K tokens, the model computes the probabilities of all of
them in one pass, and a prefix of them is accepted. By the test of Leviathan et
al. (2023) the output has exactly the model's distribution, whatever the draft,
and at temperature 0 it is the model's own greedy output (except for ties that
rounding decides: a pass of several tokens sums in another order than a pass of
one token).

Shape suffixes: B batch, S positions.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from t2x.decode import decode_loop
from t2x.decode import drafts
from t2x.decode import generate as generate_lib
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib
from t2x.decode import speculative_loop
from t2x.models import decoder

Sampling = sampling_lib.SamplingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation(generate_lib.Generation):
  """Result of `speculate`; see `generate.Generation`.

  Attributes:
    proposed: number of drafted tokens of each prompt that were verified.
    accepted: number of those that were accepted.
    passes: number of passes of the model, each over all prompts.
  """

  proposed: list[int]
  accepted: list[int]
  passes: int


def speculate(
  model: decoder.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  draft: drafts.Draft,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  keys_B: jax.Array | None = None,
  forced: float | None = None,
  **options: Any,
) -> Speculation:
  """Generates as `generate.generate`, in fewer passes of the model.

  >>> from flax import nnx
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  >>> result = speculate(
  ...     model, [[1, 2, 1, 2]], num_tokens=5, draft=drafts.LookupDraft())
  >>> len(result.tokens[0])
  5

  Args:
    model: a `Decoder`.
    prompts: token ids of each prompt.
    num_tokens: the most new tokens of each prompt.
    draft: proposer of tokens: `ModelDraft`, `HeadsDraft` or `LookupDraft`.
    sampling: sampling settings, one for all prompts or one for each, without
      those that depend on the tokens so far.
    seed: random seed; the tokens drawn differ from those of `generate`.
    keys_B: random key of each prompt, which replaces `seed`.
    forced: probability of acceptance, for timings alone; see
      `speculative_loop.decode`.
    **options: fields of `prefill.GenerationOptions`, such as eos_id.

  Raises:
    ValueError: as `generate`; the draft has another vocabulary or no heads, the
      state of a layer cannot be rolled back, or a sampling setting depends on
      the tokens so far.
  """
  request = prefill.check(
    model, prompts, num_tokens, prefill.GenerationOptions(**options)
  )
  _check(model, draft)
  num_rows, vocab_size = request.num_rows, model.config.vocab_size
  configs = generate_lib.configs_of(sampling, len(prompts))
  for config in configs:
    _check_sampling(config)
  settings = sampling_lib.rows(configs, num_rows, vocab_size)
  keys_B = generate_lib.row_keys(keys_B, seed, len(prompts), num_rows)
  start = request.start(drafts.num_drafted(draft, model) + 1)
  capacity = start['capacity']
  state = speculative_loop.decode(
    model,
    **start,
    draft=draft,
    prompt_BS=prompts_lib.pad(
      request.rows, (num_rows, capacity), request.options.pad_id
    ),
    keys_B=keys_B,
    ended_B=np.arange(num_rows) >= len(prompts),
    num_tokens=np.int32(num_tokens),
    ends_BE=request.ends_BE,
    chunk=request.options.chunk,
    settings=settings,
    forced=forced,
  )
  return _to_lists(state, [len(row) for row in request.rows], num_tokens)


def _to_lists(
  state: speculative_loop.SpeculativeState,
  lengths: Sequence[int],
  num_tokens: int,
) -> Speculation:
  host = jax.device_get(dataclasses.replace(state, caches=None, draft=None))
  counts = host.count_B[: len(lengths)].tolist()
  cut = lambda array_BS: [
    row[start : start + count].tolist()
    for row, start, count in zip(array_BS, lengths, counts)
  ]
  return Speculation(
    tokens=cut(host.text_BS),
    log_probs=cut(host.log_probs_BS),
    ended=[count < num_tokens for count in counts],
    proposed=host.proposed_B[: len(lengths)].tolist(),
    accepted=host.accepted_B[: len(lengths)].tolist(),
    passes=int(host.passes),
  )


def _check(model: decode_loop.Model, draft: drafts.Draft) -> None:
  models = [model]
  if isinstance(model, decoder.Decoder) and not model.towers:
    raise ValueError(
      f'{type(model).__name__} is several decoders, which speculation does not '
      'run: write with generate.'
    )
  if not isinstance(model, decoder.Decoder):
    raise ValueError(
      f'{type(model).__name__} cannot check drafts: only a Decoder can.'
    )
  if isinstance(draft, drafts.HeadsDraft) and not model.ahead:
    raise ValueError(
      'HeadsDraft drafts by the heads of model.ahead, and the model has none. '
      'Train it with some, such as model.ahead=0.5, or take another draft.'
    )
  if isinstance(draft, drafts.ModelDraft):
    if not isinstance(draft.model, decoder.Decoder):
      raise ValueError(
        f'{type(draft.model).__name__} cannot draft: only a Decoder can.'
      )
    prefill.check_model(draft.model)
    ours, theirs = (m.config.vocab_size for m in (model, draft.model))
    if ours != theirs:
      raise ValueError(
        f'The draft has a vocabulary of {theirs} tokens and the model one of '
        f'{ours}. Draft with a model of the same tokenizer.'
      )
    models.append(draft.model)
  num = drafts.num_drafted(draft, model)
  if not 1 <= num < 64 or getattr(draft, 'match', 1) < 1:
    raise ValueError(f'{draft}: it drafts 1 to 63 tokens, matching 1 or more.')
  for kind in (kind for m in models for kind in m.config.kinds):
    if kind.decoding == 'a state of constant size':
      raise ValueError(
        f'attention.kind={kind.kind} keeps {kind.decoding}, from which drafted '
        'tokens that are refused cannot be taken back. Use generate.'
      )


def _check_sampling(config: Sampling) -> None:
  plain = Sampling()
  for name in (
    'repetition_penalty',
    'presence_penalty',
    'frequency_penalty',
    'min_tokens',
    'banned',
    'banned_words',
    'first',
    'not_first',
  ):
    value = getattr(config, name)
    if value != getattr(plain, name) and value not in ([], ()):
      raise ValueError(
        f'sampling.{name}={getattr(config, name)!r} depends on the text so '
        'far, which a draft does not know. Leave it out, or use generate.'
      )
