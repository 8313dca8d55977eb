"""`python -m tests.quick EVALUATION WORD ...`: the command `tomoatlas WORD ...` but quick and impatient."""

import functools
import sys

from launch import cli, session

if __name__ == "__main__":
    _, evaluation, *words = sys.argv
    session.GRACE = 0.5  # [s]; the notice of a job's end gives trials more, the time that is left
    session.run = functools.partial(session.run, evaluate=f"tests.evaluators:{evaluation}")
    cli.app(words, prog_name="tomoatlas")
