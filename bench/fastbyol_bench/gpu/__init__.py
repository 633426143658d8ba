"""The measurements on a machine with a GPU, in three calls: bench/README.md describes them."""
