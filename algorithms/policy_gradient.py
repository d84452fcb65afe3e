"""What PPO and GRPO share: a clipped surrogate of the log-prob terms of decisions, in minibatches, for some epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embodied_rl.algorithms.base import Algorithm, Metrics
from embodied_rl.algorithms.cotraining import CoTraining
from embodied_rl.algorithms.losses import (
    Granularity,
    aggregate,
    importance_weight,
    interpolate,
    kl_estimate,
    policy_loss,
    segment_sums,
    term_mask,
)
from embodied_rl.algorithms.optimization import (
    Differentiation,
    Optimizers,
    actor_parameters,
    adam,
    apply,
    read_finite,
    seed_policy_draws,
)
from embodied_rl.errors import UserError
from embodied_rl.types import Score

Batch = dict[str, Any]


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Improving a policy by the clipped surrogate."""

    learning_rate: float = 1e-4
    """Of the policy."""
    adam_beta2: float = 0.999
    """Decay of Adam's squared gradients, of policy and critic."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    """Above 1: the loss of a bad action is at most this many times its advantage."""
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    """Weight of the KL divergence (estimator k3) from the policy that reinforcement learning started from; above 0 a
    frozen copy of it is kept."""
    granularity: Granularity = "chunk"
    """What has a probability ratio of its own: the chunk, each action, or each log-prob term."""
    mean_over: Literal["terms", "rows", "episodes"] = "terms"
    """"terms" weighs all ratios alike, "rows" all decisions, "episodes" all episodes and, within one, all its steps."""
    epochs: int = 5
    minibatches: int = 4
    """Per epoch."""
    microbatch: int | None = None
    """Decisions of a minibatch that are differentiated at a time; the gradients add up to those of the minibatch. Fewer
    take less memory. None = all."""
    max_grad_norm: float = 1.0
    """Of each optimizer's own parameters."""
    target_kl: float | None = None
    """Stop learning from a batch when a minibatch shows a larger approximate KL."""
    adapt_to_kl: float | None = None
    """Approximate KL that a batch should move the policy by: its learning rate is divided by 1.5 after one that moved
    it more than twice as far, and multiplied by 1.5 after one that moved it less than half as far."""
    staleness: int = 0
    """Updates by which the weights that collect may be behind; above 0 the loss is decoupled (asynchronous PPO)."""
    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """Log-probs that the decoupled loss clips around, those of the weights at the start of an update: by another pass
    over the batch, or estimated from those of the weights that collected it and the current ones."""
    max_importance_weight: float = 2.0
    """Of the decoupled loss: what the weights at the start of an update make more likely than the weights that
    collected it by more than this factor is left out."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1:
            raise UserError("algorithm: epochs and minibatches must be at least 1")
        if self.microbatch is not None and self.microbatch < 1:
            raise UserError(f"algorithm: microbatch must be at least 1, not {self.microbatch}; none takes all at once")
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise UserError(
                f"algorithm: needs 0 <= clip_low < 1 and clip_high >= 0, not {self.clip_low}, {self.clip_high}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"algorithm: dual_clip must be above 1, not {self.dual_clip}; none switches it off")
        for name in ("target_kl", "adapt_to_kl"):
            if (wanted := getattr(self, name)) is not None and wanted <= 0:
                raise UserError(f"algorithm: {name} must be above 0, not {wanted}; none switches it off")
        if self.kl_coefficient < 0 or self.staleness < 0:
            raise UserError("algorithm: kl_coefficient and staleness must not be negative")
        if self.max_importance_weight <= 1:
            raise UserError(f"algorithm: max_importance_weight must be above 1, not {self.max_importance_weight}")


class PolicyGradient(Algorithm):
    """A subclass makes rows of decisions and calls `improve`.

    Rows: {"inputs", "trace" [R,...], "log_prob" [R,L] of the weights that acted, "valid" bool [R,K],
    "advantages" [R], "weight" [R] (see `episode_weights`)} and what the subclass's own `losses` needs.
    """

    def __init__(self, config: Any, policy: Any) -> None:
        self.config = config
        self.policy = policy
        self.policy_optimizer = adam(actor_parameters(policy), config.learning_rate, beta2=config.adam_beta2)
        self.reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coefficient else None
        self.cotraining: CoTraining | None = None
        self.differentiation = Differentiation()
        self.improve_elsewhere: Callable[[Batch, int, torch.Generator], Metrics] | None = None
        """What `improve` leaves its work to, if anything."""
        self.iterations = 0
        self.updates = 0
        self.lag = 0
        """Updates by which the weights that collected the current batch were behind."""
        self.complete = False
        """All actions of the current batch were executed: nothing needs a mask."""

    @property
    def staleness(self) -> int:
        return self.config.staleness

    def cotrain(self, cotraining: CoTraining) -> None:
        self.cotraining = cotraining

    def improve(self, data: Batch, version: int, generator: torch.Generator) -> Metrics:
        """Several epochs over the rows of `data`, which weights `version` collected: the means of the metrics over the
        updates made, decisions, updates. Raises `UserError` when one is not finite, leaving the policy as it was before
        that update."""
        if self.improve_elsewhere is not None:
            return self.improve_elsewhere(data, version, generator)
        self.iterations += 1
        self.lag = self.iterations - 1 - version
        rows = len(data["log_prob"])
        if rows == 0:
            return {"decisions": 0.0, "updates": 0.0}
        self.complete = bool(data["valid"].all())
        seed_policy_draws(generator, self.policy.device)
        if self.config.staleness and self.config.proximal == "recomputed":
            data = data | {"proximal": self._scores(self.policy, data)}
        if self.reference is not None:
            data = data | {"reference": self._scores(self.reference, data)}
        history: list[Metrics] = []
        for index in self._minibatches(rows, generator):
            metrics = self._update(data, index.to(data["log_prob"].device))
            if metrics is None:
                break
            history.append(metrics)
        if history and self.config.adapt_to_kl is not None and "approx_kl" in history[-1]:
            last = history[-self.config.minibatches :]
            self._adapt(sum(metrics["approx_kl"] for metrics in last) / len(last))
        means = {name: sum(metrics[name] for metrics in history) / len(history) for name in (history or [{}])[0]}
        return means | {"decisions": float(rows), "updates": float(len(history))}

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Optimizers]:
        """(loss, metrics, the optimizers that follow it by the name of their gradient norm) of a minibatch."""
        score = self.policy.evaluate_actions(batch["inputs"], batch["trace"])
        loss, metrics = self.policy_loss(batch, score)
        return loss, metrics, {"grad_norm": self.policy_optimizer}

    def policy_loss(self, batch: Batch, score: Score) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {policy_loss, approx_kl, clip_fraction, entropy, and kl with a reference, dropped with staleness})."""
        config, valid = self.config, batch["valid"]
        if config.granularity == "action" and bool((score.term_step < 0).any()):
            raise UserError(
                f"algorithm.granularity 'action' needs log-prob terms per action, but {type(self.policy).__name__} "
                f"scores the whole chunk: use 'chunk'"
            )
        terms = score.log_prob_mask
        if not self.complete:
            terms = term_mask(valid, score.term_step, terms)

        def sums(x: Tensor) -> tuple[Tensor, Tensor | None]:
            return segment_sums(x, terms, score.term_step, valid.shape[1], config.granularity)

        log_prob, mask = sums(score.log_prob)
        behavior, _ = sums(batch["log_prob"])

        def mean(x: Tensor) -> Tensor:
            if config.mean_over == "episodes":
                return aggregate(x, mask, "rows", batch["weight"])
            return aggregate(x, mask, config.mean_over)

        if not config.staleness:
            old = behavior
        elif config.proximal == "recomputed":
            old, _ = sums(batch["proximal"])
        else:
            old = interpolate(behavior, log_prob.detach(), self.lag)
        advantages = batch["advantages"][:, None]
        losses, clipped = policy_loss(
            log_prob, old, advantages, mask, config.clip_low, config.clip_high, config.dual_clip
        )
        weight = importance_weight(old, behavior, mask, config.max_importance_weight) if config.staleness else None
        metrics = {
            "policy_loss": mean(losses if weight is None else losses * weight),
            "approx_kl": aggregate(kl_estimate(old, log_prob.detach(), "k3"), mask),
            "clip_fraction": aggregate(clipped.float(), mask),
            "entropy": mean(sums(score.entropy)[0]),
        }
        if weight is not None:
            metrics["dropped"] = aggregate((weight == 0).float(), mask)
        loss = metrics["policy_loss"]
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * metrics["entropy"]
        if self.reference is not None:
            metrics["kl"] = mean(kl_estimate(log_prob, sums(batch["reference"])[0], "k3"))
            loss = loss + config.kl_coefficient * metrics["kl"]
        if "share" not in batch:  # all of the minibatch at once
            return loss, metrics
        over_terms = {"approx_kl", "clip_fraction", "dropped"}
        share, term_share = batch["share"], batch["term_share"]
        return share * loss, {
            name: (term_share if name in over_terms else share) * metric for name, metric in metrics.items()
        }

    def _update(self, data: Batch, index: Tensor) -> Metrics | None:
        """One minibatch, the rows `index`; None, and nothing changed, when the policy has moved too far."""
        optimizers: Optimizers = {}
        metrics: dict[str, Tensor] = {}
        for part in self._microbatches(data, index):
            with self.differentiation.computing(self.policy.device):
                loss, found, optimizers = self.losses(part)
            self.differentiation.add(loss, optimizers, first=not metrics)
            found = {name: value.detach() for name, value in found.items()}
            metrics = {name: metrics[name] + value for name, value in found.items()} if metrics else found
        if self.cotraining is not None and "grad_norm" in optimizers:  # not while the critic warms up
            whose = self.differentiation
            for loss in self.cotraining.losses(self.updates, self.config.microbatch, whose.rank, whose.ranks):
                self.differentiation.add(loss, {"grad_norm": self.policy_optimizer}, first=False)
                metrics["cotraining_loss"] = loss.detach() + metrics.get("cotraining_loss", 0.0)
        norms, metrics = self.differentiation.total(optimizers, metrics)
        values = read_finite(metrics | norms, self.updates)
        if self.config.target_kl is not None and values.get("approx_kl", 0.0) > self.config.target_kl:
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            return None
        apply(optimizers, norms, self.config.max_grad_norm)
        self.updates += 1
        return values

    def _microbatches(self, data: Batch, index: Tensor) -> Iterator[Batch]:
        """What this process differentiates of the rows `index`, in parts with their "row_share" of these rows,
        "term_share" of the ratios and "share" of what the policy loss is a mean of."""
        config = self.config
        pieces = self._pieces(index, config.microbatch)
        if len(pieces) == self.differentiation.ranks == 1:
            yield self._here(select(data, index))
            return
        rows = torch.ones_like(data["weight"])
        single = config.granularity == "chunk" or data["log_prob"].shape[1] == 1
        terms = rows if single else data["valid"].sum(1).to(rows.dtype)  # every step has equally many
        weight = {"terms": terms, "rows": rows, "episodes": data["weight"]}[config.mean_over]
        shares = {"row_share": rows, "term_share": terms, "share": weight}
        for piece in pieces:
            # A rank without a row takes part with one that counts for nothing.
            batch = select(data, piece if len(piece) else index[:1])
            batch |= {name: of[piece].sum() / of[index].sum() for name, of in shares.items()}
            yield self._here(batch)

    def _pieces(self, index: Tensor, size: int | None) -> tuple[Tensor, ...]:
        """This rank's part of `index` in parts of at most `size`, some of them empty: every rank has equally many."""
        whose = self.differentiation
        most = -(-len(index) // whose.ranks)
        return index.tensor_split(whose.ranks)[whose.rank].tensor_split(-(-most // (size or most)))

    def _here(self, batch: Batch) -> Batch:
        """`batch` where the policy is."""
        return tree_map(batch, lambda tensor: tensor.to(self.policy.device))

    def _adapt(self, kl: float) -> None:
        wanted = self.config.adapt_to_kl
        factor = 1 / 1.5 if kl > 2 * wanted else 1.5 if kl < wanted / 2 else 1.0
        for group in self.policy_optimizer.param_groups:
            group["lr"] = min(
                max(group["lr"] * factor, self.config.learning_rate / 100), self.config.learning_rate * 100
            )

    def _minibatches(self, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Row indices of every minibatch of every epoch, each epoch in a fresh order."""
        for _ in range(self.config.epochs):
            order = torch.randperm(rows, generator=generator)
            yield from order.tensor_split(min(self.config.minibatches, rows))

    @torch.no_grad()
    def _scores(self, policy: Any, data: Batch) -> Tensor:
        """[R,L], what `policy` says of the recorded actions, in parts as large as those that are differentiated."""
        recorded = data["log_prob"]
        rows = len(recorded)
        scores = torch.zeros_like(recorded, device=policy.device)
        size = self.config.microbatch or -(-rows // self.config.minibatches)
        known = {name: data[name] for name in ("inputs", "trace")}
        for piece in self._pieces(torch.arange(rows, device=recorded.device), size):
            batch = self._here(select(known, piece if len(piece) else piece.new_zeros(1)))
            with self.differentiation.computing(policy.device):
                found = policy.evaluate_actions(batch["inputs"], batch["trace"]).log_prob
            scores[piece.to(scores.device)] = found[: len(piece)].to(scores.dtype)
        return self.differentiation.sum(scores).to(recorded.device)

    def modules(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"policy": self.policy_optimizer}

    def counters(self) -> dict[str, float]:
        return {"iterations": self.iterations, "updates": self.updates}

    def load_counters(self, counters: dict[str, float]) -> None:
        self.iterations, self.updates = int(counters["iterations"]), int(counters["updates"])


def episode_weights(valid: Tensor, tickets: Tensor) -> Tensor:
    """float32 [R]: executed steps of a decision as a share of those of its episode; `valid` [R,K], `tickets` [R].
    The weights of an episode add up to 1, and within one every step weighs the same (length normalisation)."""
    steps = valid.sum(-1).float()
    episode = tickets.unique(return_inverse=True)[1].to(steps.device)
    total = steps.new_zeros(len(steps)).index_add(0, episode, steps)
    return steps / total[episode].clamp(min=1)


def tree_map(data: Any, function: Any) -> Any:
    """Apply `function` to every tensor in nested dicts."""
    if isinstance(data, dict):
        return {name: tree_map(value, function) for name, value in data.items()}
    return function(data)


def select(data: Batch, index: Tensor) -> Batch:
    """The rows `index` of every tensor."""
    return tree_map(data, lambda tensor: tensor.index_select(0, index))
