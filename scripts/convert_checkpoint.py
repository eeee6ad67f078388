"""`tess-convert` from a checkout: see tess/commands/convert.py."""

from tess.commands.convert import command

if __name__ == "__main__":
    command()
