"""The parts of a Transformer block; experts are these parts too."""
