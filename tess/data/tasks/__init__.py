"""The named tasks and their datasets; `catalog.load_task` is the door.

catalog              the tasks, and the packaged rows of each
hub                  a dataset on the hub, and how its rows become pairs of texts
summarization        a text to its summary
simplification       a sentence to a simpler one
paraphrase           a sentence to one that means the same
question_generation  a sentence to a question that it answers
"""
