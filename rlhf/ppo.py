"""Proximal policy optimisation for language models and its kin, inside Hugging Face's loop.

An update draws completions for a batch of prompts, scores them, and then makes
epochs x minibatches optimizer steps from that buffer. The loop asks for the micro-batches of its
next step (`get_batch_samples`); the buffer and the step's number answer, and they are what a
checkpoint holds.

The numbers in comments are those of rlhf/CHECKLIST.md. Beside this file: `rlhf.ppo_settings` (the
options), `rlhf.actor_critic` (the module), `rlhf.episodes` (who draws and learns what),
`rlhf.shaping` (scores to advantages), `rlhf.ppo_objective` (the loss), `rlhf.routing_watch`,
`rlhf.brake`, `rlhf.ptx`.

Shapes: B episodes of an update, P prompt, R response, S = P + R, L MoE layers, K experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import UserError
from moe.generation import router_specs
from moe.router_spec import refuse_undecodable
from rlhf.actor_critic import Actor, ActorCritic
from rlhf.actor_critic import response_logits as response_logits
from rlhf.advantage import masked_moments, whiten
from rlhf.alarms import POLICY
from rlhf.brake import Brake
from rlhf.dpo import SelfCheckFailed
from rlhf.episodes import Plan
from rlhf.episodes import RolloutBuffer as RolloutBuffer
from rlhf.kl import KLController
from rlhf.losses.ppo import explained_variance, ratio_variance
from rlhf.ppo_objective import Weights, episode_loss, policy_mean
from rlhf.ppo_settings import PPOSettings as PPOSettings
from rlhf.ptx import TextMix, num_learned, num_tokens, text_loss
from rlhf.reference import Reference, beside_the_policy
from rlhf.reward import ModelReward, RewardSource
from rlhf.rollout_phase import RolloutPhase
from rlhf.routing_guard import FLAG, has_noisy_router, refuse_batch_coupling
from rlhf.routing_replay import refuse_without_choice, replayed
from rlhf.routing_watch import Watch, flip_metrics, watched
from sft.adapt import disable_dropout
from sft.checkpoint import Checkpoint
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import StageTrainer

RATIO_TOLERANCE = 1e-4
# Sums that are logged as what they give together.
_PIECES = {
    "value/explained_variance": (explained_variance, ("value/error", "value/return")),
    "policy/ratio_variance": (ratio_variance, ("policy/ratio_deviation",)),
}


class PPOTrainer(StageTrainer):
    """policy and critic are trained; reference and reward are not.

    critic: a scalar model per token, or None for a value head on the policy's trunk (12). With an
    `advantage` other than gae (GRPO, RLOO, ...) there is neither, and it has to be None.
    rows: dictionaries with `prompt_ids`. ptx_rows: rows of SFT, mixed in by `ppo.ptx_coef`.
    allow_batch_dependent_routing: train also where a router draws noise (the ratio is then not
    checked) or the critic's couples tokens; a policy that cannot be sampled is refused anyway.
    Checks that stop the run: in the first minibatch of every update the ratio is 1 within 1e-4 and
    nothing is clipped; at the end the number of optimizer steps, with those left out by target_kl
    and ratio_threshold, is updates x epochs x minibatches.
    """

    alarms = POLICY

    def __init__(
        self,
        policy: nn.Module,
        settings: TrainSettings,
        *,
        critic: nn.Module | None,
        reference: Reference,
        reward: RewardSource,
        rows: Sequence[Mapping[str, Any]],
        ppo: PPOSettings,
        kl_controller: KLController,
        pad_id: int,
        stop_ids: Sequence[int],
        ptx_rows: Sequence[Mapping[str, Any]] | None = None,
        allow_batch_dependent_routing: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_sizes(settings, ppo)
        if not rows:
            raise UserError("PPO has no prompts.")
        if (ptx_rows is not None) != (ppo.ptx_coef > 0):
            raise UserError("ptx_rows and a ptx_coef above 0 go together: give both or neither.")
        if critic is not None and not ppo.has_critic:
            raise UserError(f"advantage {ppo.advantage} asks no critic: leave it out.")
        if ppo.replay != "none":
            refuse_without_choice(policy, f"replay {ppo.replay}")
        if ppo.rollout_numerics == "router_noise":
            refuse_without_choice(policy, "rollout_numerics router_noise")
        models = [policy] if critic is None else [policy, critic]
        for spec in router_specs(policy):
            refuse_undecodable(spec)  # it is also sampled
        scorer = getattr(reward, "model", None)
        guarded = [*models, scorer] if isinstance(scorer, nn.Module) else models
        refuse_batch_coupling(*guarded, allowed=allow_batch_dependent_routing)
        for model in models:
            disable_dropout(model)  # 13: dropout off in every model
        self.routing_flag = {FLAG: True} if allow_batch_dependent_routing else {}
        self.is_noisy = has_noisy_router(policy)
        self.ppo = ppo
        self.reference = reference
        self.reward = reward
        self.texts = None if ptx_rows is None else TextMix(ptx_rows, pad_id=pad_id)
        self.brake = Brake(ppo, self._all_sum)
        self.buffer: RolloutBuffer | None = None
        self._skipped_before = 0  # of the checkpoint that this training continues
        self._weights = Weights()
        self._output: LossOutput | None = None  # of the last micro-batch
        both = ActorCritic(policy, critic) if ppo.has_critic else Actor(policy)
        self.rollouts = RolloutPhase(
            both,
            reference,
            reward=reward,
            prompts=rows,
            kl_controller=kl_controller,
            pad_id=pad_id,
            stop_ids=stop_ids,
            all_sum=self._all_sum,
            running_scale=ppo.score_scaling == "running",
        )
        kwargs.setdefault("stage", "ppo")
        kwargs.setdefault("balance", BalancePolicy(scope="off"))
        super().__init__(
            both,
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
        """The scalar model, or the value head on the policy's trunk; UserError without one."""
        critic = self.model.critic
        if not isinstance(critic, nn.Module):
            raise UserError(f"advantage {self.ppo.advantage} asks no critic: there is none.")
        return critic

    @property
    def kl_controller(self) -> KLController:
        return self.rollouts.kl_controller

    @property
    def tokens_generated(self) -> int:
        return self.rollouts.tokens_generated

    @property
    def plan(self) -> Plan:
        processes = self.accelerator.num_processes
        micro, _ = self.settings.per_process(processes)
        return Plan(
            ppo=self.ppo,
            seed=self.settings.seed,
            process=self.accelerator.process_index,
            num_processes=processes,
            micro=micro,
            chunk=micro if self.settings.micro_batch_size else self.ppo.episodes,
        )

    def fit(self, *, resume: bool = False) -> None:
        super().fit(resume=resume)
        skipped = self.brake.skipped_steps
        made = self.steps_before - self._skipped_before + self.optimizer_steps
        if made + skipped != self.ppo.steps:
            raise SelfCheckFailed(
                f"PPO made {made} optimizer steps and left out {skipped}, together not "
                f"{self.ppo.steps} = updates x epochs x minibatches."
            )

    # Where the loop's batches come from.

    def place(self, step: int) -> tuple[int, int, int]:
        """(update, epoch, minibatch) of an optimizer step."""
        return self.plan.place(step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        update, epoch, minibatch = self.place(self.state.global_step)
        if epoch == 0 and minibatch == 0:
            self.buffer, found = self.rollouts.collect(update, plan=self.plan, device=device)
            self._sums.add(found)
        if self.brake.has_stopped(update):
            return [{}] * num_batches, None
        batches = self._batches(update, epoch, minibatch)
        # Before the denominators are known: a first pass that counts experts needs all its passes.
        self._weights = Weights(
            kl_coef=self.rollouts.loss_kl_coef,
            text=float("ptx_labels" in batches[0]),
            policy_learns=update >= self.ppo.critic_warmup,
        )
        self.measure_step(batches)
        self._weigh(batches)
        return batches, None

    def _batches(self, update: int, epoch: int, minibatch: int) -> list[dict[str, Any]]:
        """The micro-batches of this process."""
        assert self.buffer is not None
        plan = self.plan
        batches: list[dict[str, Any]] = [
            self.buffer.rows(rows) for rows in plan.micro_batches(update, epoch, minibatch)
        ]
        if self.ppo.whitens and self.ppo.whitening_scope == "minibatch":  # 22
            rows = plan.minibatch(update, epoch, minibatch)
            moments = masked_moments(self.buffer.advantage_BR[rows], self.buffer.mask_BR[rows])
            for batch in batches:
                batch["advantage_BR"] = whiten(
                    batch["advantage_BR"],
                    mask=batch["mask_BR"],
                    unbiased=self.ppo.unbiased,
                    moments=moments,
                )
        if self.texts is not None and update >= self.ppo.critic_warmup:
            texts = self.texts.micro_batches(self.state.global_step, plan)
            for batch, text in zip(batches, texts, strict=True):
                batch.update(text)
        return batches

    def _weigh(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Denominators of the step's terms with units of their own, over all processes."""
        has_texts = self._weights.text > 0
        per_token = self.ppo.compat == "none" and self.ppo.loss_mean == "token"
        has_values = self.ppo.has_critic and not per_token
        if not (has_values or has_texts):
            return
        counts = [
            [
                int(batch["value_mask_BR"].sum()),
                num_learned(batch) if has_texts else 0,
                num_tokens(batch) if has_texts else 0,
            ]
            for batch in batches
        ]
        own = torch.tensor(counts, dtype=torch.float64, device=self.args.device).sum(dim=0)
        values, learned, seen = self._all_sum(own).tolist()
        if has_texts and not learned:
            raise UserError("ptx_rows: the texts of a step have no token to learn.")
        self._step.tokens += seen  # the policy's routers see them, so a balance loss counts them
        self._weights = replace(
            self._weights,
            value=self._step.units / values if has_values else 1.0,
            text=self._step.units / learned if has_texts else 0.0,
        )

    # The update phase.

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return int(policy_mean(self.ppo).count(batch["mask_BR"]))

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        weights = self._weights
        only_head = {} if weights.policy_learns else {"trunk_learns_values": False}
        mask, old_BSLK = batch["attention_mask"], batch.get("expert_BSLK")
        forced = None if self.ppo.replay == "none" else old_BSLK
        watch = Watch(keep_stats=False, replays=None if forced is None else self.policy)
        with (
            watched(self.policy if self.routed else None, watch) as seen,
            replayed(self.policy, forced, mask),
        ):
            logits, value_BR = model(
                batch["input_ids"], mask, batch["mask_BR"].shape[1], **only_head
            )
        output = episode_loss(logits, value_BR, batch=batch, ppo=self.ppo, weights=weights)
        self._check_first_ratio(output)
        flips = flip_metrics("new", seen.choice_BSLK, old_BSLK, mask_BS=mask)
        flips |= flip_metrics("new_free", seen.free_BSLK, old_BSLK, mask_BS=mask)
        output = replace(output, metrics={**output.metrics, **flips})
        if weights.text:  # 32
            text = text_loss(self.policy, batch)
            output = replace(
                output,
                loss_sum=output.loss_sum + self.ppo.ptx_coef * weights.text * text.loss_sum,
                metrics={**output.metrics, **text.metrics},
            )
        self._output = output
        return output

    def _check_first_ratio(self, policy: LossOutput) -> None:
        update, epoch, minibatch = self.place(self.state.global_step)
        if epoch or minibatch or self.is_noisy:
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
        for name, (finish, quantities) in _PIECES.items():
            pieces = [piece for q in quantities for piece in (q, f"{q}_squared")]
            if not set(pieces) <= set(metrics):
                continue
            sums = {piece: metrics.pop(piece) for piece in pieces}
            found = finish(
                {
                    piece: (torch.tensor(mean * count), torch.tensor(count))
                    for piece, (mean, count) in sums.items()
                }
            )
            if found is not None:
                metrics[name] = found
        return metrics

    def own_settings(self) -> dict[str, Any]:
        separate = "separate" if self.ppo.has_critic else "none"
        return {
            "ppo": asdict(self.ppo),
            "critic": "shared" if self.model.is_shared else separate,
            **self.routing_flag,
        }

    def _check_same_settings(self, checkpoint: Checkpoint) -> None:
        """A checkpoint from before an option of PPO existed was trained with its default."""
        held: Any = checkpoint.documents["settings"]
        built_in = {f.name: f.default for f in fields(PPOSettings) if f.default is not MISSING}
        documents = {**checkpoint.documents, "settings": {**held, "ppo": built_in | held["ppo"]}}
        super()._check_same_settings(replace(checkpoint, documents=documents))

    def frozen_models(self) -> Mapping[str, nn.Module]:
        judge = {"reward": self.reward.model} if isinstance(self.reward, ModelReward) else {}
        return {**beside_the_policy(self.reference), **judge}

    # What the loop does and keeps.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        update, epoch, minibatch = self.place(self.state.global_step)
        ends_step = self.accelerator.sync_gradients
        if self.brake.has_stopped(update):
            if ends_step:
                self._leave_step_out()
            return torch.zeros((), device=self.args.device)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.brake.is_on:
            assert self._output is not None
            self.brake.add(self._output.metrics)
        if ends_step:
            if not self._weights.policy_learns:
                _forget_gradients(self.policy)
                self.step_balance.forget_step()
            if self.brake.is_on:
                self._brake_at(update, epoch, minibatch)
        return loss

    def _brake_at(self, update: int, epoch: int, minibatch: int) -> None:
        if self.brake.judge_step(update, epoch, minibatch, device=self.args.device):
            self._count_step(skipped=False)
        else:
            self._leave_step_out()

    def _leave_step_out(self) -> None:
        """Without gradients the step that the loop is about to make changes nothing."""
        _forget_gradients(self.model)
        self.step_balance.forget_step()
        self.optimizer_steps -= 1  # the loop will count it
        self.brake.skipped_steps += 1
        self._count_step(skipped=True)

    def _count_step(self, *, skipped: bool) -> None:
        one = float(self.is_world_process_zero())  # of all processes' sums, one counts the step
        found = (torch.tensor(one * skipped), torch.tensor(one))
        zero = torch.zeros(())
        self._sums.add(
            LossOutput(loss_sum=zero, count=zero, metrics={"policy/skipped_steps": found})
        )

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
        document = {**self.rollouts.state_dict(), "brake": self.brake.state_dict()}
        return self.buffer.tensors(), document

    def load_extra_state(self, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        self.buffer = RolloutBuffer(**{k: v.to(self.args.device) for k, v in tensors.items()})
        self.rollouts.load_state_dict(document)
        self.brake.load_state_dict(document["brake"])
        self._skipped_before = self.brake.skipped_steps


def _check_sizes(settings: TrainSettings, ppo: PPOSettings) -> None:
    if settings.max_steps != ppo.steps or settings.batch_size != ppo.minibatch_size:
        raise UserError(
            f"max_steps {settings.max_steps} and batch_size {settings.batch_size} must be "
            f"{ppo.steps} (updates x epochs x minibatches) and {ppo.minibatch_size} (episodes "
            "/ minibatches)."
        )


def _forget_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
