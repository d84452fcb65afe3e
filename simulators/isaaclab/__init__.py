"""Isaac Lab (https://github.com/isaac-sim/IsaacLab) 3.0 without Isaac Sim: Newton physics and cameras, CPU or CUDA."""
