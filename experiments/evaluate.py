r"""Loss, perplexity and bits per byte of a trained run.

python experiments/evaluate.py --workdir=RUN [--split=validation] \
    [--set data.source=text_files --set data.files='DIR/*.txt']

Prints one JSON object. Another corpus is read with the run's own tokenizer.
"""

import json

from absl import flags

from t2x import main

_SPLIT = flags.DEFINE_multi_string('split', [], 'Default: data.eval_splits.')
_BATCHES = flags.DEFINE_integer(
  'max_batches', None, 'Default: the whole split.'
)
main.define_trained_flags()


def evaluate() -> None:
  from t2x.inference import evaluation
  from t2x.inference import loading

  main.use_compilation_cache()
  trained = loading.load(**main.load_arguments())
  result = evaluation.evaluate_splits(
    trained, _SPLIT.value, max_batches=_BATCHES.value
  )
  print(json.dumps({'step': trained.step, **result}))


if __name__ == '__main__':
  main.app_run(evaluate)
