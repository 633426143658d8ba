"""Many runs, trained by any number of workers on any number of hosts."""
