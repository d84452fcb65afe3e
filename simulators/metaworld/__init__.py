"""MetaWorld 3.0.0: fifty manipulation tasks of one Sawyer arm in MuJoCo."""
