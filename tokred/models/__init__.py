"""Native models, built from maps and reducers."""
