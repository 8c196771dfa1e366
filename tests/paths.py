"""Where tests find the checkout and what is kept beside them."""

import pathlib

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
DATA = TESTS / 'data'
