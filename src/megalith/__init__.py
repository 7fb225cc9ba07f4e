"""Megalith: plan, serve, train and simulate models that are bigger than the machine.

Importing this package is cheap on purpose (no torch, no server): the verbs load what they need.
"""

__version__ = "0.1.0"

from megalith.base import compiled

compiled.install()
