"""Decoders trained alike and compared, from a recipe to a report; `run.compare` is the door.

run           plan, train, write, time, report
settings      what may be asked beside the recipe
recipe        what a recipe may say
rows          training and test rows, and the facts about them
clock         updates of a training, and how long one takes
arms          the trainings of both arms, and whether they are alike
distillation  the teacher's texts for a distilled arm
training      the arms, one after the other
systems       a decoder of the comparison
texts         what the systems wrote, kept on disk
timing        latency, throughput and peak memory, in turns
scores        quality with intervals and tests
results       from texts to figures
report        the report as data, to JSON and back
page          the report as Markdown
plots         the report as figures
overview      several reports in one table and figure
progress      how much work each part is
state         the comparison as it runs
"""
