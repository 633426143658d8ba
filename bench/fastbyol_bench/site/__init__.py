"""The documentation site: pages made of the code, links that hold in both places, transcripts."""
