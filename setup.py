"""Installs t2x. `bash scripts/setup.sh [EXTRA...]` uses the tested versions."""

import setuptools

# One line of justification per dependency: docs/decisions/dependencies.md.
CORE = [
  'absl-py>=2.1',
  'array_record>=0.8',
  'etils[epath]>=1.9',
  'flax>=0.12.4',
  'grain>=0.2.15',
  'importlib_resources>=6.0',
  'jax>=0.10.2',
  'matplotlib>=3.9',
  'numpy>=2.0',
  'optax>=0.2.6',
  'orbax-checkpoint>=0.11.30',
  'packaging>=24.0',
  'rich>=13.7',
  'sentencepiece>=0.2.0',
  'tensorboardX>=2.6.2',
  'tensorflow-datasets>=4.9.9',
]

EXTRAS = {
  'tpu': ['jax[tpu]'],
  'gpu': ['jax[cuda13]'],
  'gcs': ['gcsfs>=2024.6'],
  # Checkpoints of others: their weights and tokenizers.
  'huggingface': ['safetensors>=0.5', 'tokenizers>=0.21'],
  # experiments/serve.py; llguidance turns grammars into masks of tokens.
  'serve': [
    'jinja2>=3.1',
    'llguidance>=1.3',
    'prometheus-client>=0.20',
    'pydantic>=2.8',
    'starlette>=0.41',
    'uvicorn>=0.32',
  ],
  # Programs of jax.export in files: scripts/export_model.py.
  'export': ['flatbuffers>=24.3', 'tokenizers>=0.21'],
  # scripts/sweep.py: trials, suggestions, pruning; manifests as YAML.
  'sweep': ['optuna>=5.0', 'pyyaml>=6.0', 'scipy>=1.13'],
  # Its launcher of Ray clusters.
  'ray': ['ray>=2.55'],
  # Experiment trackers (train.trackers). MLflow's is the part that logs, with
  # what its SQLite store needs.
  'wandb': ['wandb>=0.31'],
  'mlflow': ['alembic>=1.13', 'mlflow-skinny>=3.17', 'sqlalchemy>=2.0'],
  'trackio': ['trackio>=0.43'],
  # Tests that drive a page, in a browser that is installed.
  'browser': ['playwright>=1.45'],
  # scripts/docs.sh: the site, and the reference of the API from docstrings.
  'docs': ['mkdocstrings-python>=2.0', 'zensical>=0.0.73'],
  'notebook': ['ipykernel>=6.29', 'jupyterlab>=4.2'],
  'test': [
    'flatbuffers>=24.3',
    'httpx>=0.27',
    'ipykernel>=6.29',
    'jinja2>=3.1',
    'jsonschema>=4.20',
    'llguidance>=1.3',
    'nbclient>=0.10',
    'nbformat>=5.10',
    'openai>=1.60',
    'optuna>=5.0',
    'prometheus-client>=0.20',
    'psutil>=6.0',
    'pydantic>=2.8',
    'pyright[nodejs]>=1.1.390',
    'pytest>=9.0',
    'pytest-xdist>=3.6',
    'pyyaml>=6.0',
    'ruff>=0.9',
    'safetensors>=0.5',
    'starlette>=0.41',
    'tensorboard>=2.18',
    'tokenizers>=0.21',
    'uvicorn>=0.32',
  ],
  # The TPU compiler, which needs no TPU.
  'plan': ['libtpu'],
  # The GPU compiler, which needs no GPU: JAX's plugin of JAX's own version. It
  # compiles without CUDA, and without its runtime says so at every start.
  'plan-gpu': ['jax[cuda13-local]', 'nvidia-cuda-runtime>=13.0'],
  'bench': ['httpx>=0.27', 'psutil>=6.0', 'torch==2.13.0', 'transformers>=5.0'],
  # Other libraries that tests compare with, and an emulated object store.
  'reference': [
    'gcp-storage-emulator>=2026.7',
    'gcsfs>=2024.6',
    # Scores a served model.
    'lm-eval[api]>=0.4.13',
    'torch==2.13.0',
    'transformers>=5.0',
  ],
}

setuptools.setup(
  name='t2x',
  version='0.1.0',
  description='Transformers on device meshes, in JAX.',
  license='Apache-2.0',
  package_data={
    't2x.serving': ['page.*'],
    't2x.sweeps': ['report*.css', 'report*.js'],
  },
  packages=setuptools.find_packages(include=['t2x', 't2x.*']),
  python_requires='>=3.11',
  install_requires=CORE,
  extras_require=EXTRAS,
)
