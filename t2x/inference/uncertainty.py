"""How sure a model is of a text, and what to do where it is not.

Entropy of each next token, of one model, over dropout (Gal and Ghahramani,
2016) or over several models (Lakshminarayanan et al., 2017): what is left when
they agree is chance in the text, what they disagree about is what they do not
know (Houlsby et al., 2011). Spread over the meanings of drawn texts (after Kuhn
et al., 2023).

  trained = inference.load(workdir)
  uncertainty.token_scores([trained], ['A text.'])[0].entropies
  uncertainty.answer(trained, ['A question'], num_tokens=20, least=-1.5)

Shape suffixes: B batch, T position, V vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib
from t2x.inference import embeddings
from t2x.inference import generation
from t2x.inference import trained_model
from t2x.layers import dropout
from t2x.models import decoder
from t2x.parallel import sharding

_ROWS = 4  # Texts at a time: each position has a distribution of its own.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """What models say of the tokens of a text.

  Attributes:
    tokens: the ids that were predicted.
    log_probs: of each, under the mean of the models, nats.
    entropies: of that mean, nats: all that is uncertain.
    disagreement: the part of it on which the models differ (mutual
      information), nats; 0 with one model.
  """

  tokens: list[int]
  log_probs: list[float]
  entropies: list[float]
  disagreement: list[float]

  @property
  def total(self) -> float:
    """Log-probability of the text."""
    return sum(self.log_probs)

  @property
  def mean(self) -> float:
    """The same a token: minus the logarithm of the perplexity."""
    return self.total / max(len(self.log_probs), 1)


def token_scores(
  models: Sequence[trained_model.Trained],
  texts: Sequence[str],
  *,
  passes: int = 0,
  seed: int = 0,
) -> list[Scores]:
  """Returns the scores of texts.

  Args:
    models: decoders with one tokenizer; several are an ensemble, such as the
      checkpoints of a run.
    texts: what is scored; a prompt and its answer in one.
    passes: draws of dropout of each model; 0 is none.
    seed: of the draws.

  Raises:
    ValueError: no models or texts, one that is no decoder or has another
      tokenizer, passes without dropout, a text that is empty or too long.
  """
  _check(models, texts, passes)
  first = models[0]
  rows = first.prompt_ids(texts)
  length = first.config.data.length
  for number, row in enumerate(rows):
    if not 2 <= len(row) <= length:
      raise ValueError(
        f'Text {number} has {len(row)} tokens with its start; scores need 2 to '
        f'{length}, the length that the model was trained on.'
      )
  found = []
  for start in range(0, len(rows), _ROWS):
    part = rows[start : start + _ROWS]
    size = min(prompts_lib.power_of_two(max(map(len, part))), length)
    ids_BT = prompts_lib.pad(part, (_ROWS, size), 0)
    sums: Any = None
    for trained in models:
      for number in range(max(passes, 1)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        keys_B = dropout.row_keys(key, jnp.arange(start, start + _ROWS))
        with sharding.use(trained.mesh, trained.config.rules):
          given = _distribution(
            trained.model,
            ids_BT,
            keys_B if passes else None,
            jnp.float32(trained.temperature),
          )
        sums = given if sums is None else jax.tree.map(jnp.add, sums, given)
    members = len(models) * max(passes, 1)
    result = jax.device_get(_summed(*sums, ids_BT, jnp.float32(members)))
    for i, row in enumerate(part):
      cut = lambda a_BT, i=i, row=row: a_BT[i, : len(row) - 1].tolist()
      log_probs, entropies, disagreement = map(cut, result)
      found.append(
        Scores(
          tokens=row[1:],
          log_probs=log_probs,
          entropies=entropies,
          disagreement=disagreement,
        )
      )
  return found


@jax.jit
def _distribution(model, ids_BT, keys_B, temperature):
  """Returns probabilities of the next tokens (B, T, V), entropies (B, T)."""
  logits_BTV = model(ids_BT, keys_B=keys_B) / temperature
  log_probs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
  probs_BTV = jnp.exp(log_probs_BTV)
  return probs_BTV, -(probs_BTV * log_probs_BTV).sum(-1)


@jax.jit
def _summed(probs_BTV, entropies_BT, ids_BT, members):
  """Returns log-probabilities, entropies and disagreement of the mean."""
  mean_BTV = probs_BTV / members
  logs_BTV = jnp.log(jnp.maximum(mean_BTV, 1e-37))
  next_BT = jnp.concatenate([ids_BT[:, 1:], ids_BT[:, :1]], axis=1)
  own_BT = jnp.take_along_axis(logs_BTV, next_BT[..., None], axis=-1)[..., 0]
  entropy_BT = -(mean_BTV * logs_BTV).sum(-1)
  return own_BT, entropy_BT, entropy_BT - entropies_BT / members


def spread(
  texts: Sequence[str],
  *,
  encoder: trained_model.Trained | None = None,
  alike: float | None = None,
) -> float:
  """Returns the entropy of the meanings of texts that answer one prompt, nats.

  Texts that are alike form a group, as do those between which others lead; 0 if
  all mean the same, log(n) if each of n says something else.

  Args:
    texts: drawn for the same prompt.
    encoder: whose vectors tell what is alike, by their cosine; without one
      texts are, by the words that they share (Jaccard).
    alike: from where on two texts count as alike; default 0.9 for cosines, 0.5
      for words.

  Raises:
    ValueError: no texts.
  """
  if not texts:
    raise ValueError('There are no texts whose spread could be told.')
  if encoder is None:
    words = [frozenset(text.lower().split()) for text in texts]
    similar = [[_jaccard(a, b) for b in words] for a in words]
    least = 0.5 if alike is None else alike
  else:
    vectors_ND = embeddings.embed(encoder, list(texts))
    similar = (vectors_ND @ vectors_ND.T).tolist()
    least = 0.9 if alike is None else alike
  groups = _groups(np.array(similar) >= least)
  sizes = np.bincount(groups) / len(texts)
  return float(-(sizes * np.log(sizes)).sum())


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
  return len(a & b) / len(a | b) if a | b else 1.0


def _groups(alike: np.ndarray) -> np.ndarray:
  """Returns the number of each text's group, from 0."""
  found = np.arange(len(alike))
  for i, j in zip(*np.nonzero(alike)):
    found[found == found[i]] = found[j]
  return np.unique(found, return_inverse=True)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """A text that the model is sure enough of, or why there is none.

  Attributes:
    text: None where every try was below the threshold.
    score: of the best try: its mean log-probability a token.
    tries: texts that were drawn.
    spread: over the meanings of the last tries, nats.
  """

  text: str | None
  score: float
  tries: int
  spread: float


def answer(
  trained: trained_model.Trained,
  prompts: Sequence[str],
  *,
  num_tokens: int,
  sampling: sampling_lib.SamplingConfig | None = None,
  samples: int = 4,
  rounds: int = 1,
  least: float = -math.inf,
  stop_below: float = 0.0,
  rank: Callable[[str, float], float] | None = None,
  seed: int = 0,
) -> list[Answer]:
  """Draws texts, takes the one that the model is surest of, or abstains.

  Args:
    trained: a decoder or an encoder-decoder.
    prompts: as for `generation.generate_text`.
    num_tokens: the most new tokens.
    sampling: how they are drawn.
    samples: texts of a prompt in a round, of which the best is taken.
    rounds: at most so many; one more where the best is below `least`.
    least: mean log-probability a token below which there is no answer.
    stop_below: a text ends before its first token of a probability below it.
    rank: (text, score) -> what decides instead of the score.
    seed: of what is drawn.

  Raises:
    ValueError: as `generate_text`; samples or rounds below 1.
  """
  if samples < 1 or rounds < 1 or not 0 <= stop_below < 1:
    raise ValueError(
      f'samples={samples}, rounds={rounds}, stop_below={stop_below}: the first '
      'two are 1 or more, the last is in [0, 1).'
    )
  rank = rank or (lambda text, score: score)
  found: list[Answer | None] = [None] * len(prompts)
  for number in range(rounds):
    open_ = [
      i for i, own in enumerate(found) if own is None or own.score < least
    ]
    if not open_:
      break
    asked = [prompts[i] for i in open_ for _ in range(samples)]
    texts = _drawn(
      trained, asked, num_tokens, sampling, seed * rounds + number, stop_below
    )
    for place, i in enumerate(open_):
      own = texts[place * samples : (place + 1) * samples]
      text, score = max(own, key=lambda pair: rank(*pair))
      before = found[i]
      if before is not None and before.score >= score:
        text, score = before.text, before.score
      found[i] = Answer(
        text=text,
        score=score,
        tries=(number + 1) * samples,
        spread=spread([text for text, _ in own]),
      )
  sure = lambda own: own.score >= least
  return [
    own if sure(own) else dataclasses.replace(own, text=None)
    for own in found
    if own is not None
  ]


def _drawn(trained, prompts, num_tokens, sampling, seed, stop_below):
  """Returns (text, mean log-probability a token) of each prompt."""
  result = generation.generation(
    trained, prompts, num_tokens=num_tokens, sampling=sampling, seed=seed
  )
  least = math.log(stop_below) if stop_below else -math.inf
  tokens, means = [], []
  for ids, log_probs in zip(result.tokens, result.log_probs):
    doubtful = [i for i, own in enumerate(log_probs) if own < least]
    end = doubtful[0] if doubtful else len(ids)
    tokens.append(ids[:end])
    means.append(sum(log_probs[:end]) / end if end else -math.inf)
  return list(zip(trained.texts(prompts, tokens), means))


def _check(models, texts, passes: int) -> None:
  if not models or not texts:
    raise ValueError('token_scores needs a model and a text at least.')
  for trained in models:
    if not isinstance(trained.model, decoder.Decoder):
      raise ValueError(
        f'{type(trained.model).__name__} gives no probability of a next token '
        'after a text alone: scores are of decoders.'
      )
    if trained.tokenizer.fingerprint != models[0].tokenizer.fingerprint:
      raise ValueError(
        'The models have different tokenizers, so that their tokens cannot be '
        'compared. Take models of one run, or of runs with one tokenizer.'
      )
    config = trained.config.model
    rates = [config.dropout, *(k.dropout for k in config.kinds)]
    if passes and not any(rates):
      raise ValueError(
        f'passes={passes} draws dropout, and the model has none. Load it with '
        "inference.load(workdir, settings=['model.dropout=0.1'])."
      )
