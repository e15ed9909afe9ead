"""The first half of a PPO update: draw completions, score them, measure them, make advantages.

The decision to know: old log-probabilities are the trainer's own, computed in the micro-batches of
the first epoch, so that its first minibatch repeats the same computation: there the ratio is 1
unless something is wrong (27). How far the sampler's are from them is logged, and may weigh the
loss (`rlhf.mismatch`).

Shapes: B episodes of an update, P prompt, R response, S = P + R, L MoE layers, K experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf import kl
from rlhf.actor_critic import Actor, ActorCritic, response_logits
from rlhf.episodes import Drawn, Plan, RolloutBuffer, draw, rows_in_order
from rlhf.group_advantage import group_deviation
from rlhf.kl import KLController
from rlhf.losses import metric
from rlhf.mismatch import correction_weights, gap_metrics
from rlhf.ppo_objective import batch_logps
from rlhf.ppo_settings import PPOSettings
from rlhf.reference import Reference
from rlhf.repetition import distinct_share
from rlhf.reward import ModelReward, RewardSource
from rlhf.routing_replay import replayed
from rlhf.routing_watch import Metrics, Watch, flip_metrics, usage_metrics, watched
from rlhf.shaping import RunningScale, Shaped, shape, value_mask
from sft.loss import LossOutput
from sft.text import pad_batch


@dataclass(kw_only=True)
class _Passes:
    """What the models say of an update's episodes, (B, R) each and zero where masked.

    value_BR: zero without a critic.
    expert_BSLK: of the old-policy pass. critic, reference: what those models routed.
    """

    old_logp_BR: Tensor
    ref_logp_BR: Tensor
    value_BR: Tensor
    expert_BSLK: Tensor | None = None
    critic: Watch = field(default_factory=Watch)
    reference: Watch = field(default_factory=Watch)
    flips: list[Metrics] = field(default_factory=list)


class RolloutPhase:
    """Makes the buffer of an update. Its state: the price of the KL, the scale of scores, a count.

    all_sum: the sum over all processes. loss_kl_coef: price of a nat in this update's loss, 0 where
    the reward pays.
    """

    def __init__(
        self,
        model: Actor | ActorCritic,
        reference: Reference,
        *,
        reward: RewardSource,
        prompts: Sequence[Mapping[str, Any]],
        kl_controller: KLController,
        pad_id: int,
        stop_ids: Sequence[int],
        all_sum: Callable[[Tensor], Tensor],
        running_scale: bool,
    ) -> None:
        self.model = model
        self.reference = reference
        self.reward = reward
        self.prompts = prompts
        self.kl_controller = kl_controller
        self.pad_id = pad_id
        self.stop_ids = tuple(stop_ids)
        self.all_sum = all_sum
        self.score_scale = RunningScale() if running_scale else None
        self.loss_kl_coef = 0.0
        self.tokens_generated = 0

    @torch.no_grad()
    def collect(
        self, update: int, *, plan: Plan, device: torch.device
    ) -> tuple[RolloutBuffer, LossOutput]:
        """The buffer, and the update's diagnostics (sums of this process)."""
        prompt_BP, prompt_mask_BP = self._prompts_of(update, plan=plan, device=device)
        mine = plan.own_episodes
        drawn = draw(
            self.model.policy,
            prompt_BP[mine],
            prompt_mask_BP=prompt_mask_BP[mine],
            sample_ids=[update * plan.ppo.episodes + i for i in mine],
            update=update,
            plan=plan,
            stop_ids=self.stop_ids,
            pad_id=self.pad_id,
        )
        score_B, judged = self._scores(prompt_BP[mine], prompt_mask_BP[mine], drawn)
        mask_BR = self._gather_rows(drawn.mask_BR.long(), plan=plan).bool()
        zeros_BR = torch.zeros(mask_BR.shape, device=device)
        buffer = RolloutBuffer(
            prompt_BP=prompt_BP,
            prompt_mask_BP=prompt_mask_BP,
            response_BR=self._gather_rows(drawn.response_BR, plan=plan),
            mask_BR=mask_BR,
            old_logp_BR=zeros_BR,
            ref_logp_BR=zeros_BR,
            value_BR=zeros_BR,
            advantage_BR=zeros_BR,
            return_BR=zeros_BR,
            score_B=self._gather_rows(score_B.to(device), plan=plan),
            value_mask_BR=None if plan.ppo.compat == "none" else value_mask(mask_BR, plan.ppo),
            expert_BSLK=self._to_replay(drawn, plan=plan),
        )
        self.tokens_generated += int(mask_BR.sum())
        passes = self._evaluate(update, buffer, plan=plan)
        routed = self._routing_metrics(passes, judged, buffer=buffer, drawn=drawn, plan=plan)
        ended_B = self._gather_rows(drawn.ended_B.long(), plan=plan).bool()
        drawn_logp_BR = self._gather_rows(drawn.logp_BR, plan=plan)
        buffer, found = self._shaped(update, buffer, passes=passes, ended_B=ended_B, plan=plan)
        mismatch_BR = (buffer.old_logp_BR - drawn_logp_BR).abs()
        mismatch = torch.where(mask_BR, mismatch_BR, 0.0).max()
        buffer, apart = self._corrected(buffer, drawn_logp_BR, plan=plan)
        return buffer, replace(
            found,
            metrics={**found.metrics, **routed, **apart},
            maxima={"rollout/logp_mismatch": mismatch},
        )

    def _to_replay(self, drawn: Drawn, *, plan: Plan) -> Tensor | None:
        """The sampler's experts of all episodes, if the old-policy pass replays them (R3)."""
        if plan.ppo.replay != "rollout":
            return None
        assert drawn.choice_BSLK is not None
        return self._gather_rows(drawn.choice_BSLK.int(), plan=plan).to(torch.int16)

    def _corrected(
        self, buffer: RolloutBuffer, drawn_logp_BR: Tensor, *, plan: Plan
    ) -> tuple[RolloutBuffer, Metrics]:
        """The buffer with its weights, if asked for, and how far sampler and trainer are apart."""
        ppo, mine, mask_BR = plan.ppo, plan.own_episodes, buffer.mask_BR
        metrics = gap_metrics(buffer.old_logp_BR[mine], drawn_logp_BR[mine], mask_BR[mine])
        if ppo.mismatch_correction == "none":
            return buffer, metrics
        weight_BR = correction_weights(
            buffer.old_logp_BR,
            drawn_logp_BR,
            mask_BR,
            kind=ppo.mismatch_correction,
            cap=ppo.mismatch_cap,
        )
        metrics["rollout/correction"] = metric(weight_BR[mine], mask_BR[mine])
        return replace(buffer, correction_BR=weight_BR), metrics

    def _prompts_of(
        self, update: int, *, plan: Plan, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Left-padded prompts and their mask, (B, P), of all processes."""
        count = plan.ppo.num_prompts
        chosen = rows_in_order(
            plan.seed, "order", first=update * count, count=count, num_rows=len(self.prompts)
        )
        size = plan.ppo.group_size  # the answers to a prompt follow one another
        ids = [self.prompts[i]["prompt_ids"] for i in chosen for _ in range(size)]
        prompt_BP, prompt_mask_BP = pad_batch(ids, pad_id=self.pad_id, side="left")
        return prompt_BP.to(device), prompt_mask_BP.to(device)

    def _scores(
        self, prompt_BP: Tensor, prompt_mask_BP: Tensor, drawn: Drawn
    ) -> tuple[Tensor, Watch]:
        """score_B float32, and what a reward model routed."""
        ids = torch.cat([prompt_BP, drawn.response_BR], dim=1)
        mask = torch.cat([prompt_mask_BP, drawn.mask_BR], dim=1)
        judge = self.reward.model if isinstance(self.reward, ModelReward) else None
        with watched(judge, Watch()) as seen:
            return self.reward(ids, mask).float(), seen

    def _gather_rows(self, mine: Tensor, *, plan: Plan) -> Tensor:
        """Rows of every process in their global places."""
        whole = mine.new_zeros(plan.ppo.episodes, *mine.shape[1:])
        whole[plan.own_episodes] = mine
        return self.all_sum(whole)

    def _evaluate(self, update: int, buffer: RolloutBuffer, *, plan: Plan) -> _Passes:
        """Old and reference log-probabilities, values, and what was routed on the way."""
        zeros = torch.zeros_like(buffer.value_BR)
        held = _Passes(old_logp_BR=zeros, ref_logp_BR=zeros.clone(), value_BR=zeros.clone())
        self.model.eval()
        for minibatch in range(plan.ppo.minibatches):
            for rows in plan.micro_batches(update, 0, minibatch):
                self._evaluate_rows(rows, held, buffer=buffer, ppo=plan.ppo)
        self.model.train()
        held.old_logp_BR = self.all_sum(held.old_logp_BR)
        held.ref_logp_BR = self.all_sum(held.ref_logp_BR)
        if plan.ppo.has_critic:
            held.value_BR = self.all_sum(held.value_BR)
        if held.expert_BSLK is not None:  # not every backend adds int16
            held.expert_BSLK = self.all_sum(held.expert_BSLK.int()).to(torch.int16)
        return held

    def _evaluate_rows(
        self, rows: list[int], held: _Passes, *, buffer: RolloutBuffer, ppo: PPOSettings
    ) -> None:
        batch, policy = buffer.rows(rows), self.model.policy
        ids, mask, mask_BR = batch["input_ids"], batch["attention_mask"], batch["mask_BR"]
        length = mask_BR.shape[1]
        critic = None if self.model.is_shared else self.model.critic
        forced = batch.get("expert_BSLK")  # the rollout's, of all tokens but the last
        replays = None if forced is None else policy
        with (
            watched(policy, Watch(keep_stats=False, replays=replays)) as seen,
            watched(critic, held.critic),
            replayed(policy, forced, mask, free_tail=1),
        ):
            logits, value_BR = self.model(ids, mask, length)
        with self.reference.lend() as reference, watched(reference, held.reference):
            ref_logits = response_logits(reference, ids, mask, length)
        old_logp_BR = batch_logps(logits, batch, temperature=ppo.temperature)
        ref_logp_BR = batch_logps(ref_logits, batch, temperature=ppo.temperature)
        for whole, found, kept in (
            (held.old_logp_BR, old_logp_BR, mask_BR),
            (held.ref_logp_BR, ref_logp_BR, mask_BR),
            (held.value_BR, value_BR, batch["value_mask_BR"]),
        ):
            if found is None:
                continue
            whole[rows, :length] = torch.where(kept, found.to(whole.dtype), 0.0)
        chosen = seen.choice_BSLK
        if chosen is not None:
            if held.expert_BSLK is None:
                shape_BS = buffer.attention_mask_BS.shape
                held.expert_BSLK = chosen.new_zeros(*shape_BS, *chosen.shape[2:])
            held.expert_BSLK[rows, buffer.columns(rows)] = chosen
            held.flips.append(
                flip_metrics("reference", held.reference.choice_BSLK, chosen, mask_BS=mask)
            )
            held.flips.append(flip_metrics("rollout_free", seen.free_BSLK, forced, mask_BS=mask))

    def _routing_metrics(
        self, passes: _Passes, judged: Watch, *, buffer: RolloutBuffer, drawn: Drawn, plan: Plan
    ) -> Metrics:
        """MoE-2 and MoE-6 of the rollout phase."""
        metrics: Metrics = {}
        for flips in passes.flips:
            for name, (total, count) in flips.items():
                before = metrics.get(name, (0.0, 0))
                metrics[name] = (before[0] + total, before[1] + count)
        if passes.expert_BSLK is not None:
            mine = plan.own_episodes
            metrics |= flip_metrics(
                "rollout",
                drawn.choice_BSLK,
                passes.expert_BSLK[mine],
                mask_BS=buffer.attention_mask_BS[mine],
            )
        models = {"critic": passes.critic, "reference": passes.reference, "reward": judged}
        for name, seen in models.items():
            metrics |= usage_metrics(
                name, seen.stats, all_sum=self.all_sum, device=buffer.mask_BR.device
            )
        return metrics

    def _shaped(
        self, update: int, buffer: RolloutBuffer, *, passes: _Passes, ended_B: Tensor, plan: Plan
    ) -> tuple[RolloutBuffer, LossOutput]:
        """The finished buffer and its diagnostics; moves the price of the KL."""
        ppo = plan.ppo
        coef = self.kl_controller.coef
        in_loss = ppo.kl_in == "loss"
        self.loss_kl_coef = coef if in_loss else 0.0
        shaped = shape(
            buffer.score_B,
            ended_B,
            old_logp_BR=passes.old_logp_BR,
            ref_logp_BR=passes.ref_logp_BR,
            value_BR=passes.value_BR,
            mask_BR=buffer.mask_BR,
            ppo=ppo,
            kl_coef=0.0 if in_loss else coef,
            scale=self.score_scale,
        )
        k1_BR = kl.k1(passes.old_logp_BR, passes.ref_logp_BR)
        kl_B = torch.where(buffer.mask_BR, k1_BR, 0.0).sum(dim=1)
        found = self._diagnostics(buffer, shaped, kl_B=kl_B, ended_B=ended_B, coef=coef, plan=plan)
        if update >= ppo.critic_warmup:  # a policy that stands still says nothing of its price
            self.kl_controller.update(float(kl_B.mean()), ppo.episodes)  # 17
        finished = replace(
            buffer,
            old_logp_BR=passes.old_logp_BR,
            ref_logp_BR=passes.ref_logp_BR,
            value_BR=passes.value_BR,
            advantage_BR=shaped.advantage_BR,
            return_BR=shaped.return_BR,
            expert_BSLK=passes.expert_BSLK,
        )
        return finished, found

    def _diagnostics(
        self,
        buffer: RolloutBuffer,
        shaped: Shaped,
        *,
        kl_B: Tensor,
        ended_B: Tensor,
        coef: float,
        plan: Plan,
    ) -> LossOutput:
        """30. Every process holds all episodes, and sums are added over processes: `mine` count."""
        mine = plan.own_episodes
        mask_BR, score_B = buffer.mask_BR, shaped.score_B
        shaped_B = torch.where(shaped.value_mask_BR, shaped.reward_BR, 0.0).sum(dim=1)
        distinct_B = distinct_share(buffer.response_BR, mask_BR).expand(len(kl_B))
        metrics = {
            "reward/score": metric(buffer.score_B[mine]),
            "reward/shaped": metric(shaped_B[mine]),
            "reward/non_score": metric((shaped_B - score_B)[mine]),
            "policy/kl_sequence": metric(kl_B[mine]),
            "policy/kl_coef": metric(torch.full_like(kl_B, coef)[mine]),
            "rollout/length": metric(mask_BR.sum(dim=1).float()[mine]),
            "rollout/ended": metric(ended_B.float()[mine]),
            "rollout/distinct_2": metric(distinct_B[mine]),
        }
        if self.score_scale is not None:
            deviation_B = torch.full_like(score_B, self.score_scale.deviation)
            metrics["reward/score_deviation"] = metric(deviation_B[mine])
        if plan.ppo.group_size > 1:
            deviation_B, equal_B = group_deviation(score_B, group_size=plan.ppo.group_size)
            metrics["reward/group_deviation"] = metric(deviation_B[mine])
            metrics["reward/equal_groups"] = metric(equal_B.float()[mine])
        return LossOutput(
            loss_sum=score_B[mine].sum(),
            count=mask_BR[mine].any(dim=1).sum(),
            metrics=metrics,
        )

    def state_dict(self) -> dict[str, Any]:
        scale = self.score_scale
        return {
            "kl": self.kl_controller.state_dict(),
            "loss_kl_coef": self.loss_kl_coef,
            "score_scale": None if scale is None else scale.state_dict(),
            "tokens_generated": self.tokens_generated,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_controller.load_state_dict(state["kl"])
        self.loss_kl_coef = state["loss_kl_coef"]
        if self.score_scale is not None and state["score_scale"] is not None:
            self.score_scale.load_state_dict(state["score_scale"])
        self.tokens_generated = state["tokens_generated"]
