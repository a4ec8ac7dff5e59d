"""What a reduction costs and gains: time, operations, accuracy, and what became of the tokens."""
