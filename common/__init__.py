"""What no step is about: the data, the models, snapshot files, the shared flags and the progress line."""
