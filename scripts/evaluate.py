"""`tess-evaluate` from a checkout: see tess/commands/evaluate.py."""

from tess.commands.evaluate import command

if __name__ == "__main__":
    command()
