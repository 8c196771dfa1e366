"""Data: the embedded corpus, vocabularies, objectives, tasks and batches."""
