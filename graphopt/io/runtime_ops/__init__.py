"""The front door for operators of one runtime: those that mean what standard operators mean are read as these."""
