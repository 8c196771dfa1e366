"""Data: the documentation corpora, vocabularies, objectives, tasks and batches."""
