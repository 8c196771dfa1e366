"""Data: documentation corpora, vocabularies, objectives, tasks and batches."""
