"""Rows of text pairs: where they come from, and how they become the batches of a training.

settings    where the rows of a training come from, as settings
rows        local files of text pairs or raw text, checked row by row
delimited   CSV and TSV, and which of their quote marks are text
parquet     Parquet, its columns of JSON decoded
texts       the texts of a run: cleaned, kept apart from the evaluation rows
token_rows  texts as token ids, in an order that a restart keeps
collators   token rows, corrupted, as a batch
tasks/      the named tasks and their datasets
"""
