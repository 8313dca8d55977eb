"""`python -m tests.quick EVALUATION WORD ...`: the command `tomoatlas WORD ...` with a quick evaluation."""

import functools
import sys

from launch import cli, session

if __name__ == "__main__":
    _, evaluation, *words = sys.argv
    session.run = functools.partial(session.run, evaluate=f"tests.evaluators:{evaluation}")
    cli.app(words, prog_name="tomoatlas")
