"""Strings and tokens: what a text is before a model sees it and after one wrote it.

tokenization   train a byte-level BPE, load any tokenizer, lay out source and target
end_tokens     the one set of tokens that end a text
prompts        texts that a released model goes on with, and turns of a chat
padding        rows of token ids made equally long, with their masks
alphabet       letters that a tokenizer was not trained on
sentences      sentence boundaries by rule: nothing to download
detokenize     undo Penn-Treebank-style tokenisation
visible        whether a text has anything to see
token_strings  single tokens as strings that are safe to show
"""
