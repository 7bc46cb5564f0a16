r"""How well a run's probabilities are calibrated, and a temperature for them.

python scripts/calibrate.py --workdir=RUN [--split=validation] \
    [--plot=reliability.png]

Every second batch fits one temperature for all logits (Guo et al., 2017), the
others show the expected calibration error before and after it. The run keeps it
in calibration.json, and generate.py and `inference` divide logits by it from
then on; --nosave leaves the run as it is.
"""

from absl import flags

from t2x import main

_SPLIT = flags.DEFINE_string('split', None, 'Default the first of eval_splits.')
_PLOT = flags.DEFINE_string('plot', None, 'Also draw diagrams into this file.')
_SAVE = flags.DEFINE_bool('save', True, 'Keep the temperature with the run.')
_MOST = flags.DEFINE_integer('max_batches', 64, 'At most so many are read.')
main.define_trained_flags()


def calibrate() -> None:
  from t2x.inference import calibration
  from t2x.inference import loading

  main.use_compilation_cache()
  trained = loading.load(**main.load_arguments())
  found = calibration.calibrate(
    trained, split=_SPLIT.value, max_batches=_MOST.value
  )
  print(f'temperature {found.temperature:.4f}')
  print(f'{"":8}{"ECE":>8}{"nats":>10}{"tokens":>10}')
  for name, part in (('before', found.before), ('after', found.after)):
    print(
      f'{name:8}{100 * part.ece:7.2f}%{part.nll:10.4f}{part.num_tokens:10.0f}'
    )
  if _SAVE.value:
    calibration.save(main.workdir(), found)
  if _PLOT.value:
    calibration.draw(found, _PLOT.value)


if __name__ == '__main__':
  main.app_run(calibrate)
