"""What a batch looks like: the features of each kind of objective."""
