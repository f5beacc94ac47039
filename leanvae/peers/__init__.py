"""Other projects' autoencoders: the sizes they take, how to build them, and how to run them over frames."""
