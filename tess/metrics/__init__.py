"""Pure functions of texts, which know no model; `scores.score` is the door.

scores        the metrics of every report
protocols     what papers report, under their names, with signatures and baselines
catalog       their names, and which measures each has
measures      each measure as a function of sums over rows
significance  bootstrap intervals and paired randomisation tests
sari          SARI, corpus and rows, in both known readings
ngrams        n-gram statistics: BLEU, chrF, and of single sentences
readability   the Flesch-Kincaid grade level
candidates    oracle, worst and chosen of several candidates
bertscore     BERTScore by a model of one's own, the one measure that needs one
tokens        how a metric cuts a text
"""
