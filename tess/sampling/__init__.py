"""The denoising loop and what steers it; `loop.denoise` is the door.

loop        all steps of one batch, from noise to tokens
call        a call from sources to texts, its checks and defaults
writer      from encoded sources to tokens: what one canvas and a text in blocks share
blocks      long texts, block after block
options     how a denoiser samples, as one object
request     what is asked of every decoder: steps, length, how to draw
sources     encoded sources, random keys of examples, seeds
control     given, forbidden and certain tokens
guidance    classifier-free guidance and rewards
callbacks   what a user's function sees and may change in each step
candidates  several texts for a source, and the choice among them
steps       one step as it is kept and shown
"""
