"""Images and models: how they are read, prepared and bundled."""
