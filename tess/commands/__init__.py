"""The commands: parse arguments, call a room's door, print; each file's `command` is its door.

generate   tess-generate: a text for each source
train      tess-train: from settings and rows to a checkpoint
evaluate   tess-evaluate: a checkpoint scored on rows
compare    tess-compare: decoders trained alike and compared
convert    tess-convert: causal checkpoints to pipelines, and back
info       tess-info: sizes and least times from a config alone
benchmark  tess-benchmark: time and memory beside a rival's
"""
