"""Every step of the denoising as data, as a page, and live in a terminal.

data          the steps as plain data
page          the steps as one page of HTML
map_script    the page's map of positions and steps
steps_script  the page's list of steps
live          the text in the terminal while it is being denoised
"""
