"""The study of docs/science.md: what decides whether a collapsed network recovers."""
