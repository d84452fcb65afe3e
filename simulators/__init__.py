"""Simulators: the contract (`base`), what a chunk means (`chunk`), and where environments run (`workers`)."""

from embodied_rl.simulators.check import check

__all__ = ["check"]
