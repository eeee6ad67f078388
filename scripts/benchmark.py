"""`tess-benchmark` from a checkout: see tess/commands/benchmark.py."""

from tess.commands.benchmark import command

if __name__ == "__main__":
    command()
