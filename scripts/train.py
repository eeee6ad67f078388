"""`tess-train` from a checkout: see tess/commands/train.py."""

from tess.commands.train import command

if __name__ == "__main__":
    command()
