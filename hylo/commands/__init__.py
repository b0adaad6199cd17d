"""Commands of the command line, one file each: `register(app)` adds it."""
