"""Algorithms: how a policy improves. Each file holds one, with its configuration next to it."""
