"""Models: how a network is loaded, prepared, opened and run."""
