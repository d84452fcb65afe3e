"""mjlab (https://github.com/mujocolab/mjlab): Isaac Lab's manager API on MuJoCo Warp, in its own Python environment."""
