"""The smallest plug-in: a cart on a line learns to stop at a mark."""
