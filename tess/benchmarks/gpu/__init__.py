"""Every kernel on a GPU: checked, then timed; `run.benchmark_gpu` is the door.

options      what can be asked for
run          check, then time
shapes       the sizes, and what each operation costs on them
cases        inputs of scan, convolution and norms
tokens       inputs of experts, embedding, loss and sweep
checks       every kernel against its reference, in processes of their own
compare      times in turns with installed peers
clock        times by CUDA events, and the card's own ceilings
peers        other packages' scans, convolutions and norms
token_peers  other packages' experts, losses and sweeps
report       the figures as text, beside their goals
"""
