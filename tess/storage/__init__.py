"""Checkpoints and files on disk: written whole or not at all, and read strictly.

parts       a checkpoint's model, scheduler and tokenizer
hub         a checkpoint's folder, by path or hub id
conversion  causal checkpoints to pipelines, and back
files       files and folders that are replaced whole
kept        a value beside what it depends on
"""
