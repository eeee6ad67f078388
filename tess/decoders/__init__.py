"""Ways to write with a checkpoint, behind one call; `load.load_decoder` is the door.

load            from a folder to a decoder
base            what all decoders share: checks, batches, keys
diffusion       tess: all target positions at once
autoregressive  ar and ar+mtp: token by token, or several checked at a time
beam_search     ar by beam search
generation_settings  what of a generation_config.json counts
verified        tess+ar: whole drafts, checked by the causal model
drafts          the drafts of tess+ar
options         names of the decoders, and how tess samples as flags
"""
