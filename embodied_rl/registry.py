"""Names for simulators, policies, algorithms and recipes.

A registry maps a name to "module:object" and imports the module only when the object is asked for, so that listing
names costs nothing and pulls in no simulator. Another package adds a name without touching this repository:

    [project.entry-points."embodied_rl.simulators"]
    my_simulator = "my_package.simulator:MySimulatorConfig"

The object behind a simulator, policy or algorithm name is its configuration dataclass, whose `build(...)` makes the
component; behind a recipe name is a function that returns a `RunConfig`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from typing import Any

from embodied_rl.errors import UserError, unknown


class Registry:
    """One kind of component: `kind` is the singular word used in messages, `group` the entry-point group."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._targets = dict(builtin)
        self._discovered = False

    def register(self, name: str, target: str) -> None:
        """Bind `name` to "module:object". Raises `UserError` when the name is bound to something else."""
        self._discover()
        self._add(name, target)

    def names(self) -> list[str]:
        """All names, sorted; imports nothing."""
        self._discover()
        return sorted(self._targets)

    def target(self, name: str) -> str:
        """The "module:object" behind `name`; raises `UserError` naming the nearest valid name."""
        self._discover()
        if name not in self._targets:
            raise unknown(self.kind, name, self._targets)
        return self._targets[name]

    def load(self, name: str) -> Any:
        """Import and return the object behind `name`."""
        target = self.target(name)
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self.kind} '{name}' ({target}) cannot be loaded: {error}") from error

    def name_of(self, component: type) -> str:
        """The name under which `component` (a class or function) is registered."""
        wanted = f"{component.__module__}:{component.__qualname__}"
        for name in self.names():
            if self._targets[name] == wanted:
                return name
        raise UserError(f"{wanted} is not a registered {self.kind}; add it with an entry point in group {self.group}")

    def _add(self, name: str, target: str) -> None:
        bound = self._targets.setdefault(name, target)
        if bound != target:
            raise UserError(f"{self.kind} '{name}' is already {bound}; {target} needs another name")

    def _discover(self) -> None:
        if not self._discovered:
            self._discovered = True
            for point in entry_points(group=self.group):
                self._add(point.name, point.value)


simulators = Registry(
    "simulator",
    "embodied_rl.simulators",
    {
        "gymnasium": "embodied_rl.simulators.gymnasium.config:GymnasiumConfig",
        "libero": "embodied_rl.simulators.libero.config:LiberoConfig",
        "isaaclab": "embodied_rl.simulators.isaaclab.config:IsaacLabConfig",
        "maniskill": "embodied_rl.simulators.maniskill.config:ManiSkillConfig",
        "metaworld": "embodied_rl.simulators.metaworld.config:MetaWorldConfig",
        "mjlab": "embodied_rl.simulators.mjlab.config:MjlabConfig",
    },
)


def tasks(simulator: str) -> list[Any]:
    """The tasks that a registered simulator knows (`simulators.base.Listing`); [] when its module does not tell."""
    simulators.load(simulator)
    module = sys.modules[simulators.target(simulator).partition(":")[0]]
    return module.tasks() if hasattr(module, "tasks") else []


policies = Registry(
    "policy",
    "embodied_rl.policies",
    {
        "gaussian_mlp": "embodied_rl.policies.gaussian_mlp:GaussianMLPConfig",
        "categorical_mlp": "embodied_rl.policies.categorical_mlp:CategoricalMLPConfig",
        "flow_mlp": "embodied_rl.policies.flow_mlp:FlowMLPConfig",
        "gr00t": "embodied_rl.policies.gr00t.config:Gr00tConfig",
        "lerobot": "embodied_rl.policies.lerobot:LeRobotConfig",
        "openvla": "embodied_rl.policies.openvla.config:OpenVLAConfig",
        "openvla_oft": "embodied_rl.policies.openvla.config:OpenVLAOFTConfig",
        "pi0": "embodied_rl.policies.pi0.config:Pi0Config",
        "pi05": "embodied_rl.policies.pi0.config:Pi05Config",
        "smolvla": "embodied_rl.policies.smolvla:SmolVLAConfig",
        "squashed_gaussian_cnn": "embodied_rl.policies.squashed_gaussian:SquashedGaussianCNNConfig",
        "squashed_gaussian_mlp": "embodied_rl.policies.squashed_gaussian:SquashedGaussianMLPConfig",
        "tiny_vla": "embodied_rl.policies.tiny_vla:TinyVLAConfig",
        "token_mlp": "embodied_rl.policies.token_mlp:TokenMLPConfig",
    },
)
algorithms = Registry(
    "algorithm",
    "embodied_rl.algorithms",
    {
        "imitation": "embodied_rl.algorithms.imitation:ImitationConfig",
        "ppo": "embodied_rl.algorithms.ppo:PPOConfig",
        "grpo": "embodied_rl.algorithms.grpo:GRPOConfig",
        "dapo": "embodied_rl.algorithms.grpo:DAPOConfig",
        "reinforce++": "embodied_rl.algorithms.grpo:ReinforcePlusPlusConfig",
        "iql": "embodied_rl.algorithms.iql:IQLConfig",
        "sac": "embodied_rl.algorithms.sac:SACConfig",
        "flow_actor_critic": "embodied_rl.algorithms.flow_actor_critic:FlowActorCriticConfig",
    },
)
recipes = Registry(
    "recipe",
    "embodied_rl.recipes",
    {
        "cartpole_ppo": "embodied_rl.recipes.learning:cartpole_ppo",
        "fetch_reach_rlpd": "embodied_rl.recipes.learning:fetch_reach_rlpd",
        "fetch_reach_sac": "embodied_rl.recipes.learning:fetch_reach_sac",
        "half_cheetah_ppo": "embodied_rl.recipes.learning:half_cheetah_ppo",
        "isaaclab_ppo_gr00t": "embodied_rl.recipes.flow_vla:isaaclab_ppo_gr00t",
        "isaaclab_ppo_pi05": "embodied_rl.recipes.flow_vla:isaaclab_ppo_pi05",
        "libero_130_grpo_openvla_oft": "embodied_rl.recipes.openvla:libero_130_grpo_openvla_oft",
        "libero_goal_grpo_pi0": "embodied_rl.recipes.flow_vla:libero_goal_grpo_pi0",
        "libero_goal_grpo_pi05": "embodied_rl.recipes.flow_vla:libero_goal_grpo_pi05",
        "libero_goal_ppo_pi0": "embodied_rl.recipes.flow_vla:libero_goal_ppo_pi0",
        "libero_goal_ppo_pi05": "embodied_rl.recipes.flow_vla:libero_goal_ppo_pi05",
        "libero_long_grpo_openvla_oft": "embodied_rl.recipes.openvla:libero_long_grpo_openvla_oft",
        "libero_long_grpo_pi0": "embodied_rl.recipes.flow_vla:libero_long_grpo_pi0",
        "libero_long_grpo_pi05": "embodied_rl.recipes.flow_vla:libero_long_grpo_pi05",
        "libero_long_ppo_pi0": "embodied_rl.recipes.flow_vla:libero_long_ppo_pi0",
        "libero_long_ppo_pi05": "embodied_rl.recipes.flow_vla:libero_long_ppo_pi05",
        "libero_object_grpo_pi0": "embodied_rl.recipes.flow_vla:libero_object_grpo_pi0",
        "libero_object_grpo_pi05": "embodied_rl.recipes.flow_vla:libero_object_grpo_pi05",
        "libero_object_ppo_pi0": "embodied_rl.recipes.flow_vla:libero_object_ppo_pi0",
        "libero_object_ppo_pi05": "embodied_rl.recipes.flow_vla:libero_object_ppo_pi05",
        "libero_spatial_dsrl_pi0": "embodied_rl.recipes.flow_vla:libero_spatial_dsrl_pi0",
        "libero_spatial_grpo_openvla_oft": "embodied_rl.recipes.openvla:libero_spatial_grpo_openvla_oft",
        "libero_spatial_grpo_pi0": "embodied_rl.recipes.flow_vla:libero_spatial_grpo_pi0",
        "libero_spatial_grpo_pi05": "embodied_rl.recipes.flow_vla:libero_spatial_grpo_pi05",
        "libero_spatial_ppo_gr00t": "embodied_rl.recipes.flow_vla:libero_spatial_ppo_gr00t",
        "libero_spatial_ppo_pi0": "embodied_rl.recipes.flow_vla:libero_spatial_ppo_pi0",
        "libero_spatial_ppo_pi05": "embodied_rl.recipes.flow_vla:libero_spatial_ppo_pi05",
        "maniskill_async_ppo_openvla": "embodied_rl.recipes.openvla:maniskill_async_ppo_openvla",
        "maniskill_crossq_mlp": "embodied_rl.recipes.small:maniskill_crossq_mlp",
        "maniskill_grpo_openvla": "embodied_rl.recipes.openvla:maniskill_grpo_openvla",
        "maniskill_grpo_openvla_oft": "embodied_rl.recipes.openvla:maniskill_grpo_openvla_oft",
        "maniskill_ppo_mlp": "embodied_rl.recipes.small:maniskill_ppo_mlp",
        "maniskill_ppo_openvla": "embodied_rl.recipes.openvla:maniskill_ppo_openvla",
        "maniskill_ppo_openvla_oft": "embodied_rl.recipes.openvla:maniskill_ppo_openvla_oft",
        "maniskill_ppo_pi0": "embodied_rl.recipes.flow_vla:maniskill_ppo_pi0",
        "maniskill_ppo_pi05": "embodied_rl.recipes.flow_vla:maniskill_ppo_pi05",
        "maniskill_rlpd_cnn": "embodied_rl.recipes.small:maniskill_rlpd_cnn",
        "maniskill_sac_mlp": "embodied_rl.recipes.small:maniskill_sac_mlp",
        "pendulum_crossq": "embodied_rl.recipes.learning:pendulum_crossq",
        "pendulum_sac": "embodied_rl.recipes.learning:pendulum_sac",
        "ppo": "embodied_rl.recipes.from_scratch:ppo",
        "quickstart": "embodied_rl.recipes.quickstart:quickstart",
        "quickstart_dapo": "embodied_rl.recipes.quickstart:quickstart_dapo",
        "quickstart_dsrl": "embodied_rl.recipes.quickstart:quickstart_dsrl",
        "quickstart_grpo": "embodied_rl.recipes.quickstart:quickstart_grpo",
        "quickstart_ppo": "embodied_rl.recipes.quickstart:quickstart_ppo",
        "quickstart_reinforce": "embodied_rl.recipes.quickstart:quickstart_reinforce",
        "quickstart_token_reinforce": "embodied_rl.recipes.quickstart:quickstart_token_reinforce",
        "small_vla_grpo": "embodied_rl.recipes.small_vla:small_vla_grpo",
        "small_vla_ppo": "embodied_rl.recipes.small_vla:small_vla_ppo",
    },
)
