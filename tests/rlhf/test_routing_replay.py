"""Router replay in PPO and its kin, a sampler of other numerics, and what weighs the difference."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.record import record_routing, replay_routing
from moe.switch_ffn import Router
from rlhf.kl import FixedKL
from rlhf.logprobs import token_logps
from rlhf.losses.ppo import policy_loss
from rlhf.mismatch import correction_weights, gap_metrics
from rlhf.ppo import PPOSettings, PPOTrainer, RolloutBuffer
from rlhf.ppo_objective import Weights, episode_loss
from rlhf.reference import FrozenCopy
from rlhf.rollout_numerics import noisy_routers, sampling_numerics, standing_in
from rlhf.routing_replay import NO_PASS, choice_table, free_choices, replayed
from rlhf.routing_watch import Watch, choices, watched
from sft.checkpoint import MANIFEST
from sft.loss import LossOutput
from sft.settings import TrainSettings

SIZE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NOISE: dict[str, Any] = {"rollout_numerics": "router_noise", "rollout_noise": 0.5}


def ours(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZE, "moe_intermediate_size": 8, "num_experts": 4, "initializer_range": 0.2}
    return MoEForCausalLM(MoEConfig(**{**sizes, **changes})).eval()


def biased(seed: int = 0) -> Any:
    """A router whose choice is not that of its largest logits."""
    model = ours(seed, scoring_func="sigmoid", router_selection_bias=True)
    for module in model.modules():
        if isinstance(module, Router):
            module.e_score_correction_bias.copy_(torch.tensor([0.4, 0.0, -0.4, 0.1]))
    return model


def mixtral(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = MixtralConfig(**SIZE, num_local_experts=4, initializer_range=0.2)
    return MixtralForCausalLM(config).eval()


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()


def some_reward(input_ids_BS: Any, attention_mask_BS: Any) -> Any:
    return torch.where(attention_mask_BS.bool(), 1.0 - input_ids_BS / 16, 0.0).sum(dim=1)


def build(folder: Path, policy: Any = None, *, changes: Any = None, **ppo: Any) -> PPOTrainer:
    """Without a critic, unless an advantage is given."""
    policy = ours() if policy is None else policy
    sizes = {
        "updates": 1, "episodes": 6, "epochs": 2, "max_new_tokens": 5, "advantage": "reinforce_pp"
    }  # fmt: skip
    rules = PPOSettings(**{**sizes, **ppo})
    optimisation = {"lr": 3e-2, "lr_schedule": "constant", "log_steps": 1, **(changes or {})}
    frozen = bool(optimisation.pop("freeze_router", False))
    return PPOTrainer(
        policy,
        TrainSettings(max_steps=rules.steps, batch_size=rules.minibatch_size, **optimisation),
        critic=None,
        reference=FrozenCopy(ours(7)),
        reward=some_reward,
        rows=[{"prompt_ids": list(range(3, 5 + i))} for i in range(5)],
        ppo=rules,
        kl_controller=FixedKL(0.1),
        pad_id=0,
        stop_ids=(2, 5, 7),
        folder=folder,
        freeze_router=frozen,
    )


def collected(trainer: PPOTrainer) -> tuple[RolloutBuffer, dict[str, float], LossOutput]:
    """The first update's buffer and its metrics as means."""
    device = torch.device("cpu")
    buffer, found = trainer.rollouts.collect(0, plan=trainer.plan, device=device)
    means = {name: float(a) / float(n) for name, (a, n) in found.metrics.items() if float(n)}
    return buffer, means, found


def moved(model: Any) -> Any:
    """The model with other routers, so that free choices differ."""
    with torch.no_grad(), standing_in(model, noisy_routers(model, 2.0, seed=1, update=0)):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    return model


# --- the pieces


@pytest.mark.parametrize("make", [ours, biased, mixtral])
def test_a_batch_with_padding_on_both_sides_takes_its_experts_and_leaves_the_rest_free(
    make: Any,
) -> None:
    ids = torch.tensor([[0, 3, 4, 9, 8], [5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    call: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    model = make()
    with record_routing(model) as trace, torch.no_grad():
        model(**call)
    old = choices(trace.forwards[0])
    model = moved(model)
    with record_routing(model) as free, torch.no_grad():
        model(**call)
    assert not torch.equal(choices(free.forwards[0])[mask.bool()], old[mask.bool()])
    tail = torch.tensor([4, 2, 4])  # the last real token of each row, as a sampler leaves it
    forced = old.clone()
    forced[range(3), tail] = NO_PASS
    watch = Watch(replays=model)
    with watched(model, watch), replayed(model, forced, mask, free_tail=1), torch.no_grad():
        model(**call)
    found, left = watch.choice_BSLK, watch.free_BSLK
    assert found is not None and left is not None
    kept = mask.bool().clone()
    kept[range(3), tail] = False
    assert torch.equal(found[kept], old[kept])
    # The first layer reads the same as without a replay, so that it would choose the same.
    assert torch.equal(left[..., 0, :][mask.bool()], choices(free.forwards[0])[..., 0, :][mask > 0])
    assert torch.equal(found[range(3), tail][:, 0], left[range(3), tail][:, 0])
    with pytest.raises(UserError, match="recorded tokens, this pass has more"):
        with replayed(model, forced, mask):
            model(**call)


def test_the_table_of_a_batch_by_hand() -> None:
    expert = torch.tensor([[[[9]], [[1]], [[0]]], [[[2]], [[3]], [[-1]]]], dtype=torch.int16)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])  # row 0: padding, then tokens 0 and 1
    table = choice_table(expert, mask, num_experts=4)
    assert table.sample_N.tolist() == [0, 1] and table.length_N.tolist() == [2, 2]
    assert table.expert_TLK.flatten().tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("make", [ours, biased, mixtral])
def test_free_choices_of_a_pass_that_did_not_replay_are_its_own(make: Any) -> None:
    model = make()
    with record_routing(model) as trace, torch.no_grad():
        model(input_ids=torch.arange(3, 27).view(2, 12))
    (forward,) = trace.forwards
    assert torch.equal(free_choices(model, forward), choices(forward))


@pytest.mark.parametrize("make", [ours, mixtral])
def test_a_replayed_pass_gives_routers_the_gradient_of_its_weights(make: Any) -> None:
    """Against differences of the loss itself, which is smooth while the choice stands."""
    model = make()
    ids = torch.arange(3, 19).view(2, 8)
    with record_routing(model) as trace, torch.no_grad():
        model(input_ids=ids)
    forced = choices(trace.forwards[0])
    model = moved(model)
    routers = [p for name, p in model.named_parameters() if "gate" in name and "proj" not in name]
    assert len(routers) == 2
    torch.manual_seed(1)
    directions = [torch.randn_like(p) for p in routers]

    def loss(step: float) -> Tensor:
        stand = {p: p + step * d for p, d in zip(routers, directions, strict=True)}
        with standing_in(model, {p: x.detach() for p, x in stand.items()} if step else {}):
            with replayed(model, forced, torch.ones_like(ids)):
                return model(input_ids=ids, labels=ids).loss

    loss(0.0).backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(routers, directions, strict=True))
    with torch.no_grad():
        difference = float(loss(1e-2) - loss(-1e-2)) / 2e-2
    assert abs(slope) > 1e-4 and slope == pytest.approx(difference, rel=2e-2, abs=1e-5)


# --- in a training


@pytest.mark.parametrize("replay", ["old_policy", "rollout"])
@pytest.mark.parametrize("make", [ours, mixtral])
def test_replayed_choices_do_not_move_while_the_free_ones_do(
    make: Any, replay: Any, tmp_path: Path
) -> None:
    trainer = build(tmp_path, make(), replay=replay, changes={"micro_batch_size": 3})
    trainer.fit()
    first, second = trainer.state.log_history
    for row in (first, second):
        assert row["router/flip_rate_new"] == row["router/flip_rate_new/layer_01"] == 0.0
    assert first["router/free_flip_rate_new"] < 0.05  # rounding may decide a tie
    assert second["router/free_flip_rate_new"] > 0.0
    assert ("router/free_flip_rate_rollout" in first) == (replay == "rollout")
    assert first["policy/ratio_max_deviation"] < 1e-5


@pytest.mark.parametrize(
    "method",
    [
        {"advantage": "gae"},
        {"advantage": "grpo", "group_size": 2, "ratio_level": "sequence"},
        {"advantage": "rloo", "group_size": 2},
    ],
    ids=lambda m: m["advantage"],
)
def test_every_method_replays(method: dict[str, Any], tmp_path: Path) -> None:
    trainer = build(tmp_path, replay="rollout", **method, **NOISE)  # gae: a shared trunk
    trainer.fit()
    first, second = trainer.state.log_history
    assert first["router/flip_rate_rollout"] == second["router/flip_rate_new"] == 0.0
    assert first["router/free_flip_rate_rollout"] > 0.0


@pytest.mark.parametrize("make", [ours, mixtral])
def test_under_r3_the_old_pass_takes_the_samplers_experts_and_its_numerics_stay_the_trainers(
    make: Any, tmp_path: Path
) -> None:
    policy = make()
    free, told_free, _ = collected(build(tmp_path / "free", policy, **NOISE))
    held, told_held, _ = collected(build(tmp_path / "r3", policy, replay="rollout", **NOISE))
    assert torch.equal(free.response_BR, held.response_BR)  # nothing of what is drawn
    assert torch.equal(free.ref_logp_BR, held.ref_logp_BR)  # the reference chooses for itself
    assert told_free["router/flip_rate_rollout"] > 0.0 == told_held["router/flip_rate_rollout"]
    assert told_held["rollout/logp_gap"] > 1e-4
    assert held.expert_BSLK is not None and int(held.expert_BSLK.min()) >= 0
    assert not torch.equal(held.expert_BSLK, free.expert_BSLK)
    for row in range(3):  # row by row, alone, by the general replay
        kept = held.attention_mask_BS[row].bool()
        text = torch.cat([held.prompt_BP[row], held.response_BR[row]])[kept][None]
        forced = held.expert_BSLK[row][kept][None]
        table = choice_table(forced, torch.ones_like(text), num_experts=4)
        with replay_routing(policy, table), torch.no_grad():
            logits = policy(input_ids=text).logits
        count = int(held.mask_BR[row].sum())
        expected = token_logps(logits, text, temperature=1.0)[0, -count:]
        assert torch.allclose(held.old_logp_BR[row, :count], expected, atol=1e-5)


def test_splitting_a_minibatch_changes_nothing_under_replay(tmp_path: Path) -> None:
    policies = []
    for micro in (0, 2):
        changes = {"micro_batch_size": micro, "adam_eps": 1e-2, "lr": 1e-2}
        policies.append(ours())
        build(tmp_path / str(micro), policies[-1], replay="rollout", changes=changes, **NOISE).fit()
    for one, other in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_replayed_training_is_resumed_to_the_byte(tmp_path: Path) -> None:
    """Steps 1 and 3 lie within a buffer, whose experts and weights the checkpoint has to hold."""

    def make(folder: Path, seed: int) -> PPOTrainer:
        changes = {
            "save_steps": 1, "keep_checkpoints": 9, "micro_batch_size": 3, "freeze_router": True,
        }  # fmt: skip
        return build(
            folder, ours(seed), changes=changes, updates=2, replay="rollout",
            mismatch_correction="token", **NOISE,
        )  # fmt: skip

    make(tmp_path / "whole", 0).fit()
    last = (tmp_path / "whole" / "checkpoint-4" / MANIFEST).read_text(encoding="utf-8")
    for step in (1, 3):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        make(folder, 77).fit(resume=True)
        found = (folder / "checkpoint-4" / MANIFEST).read_text(encoding="utf-8")
        assert json.loads(found)["files"] == json.loads(last)["files"]


# --- a sampler of other numerics


@pytest.mark.parametrize("make", [ours, mixtral])
def test_a_sampler_with_other_numerics_is_told_by_gap_and_flips_and_its_own_is_not(
    make: Any, tmp_path: Path
) -> None:
    policy = make()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    told = {}
    for name, options in {
        "same": {}, "bf16": {"rollout_numerics": "bf16"}, "noise": NOISE,
    }.items():  # fmt: skip
        _, told[name], _ = collected(build(tmp_path / name, policy, **options))
    assert told["same"]["rollout/logp_gap"] <= 1e-5 and told["same"]["rollout/logp_gap_k3"] <= 1e-9
    assert told["bf16"]["rollout/logp_gap"] > 1e-4 and told["bf16"]["rollout/logp_gap_k3"] > 0.0
    assert told["noise"]["rollout/logp_gap"] > 1e-3
    assert told["noise"]["router/flip_rate_rollout"] > 0.0
    after = policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_noise_is_a_tokens_own_whatever_is_drawn_beside_it(tmp_path: Path) -> None:
    whole, _, _ = collected(build(tmp_path / "whole", **NOISE))
    parts, _, _ = collected(build(tmp_path / "parts", changes={"micro_batch_size": 2}, **NOISE))
    plain, _, _ = collected(build(tmp_path / "plain"))
    assert torch.equal(whole.response_BR, parts.response_BR)
    assert not torch.equal(whole.response_BR, plain.response_BR)


def test_noise_on_a_logit_has_the_size_asked_for_and_is_new_each_update() -> None:
    model = ours(hidden_size=64, num_experts=64)
    router = next(m for m in model.modules() if isinstance(m, Router))
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    ppo = PPOSettings(updates=1, episodes=1, **NOISE)
    with torch.no_grad():
        clean, noisy = router(x), []
        for update in (0, 1, 0):
            with sampling_numerics(model, ppo, seed=3, update=update):
                noisy.append(router(x) - clean)
        assert torch.equal(router(x), clean)
    assert float(noisy[0].std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(noisy[0], noisy[2]) and not torch.equal(noisy[0], noisy[1])


def test_other_weights_stand_in_wherever_a_tied_one_stands_and_leave_after_an_error() -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(
        MoEConfig(**SIZE, moe_intermediate_size=8, num_experts=4, tie_word_embeddings=True)
    )
    own = model.get_input_embeddings().weight
    with pytest.raises(RuntimeError, match="inside"):
        with standing_in(model, {own: torch.zeros_like(own)}):
            stood = model.get_input_embeddings().weight
            assert stood is model.get_output_embeddings().weight and not stood.any()
            raise RuntimeError("inside")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is own


# --- what the difference weighs


def test_weights_of_the_two_corrections_by_hand() -> None:
    old = torch.tensor([[3.0, 0.5, 9.0], [2.0, 2.0, 1.0]]).log()  # over a sampler's 1
    drawn, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    token = correction_weights(old, drawn, mask, kind="token", cap=2.5)
    assert torch.allclose(token, torch.tensor([[2.5, 0.5, 0.0], [2.0, 2.0, 1.0]]))
    answer = correction_weights(old, drawn, mask, kind="sequence", cap=2.5)
    assert torch.allclose(answer, torch.tensor([[1.5, 1.5, 0.0], [0.0, 0.0, 0.0]]))


def test_the_gap_by_hand() -> None:
    old = torch.tensor([[-1.0, -2.0, 5.0]])
    drawn = torch.tensor([[-1.5, -1.0, 0.0]])
    found = gap_metrics(old, drawn, torch.tensor([[1, 1, 0]]))
    assert [float(x) for x in found["rollout/logp_gap"]] == pytest.approx([1.5, 2])
    # d = sampler - trainer; exp(-d) - 1 + d
    k3 = (torch.tensor([0.5, -1.0]).exp() - 1 + torch.tensor([-0.5, 1.0])).sum()
    assert [float(x) for x in found["rollout/logp_gap_k3"]] == pytest.approx([float(k3), 2])


def test_a_weight_multiplies_each_tokens_clipped_loss_and_nothing_else() -> None:
    torch.manual_seed(0)
    batch_size, length, vocab = 4, 3, 8
    logits = torch.randn(batch_size, length + 1, vocab)
    batch = {
        "input_ids": torch.randint(0, vocab, (batch_size, length + 2)),
        "mask_BR": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool(),
        "old_logp_BR": -2.0 + torch.randn(batch_size, length),
        "ref_logp_BR": -2.0 + torch.randn(batch_size, length),
        "advantage_BR": torch.randn(batch_size, length),
    }
    weight = torch.rand(batch_size, length) * 2
    rules: dict[str, Any] = {"advantage": "reinforce_pp", "dual_clip": 1.5, "kl_in": "loss"}
    ppo = PPOSettings(updates=1, episodes=4, entropy_coef=0.3, **rules)

    def total(**more: Tensor) -> float:
        weights = Weights(kl_coef=0.2)
        loss = episode_loss(logits, None, batch={**batch, **more}, ppo=ppo, weights=weights)
        return float(loss.loss_sum)

    ids = batch["input_ids"][:, -length - 1 :]
    logp = token_logps(logits, ids, temperature=1.0)
    logp = logp[:, -length:]

    def one(row: int, column: int) -> float:
        """The clipped loss of one token alone."""
        mask = torch.zeros_like(batch["mask_BR"])
        mask[row, column] = batch["mask_BR"][row, column]
        loss = policy_loss(
            logp, batch["old_logp_BR"], advantage_BR=batch["advantage_BR"], mask_BR=mask,
            clip_low=0.2, clip_high=0.2, dual_clip=1.5,
        )  # fmt: skip
        return float(loss.loss_sum)

    places = [(row, column) for row in range(batch_size) for column in range(length)]
    added = sum((float(weight[at]) - 1.0) * one(*at) for at in places)
    assert total(correction_BR=weight) - total() == pytest.approx(added, abs=1e-5)
    assert total(correction_BR=torch.ones_like(weight)) == total()


def test_the_weights_are_in_the_buffer_and_their_mean_is_logged(tmp_path: Path) -> None:
    options = {**NOISE, "mismatch_correction": "sequence", "mismatch_cap": 1.05}
    buffer, told, found = collected(build(tmp_path, **options))
    weight = buffer.correction_BR
    assert weight is not None and not weight[~buffer.mask_BR].any()
    assert told["rollout/correction"] == pytest.approx(float(weight[buffer.mask_BR].mean()))
    assert 0.0 < float(weight.max()) <= 1.05
    assert "correction_BR" in buffer.rows([0, 1]) and found.maxima["rollout/logp_mismatch"] > 0
    assert replace(buffer, correction_BR=None).rows([0]).keys() == buffer.rows([0]).keys() - {
        "correction_BR"
    }


# --- what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replay": "old_policy", "epochs": 1}, "replay old_policy has no effect with one step"),
        ({"rollout_noise": 0.1}, "rollout_numerics same and rollout_noise 0.1: router_noise and"),
        ({"rollout_numerics": "router_noise"}, "a size above 0 go together, give both or neither"),
        ({"rollout_noise": -1.0}, "rollout_noise is -1.0: give a number of 0 or more"),
        ({"mismatch_correction": "token"}, "mismatch_correction token has no effect with"),
        ({"mismatch_cap": 3.0}, "mismatch_cap 3.0 has no effect without mismatch_correction"),
        ({"mismatch_cap": 0.5}, "mismatch_cap 0.5 must be at least 1 and finite"),
    ],
)
def test_settings_that_cannot_be_or_change_nothing_are_one_sentence(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        PPOSettings(**{"updates": 1, "episodes": 4, **options})


def test_replay_and_noise_are_refused_where_no_router_chooses(tmp_path: Path) -> None:
    hashed = ours(router_kind="hash", load_balancing_coef=0.0)
    for options, name in (({"replay": "rollout"}, "replay rollout"), (NOISE, "router_noise")):
        with pytest.raises(UserError, match=f"{name} has no effect: LlamaForCausalLM has no rout"):
            build(tmp_path, llama(), **options)
        with pytest.raises(UserError, match=f"{name} has no effect: a router of kind 'hash'"):
            build(tmp_path, hashed, **options)


def test_by_default_nothing_is_replayed_corrected_or_added_to_the_buffer(tmp_path: Path) -> None:
    buffer, told, _ = collected(build(tmp_path))
    assert buffer.correction_BR is None and "rollout/correction" not in told
    assert not any("free_flip_rate" in name for name in told)
