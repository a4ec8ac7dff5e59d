"""One forward pass with fewer tokens: what runs while a patched model runs."""
