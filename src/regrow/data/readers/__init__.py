"""One file per format: `ENDINGS` of its files' names and `read(path)`, an iterator of rows."""
