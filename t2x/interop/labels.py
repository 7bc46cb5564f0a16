"""Classification heads and their labels in a config.json.

`architectures` gives the head, `id2label` the names of its classes, and
`problem_type` the meaning of its outputs: logits of a softmax (one label),
logits of a sigmoid each (several labels), or values (regression). As in
`transformers`, `id2label` takes precedence over `label2id` and `num_labels`;
without it there are two classes; and one class alone is a value.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from t2x.interop import values
from t2x.models import encoder
from t2x.models import model as model_lib

Hf = values.Hf

# Keys of labels: the heads on each token and on the whole text.
TOKENS = 'tokens'
TEXTS = 'class0'
SINGLE = 'single_label_classification'
MULTI = 'multi_label_classification'
VALUES = 'regression'
_OF_TEXTS, _OF_TOKENS = 'ForSequenceClassification', 'ForTokenClassification'
_UNKNOWN = ('ForQuestionAnswering', 'ForMultipleChoice')
_MOST = 2**20  # Bound of the number of labels of a head.


def sizes(hf: Hf) -> dict[str, Any]:
  """Returns the fields of an `EncoderConfig` for the head of a config.json.

  Raises:
    ValueError: t2x does not have the head, or its labels are invalid.
  """
  name = ' '.join(hf.get('architectures') or ())
  if any(name.endswith(unknown) for unknown in _UNKNOWN):
    raise ValueError(
      f'architectures={name} in the config: t2x has heads of {_OF_TEXTS}, '
      f'{_OF_TOKENS} and pretraining. For its body alone save the AutoModel of '
      'transformers in another directory.'
    )
  if name.endswith(_OF_TEXTS):
    problem(hf)
    return {'classes': (len(_names(hf)),)}
  return {'token_classes': len(_names(hf))} if _tags(hf) else {}


def read(hf: Hf, config: model_lib.ModelConfig) -> dict[str, list[str]]:
  """Returns the labels by the name of their head: `TOKENS` or `TEXTS`.

  Args:
    hf: parsed config.json.
    config: config of the model.
  """
  if getattr(config, 'token_classes', 0):
    return {TOKENS: _names(hf)}
  return {TEXTS: _names(hf)} if config.head_classes else {}


def check(
  labels: Mapping[str, Sequence[str]], tensors: Mapping[str, Any]
) -> None:
  """Checks that a head has as many rows as labels.

  Args:
    labels: labels by the name of their head.
    tensors: weights of the checkpoint by name; only shapes are read.

  Raises:
    ValueError: the numbers differ.
  """
  for names in labels.values():
    for weight in ('classifier.out_proj.weight', 'classifier.weight'):
      if weight in tensors and tensors[weight].shape[0] != len(names):
        raise ValueError(
          f'id2label has {len(names)} labels ({", ".join(names[:8])}), and '
          f'{weight} has {tensors[weight].shape[0]} rows: they are of '
          'different checkpoints. Copy config.json again.'
        )


def problem(hf: Hf) -> str:
  """Returns the meaning of the outputs of the head on texts.

  Returns:
    `SINGLE`, `MULTI` or `VALUES`; `SINGLE` if there is no such head.

  Raises:
    ValueError: the `problem_type` is not one that `transformers` has.
  """
  if not ' '.join(hf.get('architectures') or ()).endswith(_OF_TEXTS):
    return SINGLE
  given = hf.get('problem_type')
  if given is None:
    return VALUES if len(_names(hf)) == 1 else SINGLE
  if given not in (SINGLE, MULTI, VALUES):
    needed = f'one of {SINGLE}, {MULTI}, {VALUES}'
    raise values.Wrong('problem_type', given, needed)
  if given == SINGLE and len(_names(hf)) == 1:  # transformers refuses it too.
    needed = f'{MULTI} or {VALUES} where there is one label'
    raise values.Wrong('problem_type', given, needed)
  return given


def class_and_labels(
  config: encoder.EncoderConfig, suffix: str
) -> tuple[str, dict[str, Any]]:
  """Returns the class with a model's heads, and its entries of a config.json.

  Args:
    config: config of the model.
    suffix: name of the class of a model without a classification head, without
      the family's name, such as ForMaskedLM.

  Returns:
    The name of the class, likewise without the family's name, and the labels
    of its classification head, if it has one.

  Raises:
    ValueError: no class has these heads.
  """
  num = [
    *config.classes,
    *([config.token_classes] * bool(config.token_classes)),
  ]
  if len(num) > 1:
    raise ValueError(
      f'model.classes={config.classes} and model.token_classes='
      f'{config.token_classes}: a class of Hugging Face has one head of '
      'classes. Export a run that has one.'
    )
  if not num:
    return suffix, {}
  names = _of_labels([f'LABEL_{i}' for i in range(num[0])])
  return (_OF_TOKENS if config.token_classes else _OF_TEXTS), names


def with_labels(
  hf: Hf,
  config: model_lib.ModelConfig,
  labels: Mapping[str, Sequence[str]],
  problem: str,
) -> dict[str, Any]:
  """Returns a config.json with the labels of a model's head, if it has one.

  Args:
    hf: config.json to add to.
    config: config of the model.
    labels: labels by the name of their head.
    problem: `problem_type` of a head on texts.
  """
  hf = dict(hf)
  if getattr(config, 'token_classes', 0):
    names = labels.get(TOKENS)
  elif config.head_classes:
    names = labels.get(TEXTS)
    hf['problem_type'] = problem
  else:
    return hf
  return hf | (_of_labels(names) if names else {})


def _of_labels(names: Sequence[str]) -> dict[str, Any]:
  return {
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
  }


def _tags(hf: Hf) -> bool:
  return ' '.join(hf.get('architectures') or ()).endswith(_OF_TOKENS)


def _names(hf: Hf) -> list[str]:
  """Returns the labels in the order of their classes.

  Raises:
    ValueError: they are not numbered 0, 1, 2, ..., or two are the same.
  """
  given = hf.get('id2label')
  if given is None:
    number = 2 if hf.get('num_labels') is None else hf['num_labels']
    values.within('num_labels', number, above=0, below=_MOST, whole=True)
    return [f'LABEL_{i}' for i in range(number)]
  needed = 'a name of its own for each of 0, 1, 2, ...'
  if not isinstance(given, Mapping):
    raise values.Wrong('id2label', given, needed)
  numbers = {str(i): name for i, name in given.items()}
  names = [numbers.get(str(i)) for i in range(len(given))]
  whole = names and all(isinstance(name, str) for name in names)
  if not whole or len(set(names)) < len(names):
    raise values.Wrong('id2label', given, needed)
  return [str(name) for name in names]
