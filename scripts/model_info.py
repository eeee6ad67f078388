"""`tess-info` from a checkout: see tess/commands/info.py."""

from tess.commands.info import command

if __name__ == "__main__":
    command()
