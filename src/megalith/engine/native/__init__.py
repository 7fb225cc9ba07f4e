"""The CPU backend in C: sources, their build, and the binding that calls them. Imports no torch."""
