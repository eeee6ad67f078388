"""A decoder over rows of texts, scored beside baselines; `run.evaluate` is the door.

run       write all rows, score them, make the report
partial   texts as they come, for a run that is killed
report    the keys of the report
page      the report as Markdown
protocol  the section of a named protocol
plots     the style of every figure
"""
