"""What a model takes, counted; `model_info.describe` is the door.

model_info  parameters and cache sizes of a checkpoint or preset
roofline    least times of a step on a GPU
gpus        GPUs by name, and what is written on them
decoding    operations of whole runs of a decoder
training    operations of an update
machine     what machine and which versions a figure belongs to
"""
