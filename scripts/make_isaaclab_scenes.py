"""Writes assets/isaaclab: small USD scenes, our own, in place of those that Isaac Lab loads from NVIDIA's servers.

    python scripts/make_isaaclab_scenes.py

Kinematics of the arm: modified Denavit-Hartenberg parameters, joint limits and finger stroke as published by Franka
Robotics (https://frankarobotics.github.io/docs/control_parameters.html); link masses as identified by Gaz et al.,
"Dynamic Identification of the Franka Emika Panda Robot With Retrieval of Feasible Parameters" (RA-L 2019). Every shape
is a box.
"""

from __future__ import annotations

import math
from pathlib import Path

ROOT = Path(__file__).parents[1] / "assets" / "isaaclab" / "Isaac"

Vector = tuple[float, float, float]
Quaternion = tuple[float, float, float, float]
"""wxyz, as USD writes it."""
Pose = tuple[Vector, Quaternion]

# Joint i of the arm: a (i-1), d (i), alpha (i-1) in metres and radians; lower, upper limit in radians; effort in N m.
ARM = (
    (0.0, 0.333, 0.0, -2.8973, 2.8973, 87.0),
    (0.0, 0.0, -math.pi / 2, -1.7628, 1.7628, 87.0),
    (0.0, 0.316, math.pi / 2, -2.8973, 2.8973, 87.0),
    (0.0825, 0.0, math.pi / 2, -3.0718, -0.0698, 87.0),
    (-0.0825, 0.384, -math.pi / 2, -2.8973, 2.8973, 12.0),
    (0.0, 0.0, math.pi / 2, -0.0175, 3.7525, 12.0),
    (0.088, 0.0, math.pi / 2, -2.8973, 2.8973, 12.0),
)
# Mass of a link in kg, size and centre of its box in metres, in the frame of the link.
LINKS: tuple[tuple[float, Vector, Vector], ...] = (
    (2.9, (0.2, 0.18, 0.13), (-0.03, 0.0, 0.07)),
    (4.97, (0.11, 0.11, 0.25), (0.0, 0.0, -0.1)),
    (0.65, (0.11, 0.25, 0.11), (0.0, -0.1, 0.0)),
    (3.23, (0.11, 0.11, 0.18), (0.02, 0.0, -0.08)),
    (3.59, (0.11, 0.18, 0.11), (-0.03, 0.06, 0.0)),
    (1.23, (0.1, 0.1, 0.3), (0.0, 0.03, -0.16)),
    (1.67, (0.13, 0.1, 0.1), (0.05, 0.0, 0.0)),
    (0.74, (0.09, 0.09, 0.06), (0.0, 0.0, 0.07)),
)
HAND = (0.73, (0.06, 0.2, 0.06), (0.0, 0.0, 0.03))
FINGER = (0.03, (0.02, 0.012, 0.054), (0.0, 0.006, 0.027))
STIFFNESS, DAMPING, ARMATURE = 400.0, 40.0, 0.1
"""Of the arm's position drives, N m/rad and N m s/rad (tasks set their own damping); rotor inertia, kg m^2."""
FINGER_STIFFNESS, FINGER_DAMPING = 2000.0, 100.0
"""N/m and N s/m."""


def numbers(*values: float) -> str:
    return "(" + ", ".join(f"{value:.9g}" for value in values) + ")"


def about_x(angle: float) -> Quaternion:
    return math.cos(angle / 2), math.sin(angle / 2), 0.0, 0.0


def about_z(angle: float) -> Quaternion:
    return math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)


def times(p: Quaternion, q: Quaternion) -> Quaternion:
    a, b, c, d = p
    w, x, y, z = q
    return (
        a * w - b * x - c * y - d * z,
        a * x + b * w + c * z - d * y,
        a * y - b * z + c * w + d * x,
        a * z + b * y - c * x + d * w,
    )


def compose(parent: Pose, child: Pose) -> Pose:
    """The pose of `child`, given in `parent`, in the frame of `parent`'s own."""
    (position, rotation), (offset, turn) = parent, child
    conjugate = (rotation[0], -rotation[1], -rotation[2], -rotation[3])
    _, *moved = times(times(rotation, (0.0, *offset)), conjugate)
    x, y, z = (a + b for a, b in zip(position, moved, strict=True))
    return (x, y, z), times(rotation, turn)


def indent(text: str) -> str:
    return "\n".join("    " + line if line else line for line in text.splitlines())


def layer(name: str, body: str, header: str = "") -> str:
    """A file whose default prim is the Xform `name`."""
    return (
        f'#usda 1.0\n(\n    defaultPrim = "{name}"\n    kilogramsPerUnit = 1\n    metersPerUnit = 1\n'
        f'    upAxis = "Z"\n)\n\ndef Xform "{name}"{header}\n{{\n{indent(body)}\n}}\n'
    )


def transform(position: Vector, rotation: Quaternion) -> str:
    return (
        f"quatf xformOp:orient = {numbers(*rotation)}\n"
        f"double3 xformOp:translate = {numbers(*position)}\n"
        'uniform token[] xformOpOrder = ["xformOp:translate", "xformOp:orient"]\n'
    )


def box(size: Vector, centre: Vector, colour: Vector, collides: bool) -> str:
    schema = '(\n    prepend apiSchemas = ["PhysicsCollisionAPI"]\n)\n' if collides else ""
    return (
        f'def Cube "box" {schema}{{\n'
        f"    double size = 1\n"
        f"    color3f[] primvars:displayColor = [{numbers(*colour)}]\n"
        f"    double3 xformOp:translate = {numbers(*centre)}\n"
        f"    double3 xformOp:scale = {numbers(*size)}\n"
        '    uniform token[] xformOpOrder = ["xformOp:translate", "xformOp:scale"]\n}\n'
    )


def mass(kilograms: float, size: Vector, centre: Vector) -> str:
    """Attributes of a solid box of uniform density."""
    x, y, z = (side * side * kilograms / 12 for side in size)
    return (
        f"float physics:mass = {kilograms:.9g}\n"
        f"point3f physics:centerOfMass = {numbers(*centre)}\n"
        f"float3 physics:diagonalInertia = {numbers(y + z, x + z, x + y)}\n"
        "quatf physics:principalAxes = (1, 0, 0, 0)\n"
    )


def body(name: str, attributes: str, children: str = "", schemas: str = "") -> str:
    return (
        f'def Xform "{name}" (\n'
        f'    prepend apiSchemas = ["PhysicsRigidBodyAPI", "PhysicsMassAPI"{schemas}]\n)\n'
        f"{{\n{indent(attributes + children)}\n}}\n"
    )


def joint(kind: str, name: str, bodies: tuple[str, str], pose: str, rest: str = "", schemas: str = "") -> str:
    """`bodies` are paths, the first "" for the world; `pose` is the joint's in the first body. In the second it is the
    origin."""
    apis = f" (\n    prepend apiSchemas = [{schemas}]\n)" if schemas else ""
    first = f"rel physics:body0 = <{bodies[0]}>\n" if bodies[0] else ""
    text = f"{first}rel physics:body1 = <{bodies[1]}>\n{pose}"
    text += "point3f physics:localPos1 = (0, 0, 0)\nquatf physics:localRot1 = (1, 0, 0, 0)\n"
    return f'def Physics{kind}Joint "{name}"{apis}\n{{\n{indent(text + rest)}\n}}\n'


def pose(position: Vector, rotation: Quaternion) -> str:
    return f"point3f physics:localPos0 = {numbers(*position)}\nquatf physics:localRot0 = {numbers(*rotation)}\n"


def drive(kind: str, stiffness: float, damping: float, force: float) -> str:
    return (
        f'uniform token drive:{kind}:physics:type = "force"\n'
        f"float drive:{kind}:physics:stiffness = {stiffness:.9g}\n"
        f"float drive:{kind}:physics:damping = {damping:.9g}\n"
        f"float drive:{kind}:physics:maxForce = {force:.9g}\n"
        f"float drive:{kind}:physics:targetPosition = 0\n"
    )


def limits(axis: str, lower: float, upper: float) -> str:
    return (
        f'uniform token physics:axis = "{axis}"\n'
        f"float physics:lowerLimit = {lower:.9g}\nfloat physics:upperLimit = {upper:.9g}\n"
    )


IDENTITY = (1.0, 0.0, 0.0, 0.0)
ORIGIN = (0.0, 0.0, 0.0)


def cartpole() -> str:
    """A cart of 1 kg on a rail of +-4 m, and a pole of 1 kg and 1 m."""
    grey, orange = (0.4, 0.4, 0.45), (0.9, 0.45, 0.1)
    rail, cart, pole = (0.03, 8.0, 0.03), (0.2, 0.25, 0.2), (0.04, 0.06, 1.0)
    up = (0.0, 0.0, 0.5)
    bodies = [
        body("slider", mass(1.0, rail, ORIGIN), box(rail, ORIGIN, grey, False)),
        body("cart", mass(1.0, cart, ORIGIN), box(cart, ORIGIN, orange, False)),
        body("pole", transform((0.12, 0.0, 0.0), IDENTITY) + mass(1.0, pole, up), box(pole, up, grey, False)),
    ]
    at = "/cartpole/"
    joints = [
        joint("Fixed", "rootJoint", ("", at + "slider"), pose(ORIGIN, IDENTITY)),
        joint(
            "Prismatic",
            "slider_to_cart",
            (at + "slider", at + "cart"),
            pose(ORIGIN, IDENTITY),
            limits("Y", -4.0, 4.0) + drive("linear", 0.0, 10.0, 400.0),
            '"PhysicsDriveAPI:linear"',
        ),
        joint(
            "Revolute",
            "cart_to_pole",
            (at + "cart", at + "pole"),
            pose((0.12, 0.0, 0.0), IDENTITY),
            'uniform token physics:axis = "X"\n' + drive("angular", 0.0, 0.0, 400.0),
            '"PhysicsDriveAPI:angular"',
        ),
    ]
    header = ' (\n    prepend apiSchemas = ["PhysicsArticulationRootAPI"]\n)'
    return layer("cartpole", "".join([*bodies, *joints]), header)


def franka() -> str:
    """The arm and its hand, all bodies side by side below the root; the second finger follows the first."""
    white, black = (0.9, 0.9, 0.92), (0.2, 0.2, 0.22)
    at = "/panda/panda_"
    links = [body("panda_link0", mass(*LINKS[0]), box(*LINKS[0][1:], white, False))]
    joints = [joint("Fixed", "rootJoint", ("", at + "link0"), pose(ORIGIN, IDENTITY))]
    where: Pose = (ORIGIN, IDENTITY)
    for i, (a, d, alpha, lower, upper, effort) in enumerate(ARM, 1):
        relative = ((a, -math.sin(alpha) * d, math.cos(alpha) * d), about_x(alpha))
        where = compose(where, relative)
        links.append(body(f"panda_link{i}", transform(*where) + mass(*LINKS[i]), box(*LINKS[i][1:], white, False)))
        per_degree = math.pi / 180  # USD's angular drives are in degrees
        rest = limits("Z", math.degrees(lower), math.degrees(upper))
        rest += drive("angular", STIFFNESS * per_degree, DAMPING * per_degree, effort)
        rest += f"double mjc:armature = {ARMATURE}\n"
        bodies = (f"{at}link{i - 1}", f"{at}link{i}")
        joints.append(joint("Revolute", f"panda_joint{i}", bodies, pose(*relative), rest, '"PhysicsDriveAPI:angular"'))
    relative = ((0.0, 0.0, 0.107), about_z(-math.pi / 4))
    hand = compose(where, relative)
    links.append(body("panda_hand", transform(*hand) + mass(*HAND), box(*HAND[1:], white, True)))
    joints.append(joint("Fixed", "panda_hand_joint", (at + "link7", at + "hand"), pose(*relative)))
    for index, side, turn in ((1, "left", IDENTITY), (2, "right", about_z(math.pi))):
        relative = ((0.0, 0.0, 0.0584), turn)
        attributes = transform(*compose(hand, relative)) + mass(*FINGER)
        links.append(body(f"panda_{side}finger", attributes, box(*FINGER[1:], black, True)))
        rest, schemas = limits("Y", 0.0, 0.04), '"PhysicsDriveAPI:linear"'
        if index == 1:
            rest += drive("linear", FINGER_STIFFNESS, FINGER_DAMPING, 200.0)
        else:
            rest += drive("linear", 0.0, 0.0, 200.0)
            rest += "rel newton:mimicJoint = </panda/joints/panda_finger_joint1>\n"
            rest += "float newton:mimicCoef0 = 0\nfloat newton:mimicCoef1 = 1\n"
            schemas += ', "NewtonMimicAPI"'
        rest += f"double mjc:armature = {ARMATURE}\n"
        bodies = (at + "hand", f"{at}{side}finger")
        joints.append(joint("Prismatic", f"panda_finger_joint{index}", bodies, pose(*relative), rest, schemas))
    collides = 'over "box" (\n    prepend apiSchemas = ["PhysicsCollisionAPI"]\n)\n{\n}\n'
    primitives = "".join(f'over "panda_link{i}"\n{{\n{indent(collides)}\n}}\n' for i in range(8))
    variants = 'variantSet "Physics" = {\n    "mujoco" {\n    }\n    "physx" {\n    }\n}\n'
    variants += 'variantSet "Colliders" = {\n    "gripper_only" {\n    }\n    "primitives" {\n'
    variants += indent(indent(primitives)) + "\n    }\n}\n"
    header = (
        " (\n"
        '    prepend apiSchemas = ["PhysicsArticulationRootAPI"]\n'
        '    variants = {\n        string Colliders = "primitives"\n        string Physics = "mujoco"\n    }\n'
        '    prepend variantSets = ["Physics", "Colliders"]\n)'
    )
    scope = f'def Scope "joints"\n{{\n{indent("".join(joints))}\n}}\n'
    return layer("panda", "".join(links) + scope + variants, header)


def block(colour: Vector) -> str:
    """A rigid cube of 40.6 mm (Isaac Lab starts its blocks 20.3 mm over the table) and 50 g."""
    size = (0.0406, 0.0406, 0.0406)
    text = mass(0.05, size, ORIGIN) + box(size, ORIGIN, colour, True)
    return layer("block", text, ' (\n    prepend apiSchemas = ["PhysicsRigidBodyAPI", "PhysicsMassAPI"]\n)')


def table() -> str:
    """Its top is the plane z = 0. Isaac Lab turns it by 90 degrees: x of the file is y of the scene."""
    return layer("table", box((1.3, 0.9, 1.05), (0.0, 0.0, -0.525), (0.55, 0.45, 0.35), True))


def ground() -> str:
    return layer(
        "ground",
        'def Plane "plane" (\n    prepend apiSchemas = ["PhysicsCollisionAPI"]\n)\n{\n'
        '    uniform token axis = "Z"\n    double length = 100\n    double width = 100\n'
        "    color3f[] primvars:displayColor = [(0.5, 0.5, 0.5)]\n}\n",
    )


FILES = {
    "IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda": ground,
    "IsaacLab/Robots/Classic/Cartpole/cartpole.usd": cartpole,
    "IsaacLab/Robots/FrankaEmika/franka_panda.usda": franka,
    "Props/Mounts/SeattleLabTable/table_instanceable.usd": table,
    "Props/Blocks/blue_block.usd": lambda: block((0.1, 0.2, 0.9)),
    "Props/Blocks/red_block.usd": lambda: block((0.9, 0.1, 0.1)),
    "Props/Blocks/green_block.usd": lambda: block((0.1, 0.7, 0.2)),
}


def main() -> None:
    for name, make in FILES.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make())
        print(f"{path.stat().st_size:6d}  {path.relative_to(ROOT.parents[1])}")


if __name__ == "__main__":
    main()
