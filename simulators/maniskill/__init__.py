"""ManiSkill3 (https://github.com/haosulab/ManiSkill): CPU PhysX in worker processes, or one batched GPU scene."""
