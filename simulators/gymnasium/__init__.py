"""Any registered Gymnasium environment with Box or Discrete actions, one process for several of them."""
