"""From settings and rows to a checkpoint; `run.train` is the door.

settings            everything that may be set
diffusion_settings  the part of it that belongs to tess
run                 a training from its settings to the saved checkpoint
start               the model, tokenizer and scheduler that it starts from
losses              the losses of tess and ar
trainer             transformers' trainer with our order, averages and checkpoints
update              the rows of one update, over micro-batches and processes
place               where a run stopped, in rows
sharding            FSDP2: one model over several GPUs
sample_printer      texts of the evaluation rows, printed while it trains
length_fitting      a length head fitted to a trained model
"""
