"""Many runs at once: rows of a folder's runs, kept in an index; chosen, ordered, exported."""
