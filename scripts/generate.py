"""`tess-generate` from a checkout: see tess/commands/generate.py."""

from tess.commands.generate import command

if __name__ == "__main__":
    command()
