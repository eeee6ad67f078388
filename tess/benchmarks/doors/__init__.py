"""A door for each benchmark: its flags, its call, its table; none loads torch at import.

flags       what several take and say
cells       what their tables have in common
backbone    forward and backward passes
vocabulary  the noised simplex, and whole steps
loading     reading a released folder
decoding    ar and ar+mtp
drafting    tess+ar
cache       a denoising step with and without the source's cache
sampling    schedulers, spacings and stopping
lengths     ways to choose the canvas
agreement   texts computed in other ways
law         the noise of one step
carried     the noise of all steps
gpu         every kernel
start       from start to help, and to text
"""
