"""Quality against network evaluations; `grid.benchmark_sampling` is the door.

grid       schedulers, steps, spacings and stopping
lengths    given, predicted and gold canvases
agreement  how many tokens two ways to sample share
trials     texts of one setting, and their scores
report     the figures as Markdown
plot       the figures as a plot
"""
