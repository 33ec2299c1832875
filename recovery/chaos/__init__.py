"""Breaking a running service on purpose, and seeing what its clients notice."""
