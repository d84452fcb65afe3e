"""Groups of torch tensors become the arrays of an observation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.errors import UserError
from embodied_rl.simulators.tensor_groups import Layout, replaced
from embodied_rl.specs import CameraSpec, ObservationSpec

N = 3
ALL = np.arange(N)


def groups():
    numbers = torch.arange(N * 20, dtype=torch.float32).reshape(N, 20)
    return {
        "policy": {
            "joint_pos": numbers[:, :4],
            "table_cam": torch.arange(N * 2 * 5 * 3, dtype=torch.uint8).reshape(N, 2, 5, 3),
            "grid": numbers[:, 4:10].reshape(N, 2, 3),
        },
        "critic": numbers[:, 10:],
        "subtasks": {"grasped": torch.tensor([True, False, True]), "deep": {"count": torch.tensor([1, 2, 3])}},
    }


def test_a_group_gives_its_terms_in_order_and_a_term_itself():
    layout = Layout.of(groups(), state=("subtasks.grasped", "policy"), images=("policy.table_cam",))
    assert layout.state == ("subtasks.grasped", "policy.joint_pos", "policy.grid")
    assert layout.state_names[:3] == ("subtasks.grasped.0", "policy.joint_pos.0", "policy.joint_pos.1")
    assert layout.state_names[-1] == "policy.grid.5"


def test_the_spec_is_what_the_arrays_are():
    layout = Layout.of(groups(), ("policy",), privileged=("critic", "subtasks"), images=("policy.table_cam",))
    spec = ObservationSpec(**layout.spec_fields())
    arrays = layout.arrays(groups(), np.array([2, 0]))
    assert spec.cameras == {"table_cam": CameraSpec(2, 5)}
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        "state": (np.float32, (2, spec.state)),
        "privileged": (np.float32, (2, spec.privileged)),
        "image.table_cam": (np.uint8, (2, 2, 5, 3)),
    }
    assert len(spec.state_names) == spec.state == 10
    assert all(array.flags.c_contiguous for array in arrays.values())


def test_rows_come_in_the_order_asked_for():
    layout = Layout.of(groups(), ("policy.joint_pos", "subtasks"), images=("policy.table_cam",))
    arrays = layout.arrays(groups(), np.array([2, 0]))
    assert arrays["state"].tolist() == [[40, 41, 42, 43, 1, 3], [0, 1, 2, 3, 1, 1]]
    assert np.array_equal(arrays["image.table_cam"], groups()["policy"]["table_cam"].numpy()[[2, 0]])


def test_nothing_is_shared_with_the_buffers_of_the_simulator():
    live = groups()
    layout = Layout.of(live, ("policy.joint_pos",), ("critic",), ("policy.table_cam",))
    arrays = layout.arrays(live, ALL)
    kept = {name: array.copy() for name, array in arrays.items()}
    for tensor in (live["policy"]["joint_pos"], live["critic"], live["policy"]["table_cam"]):
        tensor += 1
    assert all(np.array_equal(arrays[name], kept[name]) for name in kept)


def test_without_state_terms_the_state_is_empty():
    layout = Layout.of(groups(), (), images=("policy.table_cam",))
    assert layout.spec_fields()["state"] == 0
    assert layout.arrays(groups(), ALL)["state"].shape == (N, 0)
    assert "privileged" not in layout.arrays(groups(), ALL)


@given(st.lists(st.integers(0, 255), min_size=8, max_size=8), st.sampled_from([torch.float32, torch.float64]))
def test_a_float_image_gives_the_bytes_it_came_from(values, dtype):
    image = torch.tensor(values, dtype=torch.uint8).reshape(1, 1, 2, 4)
    layout = Layout.of({"camera": {"rgb": image.to(dtype) / 255}}, (), images=("camera",))
    arrays = layout.arrays({"camera": {"rgb": image.to(dtype) / 255}}, np.array([0]))
    assert np.array_equal(arrays["image.rgb"], image[..., :3].numpy())


@pytest.mark.parametrize("channels", [3, 4])
def test_channels_may_come_first_and_alpha_is_dropped(channels):
    image = torch.randint(0, 256, (N, 6, 7, channels), dtype=torch.uint8)
    first = {"camera": image.permute(0, 3, 1, 2)}
    layout = Layout.of(first, (), images=("camera",))
    assert layout.cameras == {"camera": CameraSpec(6, 7)}
    assert np.array_equal(layout.arrays(first, ALL)["image.camera"], image[..., :3].numpy())


def test_float_images_out_of_range_saturate():
    image = torch.tensor([-0.5, 0.5, 1.5]).reshape(1, 1, 1, 3)
    layout = Layout.of({"camera": image}, (), images=("camera",))
    assert layout.arrays({"camera": image}, np.array([0]))["image.camera"].ravel().tolist() == [0, 128, 255]


def test_an_unknown_term_names_the_nearest():
    with pytest.raises(UserError, match=r"'policy.joint_pose': did you mean policy.joint_pos"):
        Layout.of(groups(), ("policy.joint_pose",))


@pytest.mark.parametrize(
    "term", [torch.zeros(N, 1, 8, 8), torch.zeros(N, 3), torch.zeros(N, 8, 8, 3, dtype=torch.int32)]
)
def test_what_is_not_rgb_is_no_camera(term):
    with pytest.raises(UserError, match=r"'camera.depth' is .* a camera gives RGB"):
        Layout.of({"camera": {"depth": term}}, (), images=("camera",))


def test_replaced_rows_come_from_the_other_observation_and_nothing_is_shared():
    old, new = groups(), groups()
    new["critic"] = new["critic"] + 100
    new["subtasks"]["grasped"] = ~new["subtasks"]["grasped"]
    both = replaced(old, new, torch.tensor([2]))
    assert torch.equal(both["critic"], torch.stack([old["critic"][0], old["critic"][1], new["critic"][2]]))
    assert both["subtasks"]["grasped"].tolist() == [True, False, False]
    old["critic"][0], new["critic"][2] = -1, -1
    assert (both["critic"] >= 0).all()
