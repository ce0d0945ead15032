"""`python -m dschat`, and what `deepspeed -m dschat` and `torchrun -m dschat` start."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
