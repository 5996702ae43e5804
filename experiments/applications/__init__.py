"""Published uses of sparse training, each one small enough to read and to run in a minute."""
