"""Every step of the denoising as data, as a page, and live in a terminal.

data       the steps as plain data
page       the steps as one page of HTML
page.html  the page's frame and body
page.css   its style
map.js     its map of positions and steps
steps.js   its list of steps
live       the text in the terminal while it is being denoised
"""
