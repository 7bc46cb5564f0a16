"""Layouts against one device, and the mistakes that the comparison finds."""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
from optax.contrib import _muon
import pytest
import simulated
import tiny

from t2x.attention import ring
from t2x.compilation import program
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.layers import dropout
from t2x.layers import experts
from t2x.layers import sequence_parallel
from t2x.parallel import manual_sharding
from t2x.training import train_step
from t2x.verification import deviation
from t2x.verification import report
from t2x.verification import verify

SETTINGS = {
  'data__batch_size': 4,
  'data__eval_splits': '',
  'model__num_layers': 1,
  'train__scan_layers': False,
  'optim': 'sgd',
}


@pytest.fixture(scope='session')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('verify')


def verdict_of(directory, layout, num_steps=2, **settings):
  config = tiny.experiment_of(directory, **(SETTINGS | settings))
  layouts = [layout_flag.parse(layout)]
  (verdict,) = verify.verify(config, layouts, num_steps=num_steps)
  return verdict


# --- Planted faults: each is what a real mistake looks like. ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
  """A mistake in real code, which one device does not feel.

  Attributes:
    plant: puts it in.
    layout: that feels it.
    check: which is the first to see it.
    step: when.
    parameter: regular expression on the path that is named.
    settings: of the experiment.
  """

  plant: Callable[[pytest.MonkeyPatch], None]
  layout: str
  check: str
  parameter: str
  step: int = 1
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def own_part(x_BTD, axes):
  """A device's part of a sequence."""
  size = x_BTD.shape[1] // jax.lax.axis_size(axes)
  start = jax.lax.axis_index(axes) * size
  return jax.lax.dynamic_slice_in_dim(x_BTD, start, size, 1)


def missing_tensor_reduction(patch):
  """Each device goes on with what it alone has added to the output."""

  def scatter(x_BTD, axis):
    del axis
    axes = manual_sharding.fine_axes(manual=True)
    return own_part(x_BTD, axes) if axes else x_BTD

  patch.setattr(sequence_parallel, 'scatter', scatter)


def missing_tensor_reduction_of_gradients(patch):
  """The same in the backward pass, where the loss does not show it."""
  real = sequence_parallel.gather

  @jax.custom_vjp
  def gather(x_BTD):
    return real(x_BTD)

  def backward(_, grad_BTD):
    axes = manual_sharding.fine_axes(manual=True)
    return (own_part(grad_BTD, axes) if axes else grad_BTD,)

  gather.defvjp(lambda x_BTD: (gather(x_BTD), None), backward)
  patch.setattr(sequence_parallel, 'gather', gather)


def ring_order(patch):
  """Visitors go round the other way than the plan has it."""
  real = ring._Place.hop
  patch.setattr(ring._Place, 'hop', lambda *args: real(*args[:2], -args[2]))


def local_mean(patch):
  """Each device takes the mean of its own rows; then the mean of these."""
  real = train_step._accumulate

  def accumulate(trained, rest, batch, key, config):
    axes = train_step._manual_axes(config)
    if axes:
      total = batch['weights'].sum() * jax.lax.axis_size(axes)
      batch = {**batch, 'weights': batch['weights'] / total}
    return real(trained, rest, batch, key, config)

  patch.setattr(train_step, '_accumulate', accumulate)


def unfolded_dropout_key(patch):
  """A row's key comes from its number on the device, not in the batch."""
  real = dropout.row_keys
  patch.setattr(
    dropout, 'row_keys', lambda key, rows: real(key, jnp.arange(rows.shape[0]))
  )


def swapped_expert(patch):
  """Tokens travel to the experts of the device beside the right one."""
  real = experts._all_to_all

  def all_to_all(x, axes, split, concat):
    there, rows = split == 1, x.shape[1]
    own = rows // jax.lax.axis_size(axes) if there else rows
    if there:
      x = jnp.roll(x, own, 1)
    x = real(x, axes, split, concat)
    return x if there else jnp.roll(x, -own, 1)

  patch.setattr(experts, '_all_to_all', all_to_all)


def missing_data_reduction(patch):
  """Gradients that were summed by hand stay on their device."""
  real = jax.lax.psum

  def psum(x, axes, **kwargs):
    if axes == ('data',) and isinstance(x, tuple):
      return x[0], real(x[1], axes)
    return real(x, axes, **kwargs)

  patch.setattr(jax.lax, 'psum', psum)


def stale_positions(patch):
  """Tokens are dealt in zigzag order, and their positions are not."""
  real = program.Program._arranged
  patch.setattr(
    program.Program,
    '_arranged',
    lambda self, name, a: a if name == 'positions' else real(self, name, a),
  )


def update_of_parts(patch):
  """Muon orthogonalises each device's part of a matrix."""
  real = _muon.orthogonalize_via_newton_schulz

  def orthogonalize(x, *args):
    parts = manual_sharding.num_parts('embed')
    parts = [real(part, *args) for part in jnp.split(x, parts, -1)]
    return jnp.concatenate(parts, -1)

  patch.setattr(_muon, 'orthogonalize_via_newton_schulz', orthogonalize)


def forgotten_step(patch):
  """Training draws the dropout of the first step again and again."""
  real = program.Program.step

  def step(self, state, batch):
    state, metrics = real(self, state, batch)
    return dataclasses.replace(state, step=state.step * 0), metrics

  patch.setattr(program.Program, 'step', step)


EXPERTS = {
  'model__mlp': 'moe',
  'model__mlp__num_experts': 4,
  'model__mlp__router__capacity': 1.5,
  'model__mlp__router__bias_rate': 0.01,
}
SEQUENCE = 'tensor=2,rules.norm_length=context,tensor'
BY_HAND = 'data=2,train.accumulate=2'
FAULTS = (
  Fault(
    plant=missing_tensor_reduction,
    layout=SEQUENCE,
    check='loss',
    parameter=r'.*\.mlp\.(up_DF|down_FD)',
  ),
  Fault(
    plant=ring_order,
    layout='context=4',
    check='loss',
    parameter=r'.*\.attention\.v_DKH',
  ),
  Fault(
    plant=local_mean,
    layout=BY_HAND,
    check='loss',
    parameter=r'embeddings\.positions\.table_PD',
  ),
  Fault(
    plant=unfolded_dropout_key,
    layout=BY_HAND,
    check='loss',
    parameter=r'tower\..*\.attention\.v_DKH',
    settings={'model__dropout': 0.1},
  ),
  Fault(
    plant=swapped_expert,
    layout='expert=2',
    check='loss',
    parameter=r'.*\.mlp\.(router_DE|tokens_E|\w+_E[DF]+)',
    settings=EXPERTS,
  ),
  Fault(
    plant=missing_data_reduction,
    layout=BY_HAND,
    check='gradients',
    parameter=r'embeddings\.positions\.table_PD',
  ),
  Fault(
    plant=update_of_parts,
    layout='fsdp=2',
    check='update',
    parameter=r'.*\.attention\.\w_(DNH|DKH|NHD)',
    settings={'optim': 'muon'},
  ),
  Fault(
    plant=forgotten_step,
    layout='data=2',
    check='trajectory',
    step=2,
    parameter='',  # A loss has no parameter to name.
    settings={'model__dropout': 0.1},
  ),
)
SLOW_FAULTS = (
  Fault(
    plant=missing_tensor_reduction_of_gradients,
    layout=SEQUENCE,
    check='gradients',
    parameter=r'.*_norm\.(scale|bias)',
  ),
  Fault(
    plant=stale_positions,
    layout='context=2',
    check='loss',
    parameter=r'embeddings\.positions\.table_PD',
  ),
)


@pytest.mark.parametrize(
  'fault',
  [*FAULTS, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW_FAULTS)],
  ids=lambda fault: fault.plant.__name__,
)
def test_a_planted_fault_is_found_and_named(fault, directory, monkeypatch):
  fault.plant(monkeypatch)
  verdict = verdict_of(directory, fault.layout, **fault.settings)
  assert not verdict.ok
  first = verdict.past[0]
  assert (first.name, first.step) == (fault.check, fault.step)
  text = report.parting(verdict)
  assert f'first part in the {fault.check} of step {fault.step} (' in text
  if not fault.parameter:
    assert 'no gradient or update with it' in text
    return
  path = report.worst_parameter(verdict)
  assert re.fullmatch(fault.parameter, path), text
  assert f'  {path}' in text
  entry = report.to_json(verdict)
  assert entry['worst_parameter'] == path and not entry['ok']
  assert entry['max_relative_deviation'] > 10 * verify.TOLERANCE
  assert entry['first_parting']['step'] == fault.step


# --- And what is no fault. ---


def test_a_layout_of_everything_passes(directory):
  layout = (
    'data=2,context=2,tensor=2,rules.norm_length=context,tensor,'
    'train.accumulate=2'
  )
  verdict = verdict_of(
    directory,
    layout,
    num_steps=3,
    model__dropout=0.1,
    model__attention__bias=True,
  )
  assert verdict.ok, report.parting(verdict)
  names = ['loss', 'gradients', 'update', 'trajectory']
  assert [c.name for c in verdict.checks] == ['weights'] + 3 * names
  assert [c.step for c in verdict.checks] == [0, *np.repeat([1, 2, 3], 4)]
  # Something was compared: no two programs sum in one order.
  assert 0 < verdict.largest(of_loss=False) < verify.TOLERANCE / 3
  assert 0 < verdict.largest(of_loss=True) < verdict.loss_tolerance / 3
  paths = set(verdict.by_parameter())
  assert 'tower.layers.group.0.attention.k_bias_KH' in paths
  assert len(paths) > 15
  assert not report.parting(verdict)


def test_a_choice_of_experts_is_compared(directory):
  verdict = verdict_of(directory, 'data=2,expert=2', **EXPERTS)
  assert verdict.ok, report.parting(verdict)
  mlp = 'tower.layers.group.0.mlp.'
  paths = set(verdict.by_parameter())
  assert {mlp + n for n in ('tokens_E', 'balance_E', 'router_DE')} <= paths


# --- The measure. ---


def replicas(*parts):
  """An array whose copies on the devices differ, as they never should."""
  mesh = Mesh(np.asarray(jax.devices()[: len(parts)]), ('x',))
  return jax.make_array_from_single_device_arrays(
    parts[0].shape,
    NamedSharding(mesh, P()),
    [jax.device_put(a, d) for a, d in zip(parts, jax.devices())],
  )


def test_deviation_of_a_tree():
  want = {
    'big': np.array([1.0, -4.0], np.float32),
    'zero': np.array([0.0, 1e-6], np.float32),
    'small': np.array([0.5], np.float32),
  }
  got = {
    'big': want['big'] + np.array([0.0, 0.5], np.float32),
    'zero': np.array([1e-3, 0.0], np.float32),
    'small': np.array([0.25], np.float32),
  }
  found = deviation.of_tree(jax.tree.map(jnp.asarray, got), want)
  assert found['big'] == 0.5 / 4.0
  assert found['small'] == 0.25 / 0.5
  np.testing.assert_allclose(found['zero'], 1e-3 / (1e-3 * 4.0), rtol=1e-6)


def test_every_copy_is_compared():
  want = {'a': np.ones(3, np.float32)}
  right, wrong = jnp.ones(3), jnp.array([1.0, 1.0, 1.5])
  assert deviation.of_tree({'a': replicas(right, right)}, want) == {'a': 0.0}
  assert deviation.of_tree({'a': replicas(right, wrong)}, want) == {'a': 0.5}


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_far(value):
  want = {'a': np.ones(2, np.float32), 'b': np.ones(2, np.float32)}
  got = {'a': jnp.ones(2), 'b': jnp.array([1.0, value])}
  found = deviation.of_tree(got, want)
  assert found == {'a': 0.0, 'b': np.inf}
  check = deviation.Check(step=1, name='gradients', deviations=found)
  verdict = deviation.Verdict(layout='x', tolerance=1.0, checks=(check,))
  assert verdict.past == (check,) and check.worst == ('b', np.inf)


def test_an_update_is_measured_by_the_change():
  """One rounding of the sum is forgiven; an error of the change is not."""
  old, change = np.float32(1000.0), np.float32(0.01)
  want = {'w': np.array([old + change])}
  one_up = {'w': jnp.asarray(np.nextafter(want['w'], np.float32(np.inf)))}
  scale = {'w': np.array([change])}
  of = lambda tree: deviation.of_tree(tree, want, scale=scale, rounded=True)
  assert of(one_up) == {'w': 0.0}
  doubled = {'w': jnp.asarray(np.array([old + 2 * change]))}
  np.testing.assert_allclose(of(doubled)['w'], 1.0, atol=0.02)
  assert deviation.of_tree(doubled, want)['w'] < verify.TOLERANCE


def test_parameters_of_zero_have_no_scale():
  zeros = {'a': np.zeros(2, np.float32)}
  assert deviation.of_tree({'a': jnp.zeros(2)}, zeros) == {'a': 0.0}
  assert deviation.of_tree({'a': jnp.ones(2)}, zeros) == {'a': np.inf}


# --- Layouts and messages. ---


def test_a_layout_is_read():
  text = 'data=2, tensor=4,rules.norm_length=context,tensor,train.accumulate=2'
  layout = layout_flag.parse(text)
  assert (layout.mesh.data, layout.mesh.tensor, layout.mesh.fsdp) == (2, 4, 1)
  assert layout.num_devices == 8
  assert layout.settings == {
    'rules.norm_length': 'context,tensor',
    'train.accumulate': '2',
  }


@pytest.mark.parametrize(
  'layout, message',
  [
    ('dta=2', "no mesh axis 'dta'; the axes are pipe, .* Did you mean 'data'"),
    ('data=0', 'data=0 is no size; it is a number of parts, at least 1'),
    ('data=-2', 'data=-2 is no size'),
    ('data=-1', 'data=-1: an axis takes the devices that remain'),
    ('data=2,data=4', 'data is given twice'),
    ('data', "'data' is not of the form AXIS=SIZE. Write for example"),
    ('data=2,4', "'4' is not of the form"),
    ('', "'' is not of the form"),
    ('model.num_layers=3', 'num_layers is no setting .* --set model.num_lay'),
    (
      'tensor=2,rules.vocab=tens',
      "--layout=tensor=2.*rules.vocab='tens' names",
    ),
    ('tensor=8', r'--layout=tensor=8: .*Layouts of 8 .*that work: --layout='),
    ('data=8', 'data.batch_size=4 rows cannot be dealt to mesh.data=8'),
    ('tensor=4,context=4', r'needs 16 devices, as many.* 1 x 8 \(processes x'),
  ],
)
def test_a_layout_that_cannot_be(layout, message, directory):
  with pytest.raises(ValueError, match=message):
    verdict_of(directory, layout)


@pytest.mark.parametrize(
  'second, message',
  [
    ('data=8', '^--layout=data=8: .*cannot be dealt'),
    ('data=16', '^--layout=data=16: .*cannot be dealt'),
    ('tensor=4,context=4', '^--layout=tensor=4,context=4 needs 16 devices'),
    ('rules.vocb=none', "^--layout=rules.vocb=none: .*no 'vocb'"),
  ],
)
def test_all_layouts_are_checked_before_one_compiles(
  second, message, directory, monkeypatch
):
  monkeypatch.setattr(verify, '_Side', lambda *_: pytest.fail('compiles'))
  config = tiny.experiment_of(directory, **SETTINGS)
  layouts = layout_flag.parse_all(['data=2', second])
  with pytest.raises(ValueError, match=message):
    next(verify.verify(config, layouts))


def test_no_layout_at_all():
  with pytest.raises(ValueError, match='--layout is missing: .* may repeat'):
    layout_flag.parse_all([])


def test_a_reference_that_is_not_finite(directory):
  with pytest.raises(ValueError, match='loss of one device is nan at step 2'):
    verdict_of(directory, 'data=2', optim__learning_rate='1e38')


# --- The script. ---

_SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'
_SCRIPT = str(_SCRIPTS / 'verify_layouts.py')


def start(directory, *arguments, script=_SCRIPT):
  """Runs a script with small settings, and returns what it said."""
  small = tiny.small(directory, ' '.join(arguments))
  settings = [f'--set={n}={v}' for n, v in small.items()]
  done = tiny.run(directory, *arguments, *settings, script=script)
  return done.returncode, done.stdout, done.stderr


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)
ONE_LAYER = ('--set=train.scan_layers=false', '--set=optim=sgd')


def test_script(directory, monkeypatch):
  """It simulates the devices itself, and says what it has found."""
  monkeypatch.setenv('XLA_FLAGS', simulated.flags())
  code, output, error = start(
    directory,
    '--experiment=gpt2_tiny',
    '--layout=data=2,tensor=2',
    '--layout=context=2',
    '--steps=2',
    '--details',
    '--json',
    *ONE_LAYER,
  )
  assert code == 0, error
  title, _, header, *_ = output.splitlines()
  assert title.startswith('gpt2_tiny: 2 steps of 8 x 32 tokens against one')
  assert re.fullmatch('layout +weights +loss +gradients +update +.*', header)
  assert re.search(r'^data=2,tensor=2 .* yes +\w+\.', output, re.M)
  assert re.search(r'^  step 2 +trajectory', output, re.M)
  assert 'Tolerance 1.0e-04, and of losses 5.0e-06. In float32' in output
  first, second = json.loads(output.splitlines()[-1])['layouts']
  assert (first['layout'], second['layout']) == ('data=2,tensor=2', 'context=2')
  for entry in (first, second):
    assert entry['ok'] and entry['tolerance'] == verify.TOLERANCE
    assert 0 < entry['max_relative_deviation'] < verify.TOLERANCE
    assert entry['worst_parameter'] in entry['parameters']
    assert entry['first_parting'] is None


def test_script_past_the_tolerance(directory, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', simulated.flags())
  code, output, error = start(
    directory,
    '--experiment=gpt2_tiny',
    '--layout=data=2,tensor=2',
    '--steps=1',
    '--tolerance=1e-12',
    '--json',
    *ONE_LAYER,
  )
  assert code == 1, error
  assert re.search('data=2,tensor=2: the numbers first part in the', output)
  (entry,) = json.loads(output.splitlines()[-1])['layouts']
  assert not entry['ok'] and entry['first_parting']['step'] == 1


@pytest.mark.parametrize(
  'arguments, message',
  [
    (
      ['--experiment=gpt2_tin'],
      "there is no .*Did you mean 'gpt2_tiny'",
    ),
    (
      ['--experiment=generate'],
      r'has no get_config\(\), so it is a tool',
    ),
    ([], '--experiment=NAME is missing: .* bert_tiny, '),
  ],
)
def test_script_without_an_experiment(arguments, message, directory):
  code, _, error = start(directory, '--layout=data=2', *arguments)
  assert code == 1
  assert re.search(f'^error: .*{message}', error), error


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, layouts, settings',
  [
    # Each process has two devices of a ring.
    ('gpt2_tiny', ('context=4,train.accumulate=2',), ()),
    exhaustive('gpt2_tiny', ('data=2,fsdp=2,tensor=2',), ()),
    # Tokens travel to experts of the other process.
    ('moe_tiny', ('expert=8',), ('--set=model.num_layers=2',)),
  ],
)
def test_script_in_two_processes(name, layouts, settings, directory):
  code, output, error = start(
    directory,
    '--num_processes=2',
    '--devices_per_process=4',
    '--',
    _SCRIPT,
    f'--experiment={name}',
    *(f'--layout={layout}' for layout in layouts),
    '--steps=2',
    '--json',
    *ONE_LAYER,
    *settings,
    script=str(_SCRIPTS / 'launch_local.py'),
  )
  assert code == 0, error
  entries = json.loads(output.splitlines()[-1])['layouts']
  assert [entry['ok'] for entry in entries] == [True] * len(layouts)
  assert '[1]' not in output


_SEQUENCE = 'rules.norm_length=context,tensor'
SWEEP = (
  'data=2,fsdp=2,tensor=2',
  f'data=2,context=2,tensor=2,{_SEQUENCE},train.accumulate=2,train.remat=full',
  'context=4,rules.context_attention=all_to_all',
  'data=8',
  'fsdp=8',
  'data=2,fsdp=2,context=2',
  'context=4,rules.balance_context=false',
  f'context=2,tensor=4,{_SEQUENCE}',
  'data=2,fsdp=2,train.accumulate=2,train.accumulate_whole=true',
)

# Where stages do the same, masked, keys may travel in a ring.
RING_OF_STAGES = (
  'pipe=2,context=2,data=2,pipeline.microbatches=2,pipeline.uniform=true',
)

EXPERT_SWEEP = (
  'data=2,expert=4',
  'expert=2,context=2,tensor=2',
  'expert=4,context=2,rules.context_attention=all_to_all',
  f'expert=2,fsdp=2,tensor=2,{_SEQUENCE},train.accumulate=2,train.remat=full',
)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, layouts, optimizer',
  [
    # One device is compiled once a line. Muon takes as long as a model.
    ('gpt2_tiny', SWEEP[1:2] + RING_OF_STAGES, 'adamw'),
    exhaustive('gpt2_tiny', SWEEP[:1] + SWEEP[2:], 'adamw'),
    ('bert_tiny', SWEEP[:1], 'muon'),
    exhaustive('bert_tiny', SWEEP[1:3], 'muon'),
    # Two towers: a minute and a half more.
    exhaustive('t5_tiny', RING_OF_STAGES, 'adamw'),
    exhaustive('t5_tiny', SWEEP[:1], 'adamw'),
    exhaustive('t5_tiny', SWEEP[:3], 'muon'),
    exhaustive('quickstart', SWEEP[:2], 'muon'),
    ('moe_tiny', EXPERT_SWEEP[1:2], 'adamw'),
    exhaustive('moe_tiny', EXPERT_SWEEP[:1] + EXPERT_SWEEP[2:], 'adamw'),
  ],
)
def test_tiny_experiments(name, layouts, optimizer, directory):
  """Packing and dropout included; the script runs all layouts of all."""
  settings = {n: str(v) for n, v in tiny.small(directory, name).items()}
  config = importlib.import_module(name).get_config()
  config = overrides.override(config, settings | {'optim': optimizer})
  layouts = layout_flag.parse_all(layouts)
  verdicts = list(verify.verify(config, layouts, num_steps=2))
  wrong = [report.parting(v) for v in verdicts if not v.ok]
  assert not wrong, '\n'.join(wrong)
  assert len(verdicts) == len(layouts)
