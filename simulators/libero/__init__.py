"""LIBERO as a simulator; see `config.py` for its options."""
