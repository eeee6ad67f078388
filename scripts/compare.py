"""`tess-compare` from a checkout: see tess/commands/compare.py."""

from tess.commands.compare import command

if __name__ == "__main__":
    command()
