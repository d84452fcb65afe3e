from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from embodied_rl.errors import SpecError
from embodied_rl.specs import (
    ActionSpec,
    CameraSpec,
    ObservationSpec,
    Resize,
    connect,
    flip,
    pick_state,
    reorder_quaternions,
    rotate_180,
)
from embodied_rl.types import Observation

STATE = ObservationSpec(state=9, quaternion="wxyz", quaternion_at=(3,))
ARM = ActionSpec((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), control="pd_ee", gripper=2)
finite = st.floats(-1e3, 1e3, width=32)


def observation(spec: ObservationSpec, rows: int = 2) -> Observation:
    random = np.random.default_rng(0)
    return Observation(
        images={
            name: random.integers(0, 256, (rows, camera.height, camera.width, 3), np.uint8)
            for name, camera in spec.cameras.items()
        },
        image_mask={name: np.array([True] * (rows - 1) + [False]) for name in spec.cameras},
        state=random.standard_normal((rows, spec.state)).astype(np.float32),
        instruction_id=np.zeros(rows, np.int64),
        task=np.zeros(rows, np.int64),
    )


def test_identical_specs_convert_and_copy_nothing() -> None:
    spec = replace(STATE, cameras={"base_camera": CameraSpec(8, 8)})
    connection = connect(spec, ARM, spec, ARM)
    seen, actions = observation(spec), np.zeros((2, 4, 3), np.float32)
    assert connection.names == []
    assert connection.observation(seen) is seen
    assert connection.action(actions) is actions


def test_what_a_policy_leaves_open_is_not_converted() -> None:
    connection = connect(replace(STATE, privileged=5), ARM, ObservationSpec(), replace(ARM, control="", gripper=None))
    assert connection.names == []


NAMES = (*(f"hand.{i}" for i in range(3)), *(f"object.{i}" for i in range(4)), "gripper")


def test_a_policy_gets_the_numbers_that_it_names_in_its_order() -> None:
    simulator = ObservationSpec(state=8, state_names=NAMES, quaternion="wxyz", quaternion_at=(3,))
    wanted = ("gripper", "object.0", "object.1", "object.2", "object.3")
    policy = ObservationSpec(state=5, state_names=wanted, quaternion="xyzw", quaternion_at=(1,))
    connection = connect(simulator, ARM, policy, ARM)
    assert connection.names == ["pick 5 of 8 numbers of the state", "quaternion wxyz->xyzw"]
    emitted = observation(simulator)
    picked = connection.observation(emitted).state
    np.testing.assert_array_equal(picked, emitted.state[:, [7, 4, 5, 6, 3]])
    assert connect(simulator, ARM, replace(simulator, state_names=()), ARM).names == []
    with pytest.raises(SpecError, match="the quaternions in the state are at other places"):
        connect(simulator, ARM, replace(policy, state_names=(*wanted[:3], "object.3", "object.2")), ARM)
    with pytest.raises(SpecError, match="state has size 8, the policy needs 5"):
        connect(simulator, ARM, replace(policy, state_names=("elbow", *wanted[1:])), ARM)


@given(hnp.arrays(np.float32, (3, 12), elements=finite), st.sampled_from([(0,), (3, 8), ()]))
def test_quaternion_order_round_trip(state: np.ndarray, starts: tuple[int, ...]) -> None:
    there = reorder_quaternions(state, starts, to_xyzw=True)
    for start in starts:
        w, x, y, z = state[0, start : start + 4]
        assert there[0, start : start + 4].tolist() == [x, y, z, w]
    np.testing.assert_array_equal(reorder_quaternions(there, starts, to_xyzw=False), state)


def test_a_policy_can_have_a_quaternion_as_axis_times_angle() -> None:
    """The field's state of a robot's hand: position, rotation vector, fingers."""
    names = (*(f"pose.{i}" for i in range(7)), "finger")
    wanted = ("finger", "pose.2", *(f"pose:axis_angle.{axis}" for axis in "xyz"))
    vector, angle = np.array([0.6, 0.0, -0.8]), np.array([0.0, 1e-3, 1.0, np.pi, 6.0])[:, None]
    xyz, w = vector * np.sin(angle / 2), np.cos(angle / 2)
    for order, parts in (("xyzw", (xyz, w)), ("wxyz", (w, xyz))):
        simulator = ObservationSpec(state=8, state_names=names, quaternion=order, quaternion_at=(3,))
        policy = pick_state(simulator, ("finger", "pose.2", "pose:axis_angle"))
        assert (policy.state_names, policy.quaternion) == (wanted, None)
        connection = connect(simulator, ARM, policy, ARM)
        assert connection.names == [f"quaternion {order}->axis-angle", "pick 5 of 8 numbers of the state"]
        state = np.concatenate([np.arange(15.0).reshape(5, 3), *parts, np.full((5, 1), 7.0)], 1).astype(np.float32)
        expected = np.concatenate([np.full((5, 1), 7.0), state[:, 2:3], vector * angle], 1)
        seen = connection.observation(replace(observation(simulator, 5), state=state)).state
        assert seen.dtype == np.float32
        np.testing.assert_allclose(seen, expected, rtol=0, atol=1e-3)
    assert pick_state(simulator, ("pose",)).state_names == names[:7]


def test_quaternion_conversion_is_chosen_and_leaves_the_simulator_alone() -> None:
    seen = observation(STATE)
    before = seen.state.copy()
    connection = connect(STATE, ARM, replace(STATE, quaternion="xyzw"), ARM)
    assert connection.names == ["quaternion wxyz->xyzw"]
    np.testing.assert_array_equal(connection.observation(seen).state, before[:, [0, 1, 2, 4, 5, 6, 3, 7, 8]])
    np.testing.assert_array_equal(seen.state, before)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_rotation_is_an_involution(images: np.ndarray) -> None:
    np.testing.assert_array_equal(rotate_180(rotate_180(images)), images)
    np.testing.assert_array_equal(rotate_180(images)[0, 0, 0], images[0, -1, -1])


@given(hnp.arrays(np.float32, (2, 4, 3), elements=finite), st.integers(0, 2))
def test_gripper_flip_is_an_involution(actions: np.ndarray, index: int) -> None:
    flipped = flip(actions, index)
    np.testing.assert_array_equal(flipped[..., index], -actions[..., index])
    np.testing.assert_array_equal(flip(flipped, index), actions)


@pytest.mark.parametrize(("low", "closed", "opened"), [(-1.0, 1.0, -1.0), (0.0, 1.0, 0.0)])
def test_gripper_opens_in_both_conventions(low: float, closed: float, opened: float) -> None:
    policy = replace(ARM, low=(-1.0, -1.0, low), gripper_open=-1)  # its high value closes
    connection = connect(STATE, ARM, STATE, policy)
    assert connection.names[0] == "flip gripper"
    actions = np.array([[0.5, 0, closed], [0.5, 0, opened]], np.float32)
    np.testing.assert_array_equal(connection.action(actions), [[0.5, 0, -1], [0.5, 0, 1]])


bounds = st.lists(st.tuples(st.floats(-50, 50), st.floats(0.1, 50)), min_size=3, max_size=3).map(
    lambda pairs: (tuple(low for low, _ in pairs), tuple(low + width for low, width in pairs))
)


@settings(deadline=None)
@given(bounds, bounds, hnp.arrays(np.float32, (5, 3), elements=st.floats(0, 1, width=32)), st.booleans())
def test_action_ranges_map_onto_each_other_and_back(ours, theirs, fractions: np.ndarray, flipped: bool) -> None:
    policy = replace(ARM, low=ours[0], high=ours[1], gripper_open=-1 if flipped else 1)
    simulator = replace(ARM, low=theirs[0], high=theirs[1])
    actions = (np.array(ours[0]) + fractions * np.subtract(ours[1], ours[0])).astype(np.float32)
    mapped = connect(STATE, simulator, STATE, policy).action(actions)
    expected = np.where([False, False, flipped], 1 - fractions, fractions)
    np.testing.assert_allclose(
        mapped, np.array(theirs[0]) + expected * np.subtract(theirs[1], theirs[0]), atol=1e-3, rtol=1e-4
    )
    back = connect(STATE, policy, STATE, simulator).action(mapped)
    np.testing.assert_allclose(back, actions, atol=5e-3, rtol=1e-3)
    assert mapped.dtype == np.float32


def test_unbounded_dimensions_that_agree_are_left_alone() -> None:
    policy = replace(ARM, low=(-np.inf, -1.0, -1.0), high=(np.inf, 1.0, 1.0))
    simulator = replace(policy, high=(np.inf, 3.0, 1.0))
    actions = np.array([[123.0, 1.0, 0.5]], np.float32)
    np.testing.assert_array_equal(connect(STATE, simulator, STATE, policy).action(actions), [[123.0, 3.0, 0.5]])


@pytest.mark.parametrize(("source", "target"), [((64, 48), (32, 24)), ((20, 33), (41, 50)), ((128, 128), (84, 30))])
def test_resize_is_pillows_bilinear(source: tuple[int, int], target: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *source, 3), np.uint8)
    ours = Resize(source, target)(images)
    theirs = [np.asarray(Image.fromarray(i).resize((target[1], target[0]), Image.Resampling.BILINEAR)) for i in images]
    assert np.abs(ours.astype(int) - np.stack(theirs)).max() <= 1


def test_cameras_are_picked_renamed_turned_and_resized() -> None:
    cameras = {"agentview": CameraSpec(16, 16, rotated=True), "side": CameraSpec(8, 8), "hand_camera": CameraSpec(8, 8)}
    simulator = replace(STATE, cameras=cameras)
    policy = replace(STATE, cameras={"wrist": CameraSpec(8, 8), "base_camera": CameraSpec(8, 12)})
    connection = connect(simulator, ARM, policy, ARM)
    assert connection.names == [
        "camera hand_camera->wrist",
        "camera agentview->base_camera",
        "rotate base_camera by 180",
        "resize base_camera 16x16->8x12",
        "pick cameras wrist,base_camera",
    ]
    seen = observation(simulator)
    given_to_policy = connection.observation(seen)
    assert list(given_to_policy.images) == ["wrist", "base_camera"]
    assert given_to_policy.images["wrist"] is seen.images["hand_camera"]
    turned = Resize((16, 16), (8, 12))(seen.images["agentview"][:, ::-1, ::-1])
    np.testing.assert_array_equal(given_to_policy.images["base_camera"], turned)
    np.testing.assert_array_equal(given_to_policy.image_mask["wrist"], [True, False])


def test_a_policy_without_cameras_gets_no_images() -> None:
    simulator = replace(STATE, cameras={"base_camera": CameraSpec(8, 8)})
    connection = connect(simulator, ARM, STATE, ARM)
    assert connection.names == ["drop images"]
    assert connection.observation(observation(simulator)).images == {}


CAMERA = {"base_camera": CameraSpec(8, 8)}


@pytest.mark.parametrize(
    ("simulator", "policy", "message"),
    [
        ({}, {"state": 10}, "state has size 9, the policy needs 10"),
        ({}, {"privileged": 3}, "privileged has size 0"),
        ({}, {"cameras": CAMERA}, "the simulator has none"),
        ({"cameras": {"side": CameraSpec(8, 8)}}, {"cameras": CAMERA}, "needs camera 'base_camera'"),
        ({}, {"quaternion_at": (5,)}, "quaternions"),
        ({"quaternion": None, "quaternion_at": ()}, {}, "quaternions"),
    ],
)
def test_observations_that_do_not_fit(simulator: dict, policy: dict, message: str) -> None:
    ours, theirs = replace(STATE, **simulator), replace(STATE, **policy)
    with pytest.raises(SpecError, match=message) as error:
        connect(ours, ARM, theirs, ARM)
    assert repr(ours) in str(error.value) and repr(theirs) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": (-1.0,) * 4, "high": (1.0,) * 4}, "4 dimensions, not 3"),
        ({"control": "pd_joint"}, "acts through 'pd_joint'"),
        ({"gripper": 0}, "gripper is another"),
        ({"high": (np.inf, 1.0, 1.0)}, "infinite or empty"),
        ({"high": (-1.0, 1.0, 1.0)}, "infinite or empty"),
    ],
)
def test_actions_that_do_not_fit(changes: dict, message: str) -> None:
    policy = replace(ARM, **changes)
    with pytest.raises(SpecError, match=message) as error:
        connect(STATE, ARM, STATE, policy)
    assert repr(ARM) in str(error.value) and repr(policy) in str(error.value)


def test_choices_are_for_policies_that_choose_among_as_many() -> None:
    two, three = (ActionSpec((0.0,), (n - 1.0,), (0.0,), choices=n) for n in (2, 3))
    picked = np.array([[[1.0]]], np.float32)
    assert connect(STATE, two, STATE, two).action(picked) is picked
    with pytest.raises(SpecError, match="the policy gives 3 choices, the simulator takes 2 choices"):
        connect(STATE, two, STATE, three)
    with pytest.raises(SpecError, match="the policy gives continuous actions, the simulator takes 2 choices"):
        connect(STATE, two, STATE, replace(two, choices=0))
