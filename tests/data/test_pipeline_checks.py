import dataclasses

import numpy as np
import pytest

from t2x.data import config as config_lib
from t2x.data import input_pipeline
from t2x.data import tokenizers
from t2x.objectives import source_target
from t2x.objectives import span_corruption

DEFAULT = config_lib.DataConfig()


def _fails(match, **changes):
  with pytest.raises(ValueError, match=match):
    input_pipeline.check(dataclasses.replace(DEFAULT, **changes))


def test_default_passes():
  input_pipeline.check(DEFAULT)


def test_files_are_checked_before_anything_is_built(tmp_path):
  _fails('is empty; source text_files needs', source='text_files')
  _fails('matches no file', source='text_files', files=str(tmp_path / '*.txt'))


def test_pairs_need_both_field_and_objective():
  _fails(
    "target_field=None: objective 'source_target' needs a target field",
    objective=source_target.SourceTarget(),
  )
  _fails(
    "target_field='de': objective 'causal_lm' reads one text",
    target_field='de',
  )


def test_installed_docs_holds_no_pairs():
  _fails(
    "target_field='de': installed_docs holds no pairs",
    target_field='de',
    objective=source_target.SourceTarget(),
  )


def test_buckets():
  _fails(
    r'largest of data\.batching\.buckets=\(128, 512\) exceeds data.length=256',
    batching=config_lib.Pad(buckets=(128, 512)),
  )
  for buckets in ((128, 64), (64, 64), (0, 64)):
    with pytest.raises(ValueError, match='must be ascending positive lengths'):
      config_lib.Pad(buckets=buckets)


def test_more_spans_than_sentinels():
  span = span_corruption.SpanCorruption()
  _fails(
    r'length=2048 .* drops 114 spans, but data\.tokenizer\.num_sentinels=100',
    length=2048,
    objective=span,
  )
  input_pipeline.check(
    dataclasses.replace(DEFAULT, length=1024, objective=span)
  )
  input_pipeline.check(
    dataclasses.replace(
      DEFAULT,
      length=2048,
      objective=span,
      tokenizer=tokenizers.SentencePiece(num_sentinels=120),
    )
  )


@pytest.mark.parametrize(
  'name,value',
  [('length', 0), ('batch_size', 0), ('num_threads', -1), ('num_workers', -1)],
)
def test_numbers_in_range(name, value):
  with pytest.raises(
    ValueError, match=rf'data\.{name}={value}; it is \d or more'
  ):
    config_lib.DataConfig(**{name: value})


def test_spec_of_a_decoder():
  spec = input_pipeline.batch_spec(DEFAULT)
  assert set(spec) == {'inputs', 'targets', 'weights', 'segments', 'positions'}
  assert {shape for shape, _ in spec.values()} == {(32, 256)}
  assert spec['weights'][1] == np.float32 and spec['inputs'][1] == np.int32


def test_spec_of_an_encoder_decoder():
  config = dataclasses.replace(
    DEFAULT, length=512, objective=span_corruption.SpanCorruption()
  )
  spec = input_pipeline.batch_spec(config)
  assert spec['targets'][0] == (32, 128)
  assert spec['encoder_inputs'][0] == (32, 512)
  assert len(spec) == 8


def test_spec_is_of_the_largest_bucket():
  config = dataclasses.replace(
    DEFAULT, batching=config_lib.Pad(buckets=(32, 128))
  )
  assert input_pipeline.batch_spec(config)['inputs'][0] == (32, 128)
