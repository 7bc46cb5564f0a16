import gzip
import json
import os

import pytest

from t2x.data import text_files


def _read(*paths, text_field='text', target_field=None):
  return list(
    text_files.read([str(p) for p in paths], text_field, target_field)
  )


def test_reads_all_four_kinds(tmp_path):
  (tmp_path / 'a.txt').write_text('one\n')
  (tmp_path / 'b.txt.gz').write_bytes(gzip.compress(b'two'))
  lines = '\n'.join(json.dumps({'text': t, 'n': 1}) for t in ('three', 'four'))
  (tmp_path / 'c.jsonl').write_text(lines + '\n')
  (tmp_path / 'd.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  paths = text_files.find(f'{tmp_path}/*.txt*, {tmp_path}/*.jsonl*')
  documents = _read(*paths)
  assert [d.text for d in documents] == [
    'one\n', 'two', 'three', 'four', 'three', 'four',
  ]  # fmt: skip
  assert [d.id for d in documents] == [
    'a.txt', 'b.txt.gz', 'c.jsonl:1', 'c.jsonl:2',
    'd.jsonl.gz:1', 'd.jsonl.gz:2',
  ]  # fmt: skip


def test_pairs(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"en": "yes", "de": "ja"}\n\n{"en": "no", "de": " "}\n')
  documents = _read(path, text_field='en', target_field='de')
  assert documents == [('a.jsonl:1', 'yes', 'ja'), ('a.jsonl:3', 'no', ' ')]


def test_lines_end_at_line_feeds_alone(tmp_path):
  odd = 'a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\rh'
  record = json.dumps({'text': odd}, ensure_ascii=False)
  path = tmp_path / 'a.jsonl'
  path.write_bytes(f'\ufeff{record}\r\n\r\n{record}\n'.encode())
  assert _read(path) == [('a.jsonl:1', odd, ''), ('a.jsonl:3', odd, '')]
  (tmp_path / 'a.txt').write_bytes(f'\ufeff{odd}\r\n'.encode())
  assert _read(tmp_path / 'a.txt') == [('a.txt', odd + '\r\n', '')]


@pytest.mark.parametrize(
  'value, text',
  [
    ('true', 'true'),
    ('false', 'false'),
    ('3', '3'),
    ('-0', '0'),
    ('3.0', '3.0'),
    ('0.50', '0.5'),
    ('1e3', '1000.0'),
    ('12345678901234567890123', '12345678901234567890123'),
    ('"true"', 'true'),
  ],
)
def test_labels_that_are_no_text(tmp_path, value, text):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{{"text": "a", "label": {value}}}')
  (document,) = _read(path, target_field='label')
  assert document.target == text


@pytest.mark.parametrize(
  'value, name',
  [
    ('null', 'null'),
    ('[1]', 'a list'),
    ('{"a": 1}', 'an object'),
    ('NaN', 'nan'),
    ('-1e999', '-inf'),
  ],
)
def test_labels_that_cannot_be(tmp_path, value, name):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'\n{{"text": "a", "label": {value}}}')
  with pytest.raises(
    ValueError, match=f"a.jsonl:2: field 'label' is {name}; a target .* text"
  ) as error:
    _read(path, target_field='label')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'line, message',
  [
    ('[' * 100_000, r'a.jsonl:2 is not JSON \(it is nested too deeply'),
    ('{"text": "a", "x": ' + '[' * 9999 + ']' * 9999 + '}', 'too deeply'),
    ('{"a": ' * 50_000, 'a.jsonl:2 is not JSON .*too deeply'),
    (
      '{"text": "a", "n": ' + '1' * 5000 + '}',
      r'a.jsonl:2 is not JSON \(a number has more than 4300 digits\)',
    ),
    ('{"text": "a", "text": "b"}', "a.jsonl:2: field 'text' stands .* 2 times"),
    ('{"text": "a"} {"text": "b"}', 'a.jsonl:2 is not JSON .Extra data'),
  ],
)
def test_lines_that_json_cannot_hold(tmp_path, line, message):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n' + line)
  with pytest.raises(ValueError, match=message) as error:
    _read(tmp_path / 'a.jsonl')
  assert '\n' not in str(error.value) and len(str(error.value)) < 400


def test_what_is_not_read_may_be_odd(tmp_path):
  line = '{"a": {"text": 1, "text": 2}, "n": NaN, "n": 1e999, "text": "b"}'
  (tmp_path / 'a.jsonl').write_text(line)
  assert _read(tmp_path / 'a.jsonl') == [('a.jsonl:1', 'b', '')]


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
  text = ''.join(f'paragraph {i} ' + 'x' * 700 + '\n\n\n' for i in range(200))
  (tmp_path / 'a.txt').write_text(text)
  documents = _read(tmp_path / 'a.txt')
  assert ''.join(d.text for d in documents) == text
  assert len(documents) > 5
  assert max(len(d.text) for d in documents) <= 20_000
  assert all(d.text.startswith('paragraph') for d in documents)
  assert [d.id for d in documents[:3]] == ['a.txt', 'a.txt#1', 'a.txt#2']


def test_key_changes_with_files_and_fields(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('one')
  keys = [text_files.key([str(path)], 'text', None)]
  keys.append(text_files.key([str(path)], 'text', 'target'))
  keys.append(text_files.key([str(path)], 'body', None))
  path.write_text('longer')
  keys.append(text_files.key([str(path)], 'text', None))
  assert len(set(keys)) == 4
  assert text_files.key([str(path)], 'text', None) == keys[-1]


@pytest.mark.parametrize('files', ['', ' , '])
def test_no_files(files):
  with pytest.raises(ValueError, match='needs comma-separated globs. Set for'):
    text_files.find(files)


def test_glob_that_matches_nothing(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(ValueError, match=r"'.*/\*.md' matches no file .* quote"):
    text_files.find(f'{tmp_path}/*.txt,{tmp_path}/*.md')


def test_a_name_that_is_no_text(tmp_path):
  (tmp_path / os.fsdecode(b'a\xe9.txt')).write_text('x')
  with pytest.raises(ValueError, match=r"name '.*a.udce9.txt' is not UTF-8"):
    text_files.find(f'{tmp_path}/*.txt')


def test_unknown_type(tmp_path):
  (tmp_path / 'a.csv').write_text('x')
  with pytest.raises(
    ValueError, match=r"cannot read '.*a.csv'; expected one of"
  ):
    text_files.find(f'{tmp_path}/*')


@pytest.mark.parametrize('packed', [False, True])
def test_invalid_utf8(tmp_path, packed):
  data = b'gut\n' * 2 + b'gut ' * 8 + 'gr\xf6\xdfer'.encode('latin-1')
  path = tmp_path / ('a.txt.gz' if packed else 'a.txt')
  path.write_bytes(gzip.compress(data) if packed else data)
  with pytest.raises(
    ValueError,
    match=r'a.txt(.gz)?:3: not UTF-8: byte 0xf6 at offset 42. .*iconv',
  ):
    _read(path)


def test_invalid_utf8_in_jsonl_counts_from_the_start_of_the_file(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
  with pytest.raises(ValueError, match='a.jsonl:2: .* byte 0xff at offset 24'):
    _read(tmp_path / 'a.jsonl')


def test_bad_json_names_file_and_line(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n\n{"text": \n')
  with pytest.raises(ValueError, match='a.jsonl:3 is not JSON .* remove'):
    _read(tmp_path / 'a.jsonl')


def test_missing_field_lists_those_there(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"title": "a", "body": "b"}\n')
  with pytest.raises(
    ValueError,
    match=r"a.jsonl:1: no field 'text'; it has \['body', 'title'\]. Set "
    'data.text_field',
  ):
    _read(tmp_path / 'a.jsonl')
  with pytest.raises(ValueError, match='Set data.target_field to one of'):
    _read(tmp_path / 'a.jsonl', text_field='body', target_field='summary')


def test_field_that_is_no_text(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": 3}\n')
  with pytest.raises(ValueError, match="field 'text' must be text, found int"):
    _read(tmp_path / 'a.jsonl')
  (tmp_path / 'a.jsonl').write_text('[3]\n')
  with pytest.raises(ValueError, match='expected a JSON object .* found list'):
    _read(tmp_path / 'a.jsonl')


def test_half_a_surrogate_pair(tmp_path):
  (tmp_path / 'a.jsonl').write_text(r'{"text": "ab\ud800c"}')
  with pytest.raises(ValueError, match='a.jsonl:1: .* pair at character 2'):
    _read(tmp_path / 'a.jsonl')


def test_byte_order_mark_is_no_text(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'\xef\xbb\xbf{"text": "a"}')
  (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfa')
  documents = _read(tmp_path / 'a.jsonl', tmp_path / 'a.txt')
  assert [d.text for d in documents] == ['a', 'a']


@pytest.mark.parametrize('damage', ['short', 'flipped', 'other'])
def test_damaged_gzip(tmp_path, damage):
  data = bytearray(gzip.compress(bytes(range(256)) * 20))
  if damage == 'short':
    data = data[:-20]
  elif damage == 'flipped':
    data[40] ^= 0xFF
  else:
    data = b'no gzip at all'
  (tmp_path / 'a.txt.gz').write_bytes(data)
  with pytest.raises(ValueError, match='a.txt.gz: damaged gzip file .* again'):
    _read(tmp_path / 'a.txt.gz')


def test_target_field_needs_fields(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  with pytest.raises(
    ValueError, match="target_field='de' .* Give .jsonl files"
  ):
    _read(tmp_path / 'a.txt', target_field='de')
