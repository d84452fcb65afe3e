"""π₀ and π₀.₅, number by number against openpi's PyTorch implementation (see the fixtures' READMEs)."""

import pytest
import torch
from cases import cases, folders, listed, read
from safetensors.torch import load_file
from torch.nn import functional as F

from embodied_rl.policies.flow import FlowNoise, FlowSampler, FlowSamplerConfig, bounded_std
from embodied_rl.policies.mlp import mlp
from embodied_rl.policies.normalization import Normaliser
from embodied_rl.policies.pi0.checkpoint import TOKEN_TABLE, from_published, published_name
from embodied_rl.policies.pi0.gemma import EPSILON, ROTARY_BASE, GemmaConfig, rotary
from embodied_rl.policies.pi0.network import PERIODS, Network, NetworkConfig, time_embedding
from embodied_rl.policies.pi0.preprocessing import pi0_prompt, pi05_prompt, pi05_text, resize_with_pad, state_bins
from embodied_rl.policies.pi0.siglip import SiglipConfig
from embodied_rl.policies.pretrained import load_strict, read_weights


def gemma(sizes):
    assert (sizes["rms_norm_eps"], sizes["rope_theta"]) == (EPSILON, ROTARY_BASE)
    return GemmaConfig(
        sizes["hidden_size"],
        sizes["num_hidden_layers"],
        sizes["intermediate_size"],
        sizes["num_attention_heads"],
        sizes["num_key_value_heads"],
        sizes["head_dim"],
    )


class Case:
    """One fixture folder: the network with its weights, what goes in and what must come out."""

    def __init__(self, folder):
        self.config = read(folder / "config.json")
        self.cameras = self.config["image_keys"]
        assert (self.config["time_embed_min_period"], self.config["time_embed_max_period"]) == PERIODS
        vision = self.config["vision"]
        sizes = NetworkConfig(
            SiglipConfig(
                vision["hidden_size"],
                vision["num_hidden_layers"],
                vision["num_attention_heads"],
                vision["intermediate_size"],
                vision["patch_size"],
                vision["image_size"],
            ),
            gemma(self.config["text"]),
            gemma(self.config["expert"]),
            self.config["vocab_size"],
            self.config["action_dim"],
            self.config["pi05"],
        )
        self.network = Network(sizes, self.config["action_horizon"])
        load_strict(self.network, from_published(read_weights(folder), self.network.state_dict()), folder)
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")

    def encode(self, without=None):
        """The prefix of all cameras, or all but one."""
        seen = [name for name in self.cameras if name != without]
        images = {name: self.inputs[f"images.{name}"] for name in seen}
        masks = {name: self.inputs["image_masks"][:, self.cameras.index(name)] for name in seen}
        prompt, mask = self.inputs["tokenized_prompt"], self.inputs["tokenized_prompt_mask"]
        return self.network.encode(images, masks, prompt, mask, self.inputs["state"])


@pytest.fixture(scope="module", params=cases("pi0", "pi05"))
def case(request):
    return Case(request.param)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Spy:
    """Keeps the arguments of the calls that go through it."""

    def __init__(self, act):
        self.act, self.calls = act, []

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.act(*arguments)


def same_turn(turn, positions, head_dim):
    for ours, expected in zip(turn, rotary(positions, head_dim), strict=True):
        close(ours, expected, 1e-6)


@torch.no_grad()
def test_tokens_positions_and_masks(case, monkeypatch):
    """What enters the two transformers."""
    network, expected, valid = case.network, case.expected, case.expected["prefix_pad_mask"]
    prefix_spy, suffix_spy = Spy(network.language.prefix), Spy(network.expert.suffix)
    monkeypatch.setattr(network.language, "prefix", prefix_spy)
    monkeypatch.setattr(network.expert, "suffix", suffix_spy)
    prefix = case.encode()
    network.velocity(prefix, case.inputs["x_ts"][0], case.inputs["ts"][0].expand(len(valid)))
    ((tokens, turn, mask, _),), ((suffix, suffix_turn, suffix_mask, _, condition),) = (
        prefix_spy.calls,
        suffix_spy.calls,
    )
    head_dim = network.config.language.head_dim
    close(tokens[valid], expected["prefix_embs"][valid], 1e-4)
    same_turn(turn, expected["prefix_position_ids"], head_dim)
    same_turn(suffix_turn, expected["suffix_position_ids"], head_dim)
    close(suffix, expected["suffix_embs_0"], 1e-4)
    if "adarms_cond_0" in expected:
        close(condition, expected["adarms_cond_0"], 1e-5)
    length, whole = valid.shape[1], expected["full_att_2d_mask"]
    seen = mask.expand(-1, 1, length, -1)[:, 0]
    assert not expected["prefix_att_mask"].any()  # one block
    assert torch.equal(seen[valid], whole[:, :length, :length][valid])
    assert not whole[:, :length, length:].any()
    assert torch.equal(suffix_mask[:, 0].expand(-1, suffix.shape[1], -1), whole[:, length:])
    block = expected["suffix_att_mask"].cumsum(1)
    assert torch.equal(suffix_mask[:, 0, :, length:], block[:, None] <= block[:, :, None])


def test_prefix(case):
    with torch.no_grad():
        prefix = case.encode()
        output = case.network.output(prefix)
    expected, valid = case.expected, case.expected["prefix_pad_mask"]
    assert torch.equal(prefix.mask, valid)
    for layer, past in enumerate(prefix.past):
        for name, mine in (("key", past.keys), ("value", past.values)):
            theirs = expected[f"prefix_kv.{layer}.{name}"]
            close(mine[:, :, : past.length].transpose(1, 2)[valid], theirs.transpose(1, 2)[valid], 1e-4)
    close(output[valid], expected["prefix_output"][valid], 1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_velocity(case, grad):
    with torch.set_grad_enabled(grad):
        prefix = case.encode()
        before = [past.keys[:, :, : past.length].clone() for past in prefix.past]
        for t, x, expected in zip(case.inputs["ts"], case.inputs["x_ts"], case.expected["v_ts"], strict=True):
            v, _ = case.network.velocity(prefix, x, t.expand(len(x)))
            close(v, expected, 1e-4)
    assert all(torch.equal(a, b.keys[:, :, : b.length]) for a, b in zip(before, prefix.past, strict=True))


def test_time_embedding(case):
    width = case.config["expert"]["hidden_size"]
    expected = case.expected["time_emb_0"]
    close(time_embedding(case.inputs["ts"][:1].expand(len(expected)), width), expected, 1e-6)


@torch.no_grad()
def test_sample_at_the_reference_clock_and_at_ours(case):
    prefix, noise = case.encode(), case.inputs["noise"]
    for steps in case.config["sample_steps"]:
        chain, times = case.expected[f"sample.{steps}.chain"], case.expected[f"sample.{steps}.times"]
        x = noise
        for k, t in enumerate(times):
            close(x, chain[:, k], 1e-4)
            x = x - case.network.velocity(prefix, x, t.expand(len(x)))[0] / steps
        close(x, chain[:, -1], 1e-4)
        actions = case.expected[f"sample.{steps}.actions"]
        close(x, actions, 1e-4)
        sampler = FlowSampler(FlowSamplerConfig(steps, "ode"), *noise.shape[1:])
        close(sampler.ode(case.network.velocity, prefix, noise), actions, 5e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients(case, checkpointing):
    network, inputs = case.network, case.inputs
    network.set_checkpointing(checkpointing)
    network.zero_grad()
    t = inputs["time"][:, None, None]
    x = t * inputs["noise"] + (1 - t) * inputs["actions"]
    v, _ = network.velocity(case.encode(), x, inputs["time"])
    loss = (v - (inputs["noise"] - inputs["actions"])).square()
    close(loss, case.expected["train_loss_elementwise"], 1e-3)
    close(loss.mean(), case.expected["train_loss_mean"], 1e-4)
    loss.mean().backward()
    network.set_checkpointing(False)
    gradients = {published_name(name): p.grad for name, p in network.named_parameters() if p.grad is not None}
    gradients[TOKEN_TABLE] = gradients.pop(published_name("language.embed_tokens.weight"))
    for name, value in case.expected.items():
        if name.startswith("grad."):
            close(gradients[name.removeprefix("grad.")], value, 1e-4)
    norms = {name: norm for name, norm in case.config["grad_norms"].items() if norm}
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), name


def test_a_camera_that_no_row_has_may_be_left_out(case):
    masks = case.inputs["image_masks"]
    case.inputs["image_masks"] = masks & (torch.arange(len(case.cameras)) < len(case.cameras) - 1)
    x, t = case.inputs["x_ts"][0], case.inputs["ts"][0].expand(len(masks))
    with torch.no_grad():
        whole, less = case.encode(), case.encode(without=case.cameras[-1])
        close(case.network.velocity(less, x, t)[0], case.network.velocity(whole, x, t)[0], 1e-5)
    assert whole.mask.shape[1] - less.mask.shape[1] == case.network.config.vision.tokens
    case.inputs["image_masks"] = masks


# -- stochastic rollouts of RLinf on these networks -------------------------------------------------------------------


ROLLOUTS = listed("flow_sde", "rollouts")


def same(one, two):
    return one.shape == two.shape and torch.equal(one, two)


class Rollout:
    """One recorded rollout, with the case whose network made it: the one with the noise it starts from."""

    def __init__(self, folder, settings):
        whole, prefix = load_file(folder / "rollout.safetensors"), settings["prefix"]
        self.settings = settings
        self.data = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
        start = self.data["chains"][:, 0]
        near_first = sorted(folders(settings["fixture"]), key=lambda case: case.parent != folder.parent)
        started = [case for case in near_first if same(load_file(case / "inputs.safetensors")["noise"], start)]
        assert started, f"no case of {settings['fixture']} has the noise that {folder} starts from"
        self.case = Case(started[0])
        self.noise_head = self.head(
            "noise_head.mlp_logvar.moduleList.{}.linear_1", settings["noise_head_hidden"], "tanh"
        )
        self.value_head = self.head("value_head.mlp.{}", settings["value_head_hidden"], "relu", stride=2)

    def head(self, name, hidden, activation, stride=1):
        layers = len(hidden) + 1
        out = len(self.data[f"{name.format((layers - 1) * stride)}.bias"])
        head = mlp(self.case.config["expert"]["hidden_size"], hidden, activation, out)
        linears = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
        for i, linear in enumerate(linears):
            linear.load_state_dict({key: self.data[f"{name.format(i * stride)}.{key}"] for key in ("weight", "bias")})
        return head

    def std(self, hidden):
        return bounded_std(self.noise_head(hidden), *self.settings["noise_std_range"])

    def sampler(self, chunk, dim):
        settings, joint = self.settings, self.settings["joint_logprob"]
        method = settings["method"].removeprefix("flow_")
        return FlowSampler(
            FlowSamplerConfig(
                settings["num_steps"], method, settings["noise_level"], joint, "mean" if joint else "sum"
            ),
            chunk,
            dim,
        )


@pytest.mark.parametrize(("folder", "settings"), ROLLOUTS)
def test_rollout(folder, settings):
    rollout = Rollout(folder, settings)
    data, case, joint = rollout.data, rollout.case, settings["joint_logprob"]
    chains, k = data["chains"], settings["denoise_index"]
    chunk, dim = settings["action_chunk"], settings["action_env_dim"]
    sampler = rollout.sampler(chunk, dim)
    step_noise = data["step_noise"].transpose(0, 1)
    assert joint or (data["denoise_inds"] == k).all()
    transition = step_noise if joint else step_noise[:, k][:, None]
    with torch.no_grad():
        drawn = FlowNoise(case.inputs["noise"], data["denoise_inds"][:, 0], transition)
        actions, trace, log_prob = sampler.sample(case.network.velocity, case.encode(), drawn, rollout.std)
    close(actions, chains[:, -1], 1e-4)
    close(actions, data["actions"], 1e-4)
    close(log_prob, data["rollout_logprobs"].flatten(1), 1e-4)

    def recorded(chunk, dim):
        """The trace with the recorded transitions."""
        if joint:
            return trace | {"chain": chains}
        return trace | {"x_t": chains[:, k], "x_next": chains[:, k + 1, :chunk, :dim]}

    score, entropy = sampler.score(case.network.velocity, case.encode(), recorded(chunk, dim), rollout.std)
    close(score, data["train_logprobs"].flatten(1), 1e-4)
    if joint:
        close(entropy, data["train_entropy"].mean(1).flatten(1), 1e-4)
    else:  # not the Gaussian's, which test_flow_sde.py holds `gaussian_entropy` to
        assert (data["train_entropy"] == 0).all()
    score.mean().backward()
    gradients = {published_name(name): p.grad for name, p in case.network.named_parameters()}
    expected = {name.removeprefix("grad."): value for name, value in data.items() if name.startswith("grad.")}
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-4)

    horizon, width = chains.shape[2:]
    every = data["train_logprobs_full"]  # of all steps and dimensions, and of the initial noise when joint
    with torch.no_grad():
        whole, _ = rollout.sampler(horizon, width).score(
            case.network.velocity, case.encode(), recorded(horizon, width), rollout.std
        )
        close(whole, every.mean(1).flatten(1), 1e-4)
        if joint:
            config = FlowSamplerConfig(settings["num_steps"], sampler.config.method, settings["noise_level"], True)
            summed, _ = FlowSampler(config, horizon, width).score(
                case.network.velocity, case.encode(), recorded(horizon, width), rollout.std
            )
            close(summed, every[:, 1:].flatten(1), 1e-4)


@pytest.mark.parametrize(("folder", "settings"), ROLLOUTS)
@torch.no_grad()
def test_the_expert_s_output_along_a_rollout(folder, settings):
    """As the reference's value head sees it: the mean over the action tokens, at every denoise step."""
    rollout = Rollout(folder, settings)
    case, data = rollout.case, rollout.data
    prefix, times = case.encode(), rollout.sampler(1, 1).times
    values = []
    for k, t in enumerate(times[:-1]):
        x = data["chains"][:, k]
        _, hidden = case.network.velocity(prefix, x, torch.full((len(x),), t))
        values.append(rollout.value_head(hidden.mean(1)))
    values = torch.cat(values, 1)
    close(values.mean(1, keepdim=True), data["rollout_values"], 1e-4)
    k = settings["denoise_index"]
    close(values if k is None else values[:, [k]], data["train_values"], 1e-4)


# -- openpi's data transforms -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=cases("pi_preprocess"))
def preprocess(request):
    return read(request.param / "preprocess.json"), load_file(request.param / "preprocess.safetensors")


def test_images(preprocess):
    config, data = preprocess
    for i in range(len(config["images"])):
        resized = resize_with_pad(data[f"image{i}.raw"].numpy(), config["image_size"])
        assert (resized == data[f"image{i}.pil_uint8"].numpy()).all()
        # the model's own resizing, without antialias, differs by up to 49 levels: it shows where the image lies
        padding = (data[f"image{i}.torch_float"] == -1).all(-1)
        assert padding.all(1).logical_not().any() and (resized[padding] == 0).all()
        assert (resized[~padding].max(-1) > 0).mean() > 0.9


@pytest.mark.parametrize("kind", ["meanstd", "quantile"])
def test_normalisation(preprocess, kind):
    config, data = preprocess
    for what in ("state", "actions"):
        raw, expected = data[f"raw.{what}"], data[f"norm.{kind}.{what}"]
        normaliser = Normaliser({"meanstd": "openpi_mean_std", "quantile": "openpi_quantile"}[kind], raw.shape[-1])
        statistics = {name: data[f"stats.{what}.{name}"].tolist() for name in ("mean", "std", "q01", "q99")}
        normaliser.fit(statistics, "the fixture")
        close(normaliser.normalise(raw), expected, 1e-12)
        padded = F.pad(expected, (0, config["pad_dim"] - raw.shape[-1]))
        assert torch.equal(padded, data[f"norm.{kind}.{what}_padded"])
        if what == "actions":
            close(normaliser.unnormalise(expected), data[f"unnorm.{kind}.actions"][..., : raw.shape[-1]], 1e-12)


class Recorder:
    """A tokenizer that keeps what it was asked for."""

    bos_token_id = 2

    def __init__(self):
        self.texts = []

    def encode(self, text):
        self.texts.append(text)
        return [2, 100 + len(text)]


def test_prompts(preprocess):
    config, data = preprocess
    states = data["norm.quantile.state"].numpy()
    assert (state_bins(states) == data["pi05.state_bins"].numpy()).all()
    recorder = Recorder()
    for prompt, state, text in zip(config["prompts"], states, config["pi05_texts"], strict=True):
        assert pi05_text(prompt, state) == text
        assert pi05_prompt(recorder, prompt, state) == [2, 100 + len(text)]
    assert recorder.texts == config["pi05_texts"]
    recorder = Recorder()
    for prompt in config["prompts"]:
        ids = pi0_prompt(recorder, prompt)
        assert ids == [2, 100 + len(recorder.texts[-2]), 101]
    assert recorder.texts == [text for text, _ in config["pi0_encode_calls"]]
