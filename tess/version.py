"""The package's version: one number, which pyproject.toml and every report read."""

VERSION = "0.1.0"
