"""The command line: a file a command, and `main`, which finds it."""
