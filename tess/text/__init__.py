"""Strings and tokens: what a text is before a model sees it and after one wrote it.

tokenization   train a byte-level BPE, load any tokenizer, lay out source and target
padding        rows of token ids made equally long, with their masks
sentences      sentence boundaries by rule: nothing to download
detokenize     undo Penn-Treebank-style tokenisation
visible        whether a text has anything to see
token_strings  single tokens as strings that are safe to show
"""
