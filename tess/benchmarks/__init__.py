"""Time and memory, beside a rival's of the same run; `commands` lists them all.

commands    the benchmarks by name
doors/      the flags, the call and the table of each
turns       timings in turns, and their ratios
backbone    a forward pass, against transformers and bare products
vocabulary  memory and time without the vocabulary dimension
loading     reading a released folder
decoding    ar and ar+mtp, against transformers' generate
drafting    tess+ar and ar+mtp, against ar
start       processor time to help and to text, against another commit
cache       a denoising step with and without the source's cache
sampling/   quality against network evaluations
law/        whether the drawn noise has the law it should have
gpu/        every kernel on a GPU: checked, then timed
"""
