"""`python -m sparse_experts COMMAND ...`; see cli."""

import sys

from sparse_experts.cli import main

sys.exit(main())
