"""What a config.json says of heads of classes."""

import extras
import pytest

from t2x.interop import configs
from t2x.interop import labels as labels_lib
from t2x.models import encoder

transformers = extras.need('transformers', extra='reference')

pytestmark = pytest.mark.reference

SIZES = dict(
  hidden_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  intermediate_size=40,
  max_position_embeddings=34,
)


def config_of(**fields):
  return {
    'model_type': 'bert', 'vocab_size': 9,
    'architectures': ['BertForSequenceClassification'], **SIZES, **fields,
  }  # fmt: skip


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'architectures': ['BertForQuestionAnswering']}, 'BertForQuestionAnswer'),
    ({'architectures': ['RobertaForMultipleChoice']}, 'save the AutoModel'),
    ({'id2label': {'0': 'a', '2': 'b'}}, 'id2label=.* a name of its own for'),
    ({'id2label': {'0': 'a', '1': 'a'}}, 'id2label=.* a name of its own for'),
    ({'id2label': {}}, 'id2label={}; it must be a name of its own'),
    ({'id2label': ['a', 'b']}, r"id2label=\['a', 'b'\]; it must be a name"),
    ({'num_labels': '3'}, "num_labels='3'; it must be a whole number above 0"),
    ({'num_labels': 10**400}, 'num_labels=1000.* and below'),
    (
      {'num_labels': 1, 'problem_type': 'single_label_classification'},
      'it must be multi_label_classification or regression where',
    ),
    ({'problem_type': 'ranking'}, "problem_type='ranking'; it must be one of"),
  ],
)
def test_messages(fields, message):
  with pytest.raises(ValueError, match=message) as error:
    configs.to_t2x(config_of(**fields))
  assert '\n' not in str(error.value)


def test_labels_where_a_config_says_less():
  """As `transformers` takes them."""
  for fields in ({}, {'num_labels': 3}, {'id2label': {0: 'x', 1: 'y'}}):
    theirs = transformers.BertConfig(**SIZES, **fields)
    family, config = configs.to_t2x(config_of(**fields))
    names = labels_lib.read(config_of(**fields), config)['class0']
    assert dict(enumerate(names)) == theirs.id2label
    assert config.classes == (len(names),)


def test_several_heads_have_no_class():
  config = encoder.EncoderConfig(pooler=True, classes=(2, 3))
  with pytest.raises(ValueError, match='a class of Hugging Face has one head'):
    labels_lib.class_and_labels(config, 'Model')
