"""`python -m dschat`, and what `deepspeed -m dschat` and `torchrun -m dschat` start."""

from .cli import command

if __name__ == "__main__":
    command()
