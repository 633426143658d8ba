"""What a machine with a GPU is asked, in three calls: see bench/README.md."""
