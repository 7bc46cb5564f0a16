r"""Text from a trained run.

python experiments/generate.py --workdir=RUN --prompt='The function returns' \
    --prompt='A list of' --num_tokens=64 --temperature=0.8 --top_p=0.9 --seed=0

RUN is a run, or the directory of a decoder or T5 of Hugging Face whose family
comes in (docs/inference.md). Prompts may also come from a file, one a line:
--prompt_file=FILE. An encoder-decoder reads the prompt as its source and
answers it; there <extra_id_0>, <extra_id_1>, ... stand for spans to fill in.

With --num_beams=4 nothing is drawn: beam search finds the likeliest texts, and
--num_best=2 prints two of each prompt with their scores.

--regex, --schema_file, --grammar_file and --keyword say what a text must be or
hold; --expert=RUN steers it towards the texts of another run.
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from t2x import main
from t2x import reading
from t2x.decode import sampling

_PROMPT = flags.DEFINE_multi_string('prompt', [], 'A prompt; may repeat.')
_PROMPT_FILE = flags.DEFINE_string('prompt_file', None, 'One prompt a line.')
_NUM_TOKENS = flags.DEFINE_integer('num_tokens', 64, 'The most new tokens.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 takes the likeliest.')
_TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from the k likeliest.')
_TOP_P = flags.DEFINE_float('top_p', None, 'Draw from this probability mass.')
_MIN_P = flags.DEFINE_float('min_p', None, 'Least share of the largest chance.')
_TYPICAL_P = flags.DEFINE_float(
  'typical_p', None, 'Draw what is about as surprising as expected.'
)
_REPETITION = flags.DEFINE_float(
  'repetition_penalty', 1.0, 'Above 1 weakens tokens that are there already.'
)
_PRESENCE = flags.DEFINE_float(
  'presence_penalty', 0.0, 'Subtracted from logits of tokens written before.'
)
_FREQUENCY = flags.DEFINE_float(
  'frequency_penalty', 0.0, 'The same, times how often.'
)
_MIN_TOKENS = flags.DEFINE_integer('min_tokens', 0, 'Before a text may end.')
_BANNED = flags.DEFINE_multi_string(
  'banned', [], 'What no text holds, not even within a word; may repeat.'
)
_STOP = flags.DEFINE_multi_string(
  'stop', [], 'A text ends before this; may repeat.'
)
_POST = flags.DEFINE_multi_string(
  'post', [], 'detokenize, lower, sentence_case or strip; may repeat.'
)
_NUM_BEAMS = flags.DEFINE_integer('num_beams', 1, 'Search instead of drawing.')
_NUM_BEST = flags.DEFINE_integer('num_best', 1, 'Texts that a search prints.')
_LENGTH_PENALTY = flags.DEFINE_float(
  'length_penalty', 1.0, 'Of a search; above 0 favours longer texts.'
)
_REGEX = flags.DEFINE_string('regex', None, 'What the text must match.')
_GRAMMAR = flags.DEFINE_string(
  'grammar_file', None, 'Of a context-free grammar, in Lark, that it must meet.'
)
_SCHEMA = flags.DEFINE_string(
  'schema_file', None, 'Of a JSON schema that it must meet.'
)
_KEYWORD = flags.DEFINE_multi_string(
  'keyword', [], 'A word that the text must hold; may repeat.'
)
_EXPERT = flags.DEFINE_string(
  'expert', None, 'A run that the text is steered towards.'
)
_ANTI_EXPERT = flags.DEFINE_string(
  'anti_expert', None, 'A run that it is steered away from, with --expert.'
)
_STRENGTH = flags.DEFINE_float('strength', 2.0, 'How much --expert steers.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn.')
_MAX_LENGTH = flags.DEFINE_integer(
  'max_length', None, 'Tokens of a sequence; default as in training.'
)
_IGNORE_END = flags.DEFINE_bool(
  'ignore_end', False, 'Go on past the end token.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Also write JSON to this file.')
main.define_trained_flags()


def generate() -> None:
  from t2x.inference import detokenize
  from t2x.inference import generation as generation_lib
  from t2x.inference import loading
  from t2x.trainer import workdir

  detokenize.apply(_POST.value, '')  # What is wrong is said at once.
  prompts = main.read_lines(_PROMPT.value, _PROMPT_FILE.value, 'prompt')
  _sampling({})
  beams, wanted = _beams(), _wanted()
  for name in ('anti_expert', 'strength'):
    if flags.FLAGS[name].present and not _EXPERT.value:
      sys.exit(f'error: --{name} needs --expert, what to write instead.')
  main.use_compilation_cache()
  trained = loading.load(**main.load_arguments())
  trained = _steered(trained)
  banned = trained.banned(_BANNED.value)
  own = trained.generation
  if beams is not None:
    config = _sampling(own.searching, banned)
    beams = _searched(beams, own.search)
    found = generation_lib.search_text(
      trained,
      prompts,
      beams=beams,
      num_best=_NUM_BEST.value,
      sampling=config,
      keywords=_KEYWORD.value,
      num_tokens=_NUM_TOKENS.value,
      max_length=_MAX_LENGTH.value,
    )
    prompts = [p for p, texts in zip(prompts, found) for _ in texts]
    notes = [f'  (score {x:.4f})' for texts in found for _, x in texts]
    texts = [text for texts in found for text, _ in texts]
  else:
    config = _sampling(own.sampling, banned)
    texts = _drawn(trained, prompts, config, wanted)
    notes = [''] * len(texts)
  texts = [detokenize.apply(_POST.value, text) for text in texts]
  for prompt, note, text in zip(prompts, notes, texts):
    print(f'--- {prompt}{note}\n{text}\n')
  if _OUTPUT.value:
    workdir.write_samples(_OUTPUT.value, prompts, texts)


def _steered(trained):
  """Returns the run, steered where an expert is given."""
  from t2x.inference import loading
  from t2x.inference import steering

  if _EXPERT.value is None:
    return trained
  expert = loading.load(_EXPERT.value)
  anti = _ANTI_EXPERT.value
  anti = None if anti is None else loading.load(anti)
  return steering.experts(trained, expert, anti, strength=_STRENGTH.value)


def _drawn(trained, prompts, config, wanted) -> list[str]:
  """Returns a text for each prompt, held to what is wanted."""
  from t2x.inference import generation as generation_lib

  common: dict[str, Any] = {
    'num_tokens': _NUM_TOKENS.value,
    'sampling': config,
    'seed': _SEED.value,
    'max_length': _MAX_LENGTH.value,
    'stop': _STOP.value,
  }
  if wanted:
    from t2x.inference import constraints

    made = constraints.ConstraintFactory(trained).make(
      num_tokens=_NUM_TOKENS.value, **wanted
    )
    common['control'] = made
  return generation_lib.generate_text(
    trained, prompts, ignore_end=_IGNORE_END.value, **common
  )


def _wanted() -> dict[str, Any]:
  """Returns what the texts are held to, by the names of `Controls.make`."""
  wanted: dict[str, Any] = {}
  if _REGEX.value is not None:
    wanted['regex'] = _REGEX.value
  for name, flag in (('grammar', _GRAMMAR), ('json_schema', _SCHEMA)):
    if flag.value is not None:
      try:
        wanted[name] = reading.text(flag.value)
      except (OSError, ValueError) as error:
        sys.exit(f'error: --{flag.name}: {error}')
  if _KEYWORD.value:
    wanted['keywords'] = _KEYWORD.value
  if wanted and _IGNORE_END.value:
    sys.exit('error: --ignore_end: a text that is held to a rule ends with it.')
  return wanted


def _sampling(own, banned=None) -> sampling.SamplingConfig:
  """Returns what the flags say, and else what the checkpoint says (`own`)."""
  found = (
    _TEMPERATURE,
    _TOP_K,
    _TOP_P,
    _MIN_P,
    _TYPICAL_P,
    _REPETITION,
    _PRESENCE,
    _FREQUENCY,
    _MIN_TOKENS,
  )
  given = {
    flag.name: flag.value
    for flag in found
    if flag.present or flag.name not in own
  }
  return sampling.SamplingConfig(**{**own, **given}, banned_words=banned)


def _searched(beams, own):
  """Returns a search with what the checkpoint says where no flag does."""
  if _LENGTH_PENALTY.present:
    own = {k: v for k, v in own.items() if k != _LENGTH_PENALTY.name}
  return dataclasses.replace(beams, **own)


def _beams():
  """Returns the settings of a search, or None where tokens are drawn."""
  from t2x.decode import beams

  if _NUM_BEAMS.value == 1 and _NUM_BEST.value == 1:
    return None
  given = flags.FLAGS
  drawing = ('temperature', 'top_k', 'top_p', 'min_p', 'typical_p')
  rules = ('regex', 'grammar_file', 'schema_file')
  for name in (*drawing, *rules, 'stop', 'ignore_end', 'seed'):
    if given[name].present:
      sys.exit(
        f'error: --{name} has no place in a search, which draws nothing and '
        'ends by itself. Leave it out, or --num_beams.'
      )
  if _NUM_BEST.value > _NUM_BEAMS.value:
    sys.exit(
      f'error: --num_best={_NUM_BEST.value} of --num_beams={_NUM_BEAMS.value}: '
      'a search finds as many texts as it has beams. Raise --num_beams.'
    )
  return beams.BeamConfig(
    num_beams=_NUM_BEAMS.value, length_penalty=_LENGTH_PENALTY.value
  )


if __name__ == '__main__':
  main.app_run(generate)
