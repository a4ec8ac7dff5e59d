"""The command line, `tokred`."""
