"""What may be asked of a comparison beside its recipe."""

PARTS = ("train", "decode", "report")
