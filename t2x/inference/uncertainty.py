"""Uncertainty of generated texts, and abstaining where it is high.

`token_scores` gives the entropy of each next token: of one model, averaged over
dropout masks (Gal and Ghahramani, 2016), or averaged over several models
(Lakshminarayanan et al., 2017). The mutual information between the prediction
and the choice of model is the part that comes from what the models do not know;
the rest is chance in the text (Houlsby et al., 2011). `spread` is an entropy
over the meanings of sampled texts (after Kuhn et al., 2023).

  trained = loading.load(workdir)
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

_ROWS = 4  # Texts in a batch; few, since each needs (T, V) probabilities.


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleScores:
  """Scores of the tokens of a text, under the mean of several models.

  Attributes:
    tokens: ids of the predicted tokens: all but the first.
    log_probs: log-probability of each token under the models' mean, in nats.
    entropies: entropy of the mean distribution at each token, in nats: the
      total uncertainty.
    disagreement: mutual information between the token and the choice of model,
      in nats: the part of the entropy on which the models differ; 0 for one
      model.
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
    """Mean log-probability of a token: minus the log of the perplexity."""
    return self.total / max(len(self.log_probs), 1)


def token_scores(
  models: Sequence[trained_model.Trained],
  texts: Sequence[str],
  *,
  passes: int = 0,
  seed: int = 0,
) -> list[EnsembleScores]:
  """Returns the scores of the tokens of texts.

  Args:
    models: decoders with one tokenizer; several are an ensemble, such as the
      checkpoints of a run.
    texts: texts to score, each a prompt followed by its answer.
    passes: number of dropout masks drawn for each model; 0 for no dropout.
    seed: seed of the dropout masks.

  Raises:
    ValueError: there are no models or texts, a model is not a decoder or has
      another tokenizer, `passes` is given to a model without dropout, or a text
      is empty or too long.
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
  scores = []
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
          outputs = _distribution(
            trained.model,
            ids_BT,
            keys_B if passes else None,
            jnp.float32(trained.temperature),
          )
        if sums is not None:
          outputs = jax.tree.map(jnp.add, sums, outputs)
        sums = outputs
    members = len(models) * max(passes, 1)
    result = jax.device_get(_summed(*sums, ids_BT, jnp.float32(members)))
    for i, row in enumerate(part):
      cut = lambda a_BT, i=i, row=row: a_BT[i, : len(row) - 1].tolist()
      log_probs, entropies, disagreement = map(cut, result)
      scores.append(
        EnsembleScores(
          tokens=row[1:],
          log_probs=log_probs,
          entropies=entropies,
          disagreement=disagreement,
        )
      )
  return scores


@jax.jit
def _distribution(
  model: decoder.Decoder,
  ids_BT: jax.Array,
  keys_B: jax.Array | None,
  temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns probabilities of the next tokens (B, T, V), entropies (B, T).

  Args:
    model: a decoder.
    ids_BT: token ids.
    keys_B: keys of dropout; None for no dropout.
    temperature: divisor of the logits.
  """
  logits_BTV = model(ids_BT, keys_B=keys_B) / temperature
  log_probs_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
  probs_BTV = jnp.exp(log_probs_BTV)
  return probs_BTV, -(probs_BTV * log_probs_BTV).sum(-1)


@jax.jit
def _summed(
  probs_BTV: jax.Array,
  entropies_BT: jax.Array,
  ids_BT: jax.Array,
  members: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns log-probabilities, entropies and disagreement of the mean.

  Args:
    probs_BTV: sum over members of the probabilities of the next tokens.
    entropies_BT: sum over members of the entropies.
    ids_BT: token ids.
    members: number of members: of models times dropout masks.
  """
  mean_BTV = probs_BTV / members
  logs_BTV = jnp.log(jnp.maximum(mean_BTV, 1e-37))
  next_BT = jnp.concatenate([ids_BT[:, 1:], ids_BT[:, :1]], axis=1)
  log_prob_BT = jnp.take_along_axis(logs_BTV, next_BT[..., None], -1)[..., 0]
  entropy_BT = -(mean_BTV * logs_BTV).sum(-1)
  return log_prob_BT, entropy_BT, entropy_BT - entropies_BT / members


def spread(
  texts: Sequence[str],
  *,
  encoder: trained_model.Trained | None = None,
  alike: float | None = None,
) -> float:
  """Returns the entropy, in nats, of the meanings of texts for one prompt.

  Texts form a group of one meaning if they are similar, directly or through
  other texts. The entropy of the groups' shares is 0 if all n texts mean the
  same, and log(n) if each means something else.

  Args:
    texts: texts that were sampled for the same prompt.
    encoder: model of which the cosines between embeddings are the similarities;
      None compares the sets of words instead (Jaccard index).
    alike: least similarity of two similar texts; default 0.9 for cosines, 0.5
      for sets of words.

  Raises:
    ValueError: there are no texts.
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
  """Returns the number, from 0, of the connected component of each text."""
  groups = np.arange(len(alike))
  for i, j in zip(*np.nonzero(alike)):
    groups[groups == groups[i]] = groups[j]
  return np.unique(groups, return_inverse=True)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """A text that the model is sure enough of, or an abstention.

  Attributes:
    text: best text; None if the scores of all texts were below the threshold.
    score: mean log-probability of a token of the best text, in nats.
    tries: number of texts that were sampled.
    spread: entropy of the meanings of the last round's texts, in nats.
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
  """Samples texts and returns the likeliest for each prompt, or abstains.

  Args:
    trained: a decoder or an encoder-decoder.
    prompts: texts, as for `generation.generate_text`.
    num_tokens: greatest number of new tokens of a text.
    sampling: temperature, top-k and the like; None for the checkpoint's own.
    samples: number of texts of a prompt in a round.
    rounds: greatest number of rounds; a further one runs for prompts whose best
      score is below `least`.
    least: mean log-probability of a token below which there is no answer.
    stop_below: probability; a text ends before its first token below it.
    rank: function from a text and its score to the value that decides which
      text is best; None for the score.
    seed: seed of the sampling.

  Raises:
    ValueError: `generate_text` raises it, or `samples`, `rounds` or
      `stop_below` is out of range.
  """
  if samples < 1 or rounds < 1 or not 0 <= stop_below < 1:
    raise ValueError(
      f'samples={samples}, rounds={rounds}, stop_below={stop_below}: the first '
      'two are 1 or more, the last is in [0, 1).'
    )
  rank = rank or (lambda text, score: score)
  answers: list[Answer | None] = [None] * len(prompts)
  for number in range(rounds):
    open_ = [i for i, a in enumerate(answers) if a is None or a.score < least]
    if not open_:
      break
    asked = [prompts[i] for i in open_ for _ in range(samples)]
    texts = _drawn(
      trained, asked, num_tokens, sampling, seed * rounds + number, stop_below
    )
    for place, i in enumerate(open_):
      candidates = texts[place * samples : (place + 1) * samples]
      text, score = max(candidates, key=lambda pair: rank(*pair))
      before = answers[i]
      if before is not None and before.score >= score:
        text, score = before.text, before.score
      answers[i] = Answer(
        text=text,
        score=score,
        tries=(number + 1) * samples,
        spread=spread([text for text, _ in candidates]),
      )
  return [
    a if a.score >= least else dataclasses.replace(a, text=None)
    for a in answers
    if a is not None
  ]


def _drawn(
  trained: trained_model.Trained,
  prompts: Sequence[str],
  num_tokens: int,
  sampling: sampling_lib.SamplingConfig | None,
  seed: int,
  stop_below: float,
) -> list[tuple[str, float]]:
  """Returns a text for each prompt, and its mean log-probability of a token."""
  result = generation.generation(
    trained, prompts, num_tokens=num_tokens, sampling=sampling, seed=seed
  )
  least = math.log(stop_below) if stop_below else -math.inf
  tokens, means = [], []
  for ids, log_probs in zip(result.tokens, result.log_probs):
    doubtful = [i for i, value in enumerate(log_probs) if value < least]
    end = doubtful[0] if doubtful else len(ids)
    tokens.append(ids[:end])
    means.append(sum(log_probs[:end]) / end if end else -math.inf)
  return list(zip(trained.detokenize(prompts, tokens), means))


def _check(
  models: Sequence[trained_model.Trained], texts: Sequence[str], passes: int
) -> None:
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
        "loading.load(workdir, settings=['model.dropout=0.1'])."
      )
