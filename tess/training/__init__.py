"""From settings and rows to a checkpoint; `run.train` is the door.

settings            everything that may be set
diffusion_settings  the part of it that belongs to tess
checks              what has to hold between settings
flags               settings from a file and flags
arguments           transformers' settings of a trainer, with our defaults
run                 a training from its settings to the saved checkpoint
start               what a run is made of: data, model, canvas, loss
resuming            what an output folder holds of an earlier run
losses              the losses of tess and ar
update              the rows of one update, over micro-batches and processes
trainer             transformers' trainer with our order, averages and checkpoints
sharding            FSDP2: one model over several GPUs
sample_printer      texts of the evaluation rows, printed while it trains
length_fitting      a length head fitted to a trained model
"""
