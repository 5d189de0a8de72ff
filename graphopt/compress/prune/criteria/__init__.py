"""One file is one criterion of importance; the class says its name (`Obs` is `obs`)."""
