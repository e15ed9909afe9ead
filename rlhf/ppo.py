"""Proximal policy optimisation for language models, inside Hugging Face's loop.

An update draws completions for a batch of prompts, scores them, and then makes
epochs x minibatches optimizer steps from that buffer. The loop asks for the micro-batches of its
next step (`get_batch_samples`); the buffer and its cursor answer, and they are what a checkpoint
holds. Every random choice comes from a named counter of (seed, update), so where a run was cut, or
over how many processes it ran, leaves no trace.

The numbered details in comments are those of the checklist in Huang et al. 2024 and its sources.

Shapes: B episodes of an update, P prompt, R response, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from moe.counters import permutation
from moe.errors import UserError
from moe.generation import positions, sample
from rlhf import kl
from rlhf.advantage import apply_missing_eos, gae, masked_moments, token_rewards, whiten
from rlhf.dpo import SelfCheckFailed, refuse_batch_coupling
from rlhf.kl import KLController
from rlhf.logprobs import entropy, response_logps, token_logps
from rlhf.losses import metric
from rlhf.losses.ppo import explained_variance, policy_loss, value_loss
from rlhf.reference import Reference
from rlhf.reward import RewardSource, token_scores
from sft.adapt import disable_dropout
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.text import pad_batch
from sft.trainer import StageTrainer

RATIO_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """What PPO is made of; optimisation itself is in `TrainSettings`.

    updates: rollout phases. episodes: completions per update, over all processes.
    epochs, minibatches: passes over an update's episodes and steps per pass.
    clip_high: upper clip of the ratio apart from the lower (0: the same).
    dual_clip: bound on the loss of a token with negative advantage, above 1 (0: none).
    missing_eos_penalty: subtracted from the score of a completion without EOS (0: none).
    score_clip: scores are clipped to +-this (0: not).
    """

    updates: int
    episodes: int
    epochs: int = 4
    minibatches: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    clip_high: float = 0.0
    dual_clip: float = 0.0
    value_clip: float = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    score_clip: float = 0.0
    critic_lr_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("updates", "episodes", "epochs", "minibatches", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.episodes % self.minibatches:
            raise UserError(
                f"episodes {self.episodes} must be a multiple of minibatches {self.minibatches}."
            )
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature} must be above 0: PPO has to explore.")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.updates * self.epochs * self.minibatches

    @property
    def minibatch_size(self) -> int:
        return self.episodes // self.minibatches


@dataclass(frozen=True, kw_only=True)
class RolloutBuffer:
    """The episodes of one update, the same on every process.

    prompt_BP left-padded with prompt_mask_BP; response_BR right-padded with mask_BR; the per-token
    fields (B, R) are zero where masked: old_logp, ref_logp, value, advantage (whitened if asked),
    returns. score_B: what the reward source gave, before penalties.
    """

    prompt_BP: Tensor
    prompt_mask_BP: Tensor
    response_BR: Tensor
    mask_BR: Tensor
    old_logp_BR: Tensor
    ref_logp_BR: Tensor
    value_BR: Tensor
    advantage_BR: Tensor
    return_BR: Tensor
    score_B: Tensor


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one wrapper and one optimizer hold both."""

    def __init__(self, policy: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, num_response: int
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, R+1, V) of the last R+1 positions, and the value (B, R) before each token."""
        logits = response_logits(self.policy, input_ids, attention_mask, num_response)
        value_BS = token_scores(self.critic, input_ids, attention_mask)
        return logits, value_BS[:, -num_response - 1 : -1]


def response_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_response: int
) -> Tensor:
    """Logits (B, R+1, V): the position before the response and its R positions."""
    # 2: positions count real tokens, so that left padding changes nothing.
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=positions(attention_mask),
        use_cache=False,
        logits_to_keep=num_response + 1,
    )
    return outputs.logits


class PPOTrainer(StageTrainer):
    """policy and critic are trained; reference and reward are not.

    rows: dictionaries with `prompt_ids`. Checks that stop the run: in the first minibatch of every
    update the ratio is 1 within 1e-4 and nothing is clipped; at the end the number of optimizer
    steps is updates x epochs x minibatches.
    """

    def __init__(
        self,
        policy: nn.Module,
        settings: TrainSettings,
        *,
        critic: nn.Module,
        reference: Reference,
        reward: RewardSource,
        rows: Sequence[Mapping[str, Any]],
        ppo: PPOSettings,
        kl_controller: KLController,
        pad_id: int,
        stop_ids: Sequence[int],
        **kwargs: Any,
    ) -> None:
        if settings.max_steps != ppo.steps or settings.batch_size != ppo.minibatch_size:
            raise UserError(
                f"max_steps {settings.max_steps} and batch_size {settings.batch_size} must be "
                f"{ppo.steps} (updates x epochs x minibatches) and {ppo.minibatch_size} (episodes "
                "/ minibatches)."
            )
        if not rows:
            raise UserError("PPO has no prompts.")
        refuse_batch_coupling(policy)
        refuse_batch_coupling(critic)
        for model in (policy, critic):  # 13: dropout off in every model
            disable_dropout(model)
        self.prompts = rows
        self.ppo = ppo
        self.reference = reference
        self.reward = reward
        self.kl_controller = kl_controller
        self.pad_id = pad_id
        self.stop_ids = tuple(stop_ids)
        self.buffer: RolloutBuffer | None = None
        self.tokens_generated = 0
        kwargs.setdefault("stage", "ppo")
        kwargs.setdefault("balance", BalancePolicy(scope="off"))
        super().__init__(
            ActorCritic(policy, critic),
            settings,
            rows=[{}] * settings.batch_size,  # the loop's own data set is not read
            collator=lambda rows: {},
            routed_part=policy,
            **kwargs,
        )

    @property
    def policy(self) -> nn.Module:
        policy = self.model.policy
        assert isinstance(policy, nn.Module)
        return policy

    @property
    def critic(self) -> nn.Module:
        critic = self.model.critic
        assert isinstance(critic, nn.Module)
        return critic

    def fit(self, *, resume: bool = False) -> None:
        super().fit(resume=resume)
        made = self.steps_before + self.optimizer_steps
        if made != self.ppo.steps:
            raise SelfCheckFailed(
                f"PPO made {made} optimizer steps, not {self.ppo.steps} = updates x epochs x "
                "minibatches."
            )

    # Where the loop's batches come from.

    def place(self, step: int) -> tuple[int, int, int]:
        """(update, epoch, minibatch) of an optimizer step."""
        update, within = divmod(step, self.ppo.epochs * self.ppo.minibatches)
        return (update, *divmod(within, self.ppo.minibatches))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        update, epoch, minibatch = self.place(self.state.global_step)
        if epoch == 0 and minibatch == 0:
            self.buffer = self._collect(update)
        batches = [self._micro_batch(rows) for rows in self._micro_rows(update, epoch)[minibatch]]
        self.measure_step(batches)
        return batches, None

    def _micro_rows(self, update: int, epoch: int) -> list[list[list[int]]]:
        """Rows of this process: minibatch -> micro-batch -> episode indices.

        26: a fresh permutation for every epoch.
        """
        order = permutation(
            self.settings.seed, "ppo-minibatch", update, epoch, length=self.ppo.episodes
        )
        size, processes = self.ppo.minibatch_size, self.accelerator.num_processes
        share = size // processes
        micro, _ = self.settings.per_process(processes)
        start = self.accelerator.process_index * share
        plan = []
        for m in range(self.ppo.minibatches):
            mine = order[m * size : (m + 1) * size][start : start + share]
            plan.append([mine[i : i + micro] for i in range(0, share, micro)])
        return plan

    def _micro_batch(self, rows: list[int]) -> dict[str, Any]:
        """Some episodes, cut to their own longest prompt and response."""
        buffer = self.buffer
        assert buffer is not None
        taken = {f.name: getattr(buffer, f.name)[rows] for f in fields(buffer)}
        num_prompt = max(int(taken["prompt_mask_BP"].sum(dim=1).max()), 1)
        num_response = max(int(taken["mask_BR"].sum(dim=1).max()), 1)
        for name in ("prompt_BP", "prompt_mask_BP"):
            taken[name] = taken[name][:, -num_prompt:]
        for name in taken:
            if name.endswith("_BR"):
                taken[name] = taken[name][:, :num_response]
        taken["input_ids"] = torch.cat([taken["prompt_BP"], taken["response_BR"]], dim=1)
        taken["attention_mask"] = torch.cat([taken["prompt_mask_BP"], taken["mask_BR"]], dim=1)
        return taken

    # The rollout phase.

    def _prompt_rows(self, update: int) -> list[int]:
        """Prompt indices of an update: permutation after permutation of all prompts."""
        first, count = update * self.ppo.episodes, self.ppo.episodes
        epochs = range(first // len(self.prompts), (first + count - 1) // len(self.prompts) + 1)
        order = [
            row
            for epoch in epochs
            for row in permutation(self.settings.seed, "order", epoch, length=len(self.prompts))
        ]
        start = first - epochs.start * len(self.prompts)
        return order[start : start + count]

    @torch.no_grad()
    def _collect(self, update: int) -> RolloutBuffer:
        """Draw, score, and prepare advantages for one update."""
        device = self.args.device
        count = self.ppo.episodes
        chosen = self._prompt_rows(update)
        prompt_BP, prompt_mask_BP = pad_batch(
            [self.prompts[i]["prompt_ids"] for i in chosen], pad_id=self.pad_id, side="left"
        )
        prompt_BP, prompt_mask_BP = prompt_BP.to(device), prompt_mask_BP.to(device)
        mine = self._own_episodes()
        rollout = sample(
            self.policy,
            prompt_BP[mine],
            prompt_mask_BP=prompt_mask_BP[mine],
            max_new_tokens=self.ppo.max_new_tokens,
            temperature=self.ppo.temperature,
            stop_ids=self.stop_ids,
            seed=self.settings.seed,
            purpose="ppo-rollout",
            sample_ids=[update * count + i for i in mine],
            pad_id=self.pad_id,
        )
        full_ids = torch.cat([prompt_BP[mine], rollout.response_BR], dim=1)
        full_mask = torch.cat([prompt_mask_BP[mine], rollout.mask_BR], dim=1)
        score = self.reward(full_ids, full_mask).float().to(device)
        response_BR = self._gather_rows(rollout.response_BR, mine)
        mask_BR = self._gather_rows(rollout.mask_BR.long(), mine).bool()
        drawn_logp_BR = self._gather_rows(rollout.logp_BR, mine)
        ended_B = self._gather_rows(rollout.ended_B.long(), mine).bool()
        score_B = self._gather_rows(score, mine)
        zeros = torch.zeros_like(drawn_logp_BR)
        self.buffer = RolloutBuffer(
            prompt_BP=prompt_BP,
            prompt_mask_BP=prompt_mask_BP,
            response_BR=response_BR,
            mask_BR=mask_BR,
            old_logp_BR=zeros,
            ref_logp_BR=zeros.clone(),
            value_BR=zeros.clone(),
            advantage_BR=zeros.clone(),
            return_BR=zeros.clone(),
            score_B=score_B,
        )
        old_logp_BR, ref_logp_BR, value_BR = self._evaluate_episodes(update)
        self.tokens_generated += int(mask_BR.sum())
        return self._with_advantages(
            self.buffer,
            old_logp_BR=old_logp_BR,
            ref_logp_BR=ref_logp_BR,
            value_BR=value_BR,
            drawn_logp_BR=drawn_logp_BR,
            ended_B=ended_B,
        )

    def _own_episodes(self) -> list[int]:
        """The episodes of an update that this process draws."""
        accelerator = self.accelerator
        start, step = accelerator.process_index, accelerator.num_processes
        return list(range(start, self.ppo.episodes, step))

    def _gather_rows(self, mine: Tensor, rows: list[int]) -> Tensor:
        """Rows of every process in their global places."""
        whole = mine.new_zeros(self.ppo.episodes, *mine.shape[1:])
        whole[rows] = mine
        return self._all_sum(whole)

    def _evaluate_episodes(self, update: int) -> tuple[Tensor, Tensor, Tensor]:
        """Old and reference log-probabilities and values, (B, R) each.

        Computed in the micro-batches of the first epoch, so that its first minibatch repeats the
        same computation: there the ratio is 1 unless something is wrong (27).
        """
        assert self.buffer is not None
        shape = self.buffer.mask_BR.shape
        held = [self.buffer.value_BR.new_zeros(shape) for _ in range(3)]
        self.model.eval()
        for rows in [rows for plan in self._micro_rows(update, 0) for rows in plan]:
            batch = self._micro_batch(rows)
            length = batch["mask_BR"].shape[1]
            logits, value_BR = self.model(batch["input_ids"], batch["attention_mask"], length)
            with self.reference.lend() as reference:
                ref_logits = response_logits(
                    reference, batch["input_ids"], batch["attention_mask"], length
                )
            for target, found in zip(
                held,
                (self._logps(logits, batch), self._logps(ref_logits, batch), value_BR),
                strict=True,
            ):
                target[rows, :length] = torch.where(batch["mask_BR"], found.to(target.dtype), 0.0)
        self.model.train()
        old_logp_BR, ref_logp_BR, value_BR = (self._all_sum(tensor) for tensor in held)
        return old_logp_BR, ref_logp_BR, value_BR

    def _logps(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities (B, R) of the response at the sampling temperature (4)."""
        ids = batch["input_ids"][:, -logits.shape[1] :]
        logp = token_logps(logits, ids, temperature=self.ppo.temperature)
        return response_logps(logp[:, 1:], batch["mask_BR"])

    def _with_advantages(
        self,
        buffer: RolloutBuffer,
        *,
        old_logp_BR: Tensor,
        ref_logp_BR: Tensor,
        value_BR: Tensor,
        drawn_logp_BR: Tensor,
        ended_B: Tensor,
    ) -> RolloutBuffer:
        ppo, mask_BR = self.ppo, buffer.mask_BR
        score_B = apply_missing_eos(  # 16
            buffer.score_B, ended_B, penalty=ppo.missing_eos_penalty or None
        )
        if ppo.score_clip:
            score_B = score_B.clamp(-ppo.score_clip, ppo.score_clip)  # 19
        coef = self.kl_controller.coef
        reward_BR = token_rewards(  # 14, 15
            score_B, old_logp_BR, ref_logp_BR, mask_BR=mask_BR, kl_coef=coef
        )
        if ppo.whiten_rewards:
            reward_BR = whiten(reward_BR, mask=mask_BR, shift_mean=False)  # 18
        advantage_BR, return_BR = gae(  # 20
            reward_BR, value_BR, mask_BR=mask_BR, gamma=ppo.gamma, lam=ppo.lam
        )
        if ppo.whiten_advantages:  # 22: moments of the whole update, over all processes
            advantage_BR = whiten(
                advantage_BR, mask=mask_BR, moments=masked_moments(advantage_BR, mask_BR)
            )
        kl_B = torch.where(mask_BR, kl.k1(old_logp_BR, ref_logp_BR), 0.0).sum(dim=1)
        mismatch_BR = torch.where(mask_BR, (old_logp_BR - drawn_logp_BR).abs(), 0.0)
        shaped_B = torch.where(mask_BR, reward_BR, 0.0).sum(dim=1)
        # Every process holds all episodes, and sums are added over processes: each gives its own.
        mine = self._own_episodes()
        self._sums.add(
            LossOutput(
                loss_sum=score_B[mine].sum(),
                count=mask_BR[mine].any(dim=1).sum(),
                metrics={
                    "reward/score": metric(buffer.score_B[mine]),
                    "reward/shaped": metric(shaped_B[mine]),
                    "reward/non_score": metric((shaped_B - score_B)[mine]),
                    "policy/kl_sequence": metric(kl_B[mine]),
                    "policy/kl_coef": metric(torch.full_like(kl_B, coef)[mine]),
                    "rollout/length": metric(mask_BR.sum(dim=1).float()[mine]),
                    "rollout/ended": metric(ended_B.float()[mine]),
                },
                maxima={"rollout/logp_mismatch": mismatch_BR.max()},
            )
        )
        self.kl_controller.update(float(kl_B.mean()), self.ppo.episodes)  # 17
        return RolloutBuffer(
            prompt_BP=buffer.prompt_BP,
            prompt_mask_BP=buffer.prompt_mask_BP,
            response_BR=buffer.response_BR,
            mask_BR=mask_BR,
            old_logp_BR=old_logp_BR,
            ref_logp_BR=ref_logp_BR,
            value_BR=value_BR,
            advantage_BR=advantage_BR,
            return_BR=torch.where(mask_BR, return_BR, 0.0),
            score_B=buffer.score_B,
        )

    # The update phase.

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return int(batch["mask_BR"].sum())

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        mask_BR = batch["mask_BR"]
        logits, value_BR = model(batch["input_ids"], batch["attention_mask"], mask_BR.shape[1])
        ppo = self.ppo
        policy = policy_loss(  # 23
            self._logps(logits, batch),
            batch["old_logp_BR"],
            advantage_BR=batch["advantage_BR"],
            mask_BR=mask_BR,
            clip_low=ppo.clip,
            clip_high=ppo.clip_high or ppo.clip,
            dual_clip=ppo.dual_clip or None,
        )
        value = value_loss(  # 24
            value_BR,
            batch["value_BR"],
            return_BR=batch["return_BR"],
            mask_BR=mask_BR,
            clip=ppo.value_clip or None,
        )
        entropy_BR = response_logps(  # 25
            entropy(logits, temperature=ppo.temperature)[:, 1:], mask_BR
        )
        self._check_first_ratio(policy)
        total = policy.loss_sum + ppo.value_coef * value.loss_sum
        if ppo.entropy_coef:
            total = total - ppo.entropy_coef * entropy_BR.sum()
        return LossOutput(
            loss_sum=total,
            count=policy.count,
            metrics={
                **policy.metrics,
                **value.metrics,
                "policy/loss": (policy.loss_sum.detach(), policy.count),
                "value/loss": (value.loss_sum.detach(), value.count),
                "policy/entropy": metric(entropy_BR, mask_BR),
            },
            maxima=policy.maxima,
        )

    def _check_first_ratio(self, policy: LossOutput) -> None:
        update, epoch, minibatch = self.place(self.state.global_step)
        if epoch or minibatch:
            return
        deviation = float(policy.maxima["policy/ratio_max_deviation"])
        clipped = float(policy.metrics["policy/clip_fraction"][0])
        if deviation > RATIO_TOLERANCE or clipped:
            raise SelfCheckFailed(
                f"PPO update {update}: in the first minibatch the ratio is off 1 by "
                f"{deviation:.2e} (allowed {RATIO_TOLERANCE:.0e}) and {clipped:.0f} tokens are "
                "clipped: the old log-probabilities are not this policy's."
            )

    def _drain(self) -> dict[str, Any]:
        metrics = super()._drain()
        pieces = {
            name: (metrics[name][0] * metrics[name][1], metrics[name][1])
            for name in (
                "value/error",
                "value/error_squared",
                "value/return",
                "value/return_squared",
            )
            if name in metrics
        }
        for name in pieces:
            del metrics[name]
        if pieces:
            explained = explained_variance(
                {str(k): (torch.tensor(a), torch.tensor(b)) for k, (a, b) in pieces.items()}
            )
            if explained is not None:
                metrics["value/explained_variance"] = explained
        return metrics

    def own_settings(self) -> dict[str, Any]:
        return {"ppo": asdict(self.ppo)}

    # What the loop keeps.

    optimizer: torch.optim.Optimizer | None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            lr = self.settings.lr
            decayed = set(self.get_decay_parameter_names(self.model))  # not norms, not biases
            groups = [
                {
                    "params": [p for _, p in own],
                    "lr": scale * lr,
                    "weight_decay": self.settings.weight_decay if decay else 0.0,
                }
                for prefix, scale in (("policy.", 1.0), ("critic.", self.ppo.critic_lr_scale))
                for decay in (True, False)
                if (
                    own := [
                        (name, p)
                        for name, p in self.model.named_parameters()
                        if p.requires_grad
                        and name.startswith(prefix)
                        and (name in decayed) == decay
                    ]
                )
            ]
            options.pop("params", None)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        assert self.buffer is not None
        return (
            {f.name: getattr(self.buffer, f.name) for f in fields(self.buffer)},
            {"kl": self.kl_controller.state_dict(), "tokens_generated": self.tokens_generated},
        )

    def load_extra_state(self, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        self.buffer = RolloutBuffer(**{k: v.to(self.args.device) for k, v in tensors.items()})
        self.kl_controller.load_state_dict(document["kl"])
        self.tokens_generated = document["tokens_generated"]
