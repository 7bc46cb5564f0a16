r"""Text from a trained run.

python experiments/generate.py --workdir=RUN --prompt='The function returns' \
    --prompt='A list of' --num_tokens=64 --temperature=0.8 --top_p=0.9 --seed=0

Prompts may also come from a file, one a line: --prompt_file=FILE. An
encoder-decoder reads the prompt as its source and answers it; there
<extra_id_0>, <extra_id_1>, ... stand for spans to fill in.
"""

from absl import flags

from t2x import main
from t2x.decode import sampling

_PROMPT = flags.DEFINE_multi_string('prompt', [], 'A prompt; may repeat.')
_PROMPT_FILE = flags.DEFINE_string('prompt_file', None, 'One prompt a line.')
_NUM_TOKENS = flags.DEFINE_integer('num_tokens', 64, 'The most new tokens.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, '0 takes the likeliest.')
_TOP_K = flags.DEFINE_integer('top_k', None, 'Draw from the k likeliest.')
_TOP_P = flags.DEFINE_float('top_p', None, 'Draw from this probability mass.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn.')
_MAX_LENGTH = flags.DEFINE_integer(
  'max_length', None, 'Tokens of a sequence; default as in training.'
)
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
_IGNORE_END = flags.DEFINE_bool(
  'ignore_end', False, 'Go on past the end token.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Also write JSON to this file.')
flags.DEFINE_string('workdir', None, 'The run.')
main.define_set_flag()


def generate() -> None:
  from t2x import inference

  config = sampling.SamplingConfig(
    temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value
  )
  prompts = inference.read_lines(_PROMPT.value, _PROMPT_FILE.value, 'prompt')
  main.use_compilation_cache()
  trained = inference.load(
    main.workdir(), step=_STEP.value, settings=flags.FLAGS.set
  )
  texts = inference.generate_text(
    trained,
    prompts,
    num_tokens=_NUM_TOKENS.value,
    sampling=config,
    seed=_SEED.value,
    ignore_end=_IGNORE_END.value,
    max_length=_MAX_LENGTH.value,
  )
  for prompt, text in zip(prompts, texts):
    print(f'--- {prompt}\n{text}\n')
  if _OUTPUT.value:
    inference.write_samples(_OUTPUT.value, prompts, texts)


if __name__ == '__main__':
  main.app_run(generate)
