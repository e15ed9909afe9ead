"""A PPO update beside that of TRL 1.12.0, the last TRL that had a PPOTrainer.

vectors/trl_1_12_ppo.json holds what TRL made of eight prompts: the tokens that it drew and every
number from there to the stepped weights (vectors/README.md says how). Here our trainer is given the
same weights and those tokens. The sampler is the one neighbour that is replaced; all else runs.

Numbers of TRL's run were float64, and so are the models here; buffers of ours are float32.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    MixtralForTokenClassification,
)

import rlhf.rollout_phase
from rlhf.actor_critic import ActorCritic
from rlhf.episodes import Drawn, RolloutBuffer
from rlhf.kl import FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.ppo_objective import Weights, episode_loss
from rlhf.reference import FrozenCopy
from rlhf.reward import ModelReward
from rlhf.shaping import Shaped, shape
from sft.loss import LossOutput
from sft.settings import TrainSettings

STORED = json.loads(
    (Path(__file__).parent / "vectors" / "trl_1_12_ppo.json").read_text(encoding="utf-8")
)
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in STORED["cases"]}
SAME = [name for name in CASES if name != "llama_two_micro_batches"]
TOLERANCE = 1e-5
PAD, EOS, VOCABULARY = 0, 1, 24
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    "attn_implementation": "sdpa",
    "experts_implementation": "eager",  # the grouped one has no float64
    "tie_word_embeddings": False,
}
MIXTRAL: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.0,
    "sliding_window": None,
}


def config_of(kind: str) -> LlamaConfig | MixtralConfig:
    return MixtralConfig(**SIZE, **MIXTRAL) if kind == "mixtral" else LlamaConfig(**SIZE)


def uniform(seed: int) -> Iterator[float]:
    """Numbers in -1..1 of a linear congruential generator, the same on every machine."""
    state = seed
    while True:
        state = (1664525 * state + 1013904223) % 2**32
        yield (state >> 8) / 2**23 - 1.0


@torch.no_grad()
def filled(model: nn.Module, seed: int) -> Any:
    """Weights by name in a fixed order. PAD is never drawn, EOS about every sixth time."""
    numbers = uniform(seed)
    for name, parameter in sorted(model.named_parameters()):
        u = torch.tensor([next(numbers) for _ in range(parameter.numel())], dtype=torch.float64)
        weight = u.view(parameter.shape)
        if "norm" in name:
            weight = 1.0 + 0.1 * weight
        else:
            weight = 0.0 * weight if name.endswith("score.bias") else 0.4 * weight
        if name.endswith("embed_tokens.weight"):
            weight[:, 0] = 2.0
        if name.endswith("lm_head.weight"):
            weight[PAD, 0] = -8.0
            weight[EOS, 0] = 0.75
        parameter.copy_(weight.float())
    return model


def language_model(kind: str, seed: int) -> Any:
    family = MixtralForCausalLM if kind == "mixtral" else LlamaForCausalLM
    return filled(family(config_of(kind)), seed)


def scalar(kind: str, seed: int) -> Any:
    config = config_of(kind)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    mixed = kind == "mixtral"
    family = MixtralForTokenClassification if mixed else LlamaForTokenClassification
    return filled(family(config), seed).double()


def policy_of(kind: str) -> Any:
    return language_model(kind, 1).double()


@torch.no_grad()
def reference_of(kind: str) -> Any:
    """A quarter of the way from the policy to another model, in float32."""
    model, other = language_model(kind, 1), language_model(kind, 5)
    for own, theirs in zip(model.parameters(), other.parameters(), strict=True):
        own.copy_(own + 0.25 * (theirs - own))
    return model.double()


def reward_of(kind: str) -> ModelReward:
    return ModelReward(model=scalar(kind, 2))


def critic_of(kind: str) -> Any:
    return scalar(kind, 3)


def by_prompt(rollout: Mapping[str, Any]) -> dict[tuple[int, ...], int]:
    return {tuple(prompt): row for row, prompt in enumerate(rollout["prompts"])}


def stepped(case: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """TRL's weights after its last step, by our names."""
    flat = torch.frombuffer(
        bytearray(base64.b64decode(case["weights"]["float32"])), dtype=torch.float32
    )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names = case["weights"]["names"]
    parts = flat.split([shapes[name].numel() for name in names])
    return {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}


def furthest(model: nn.Module, weights: Mapping[str, Tensor]) -> float:
    """The largest distance of a weight from these."""
    assert set(weights) == {name for name, _ in model.named_parameters()}
    return max(
        float((p.detach() - weights[name]).abs().max()) for name, p in model.named_parameters()
    )


class Recorded(PPOTrainer):
    """Keeps each update's buffer and what each step's objective said."""

    buffers: list[RolloutBuffer]
    outputs: list[LossOutput]

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        assert self.buffer is not None
        if not self.buffers or self.buffers[-1] is not self.buffer:
            self.buffers.append(self.buffer)
        output = super().objective(model, batch)
        self.outputs.append(output)
        return output


def settings_of(case: Mapping[str, Any]) -> PPOSettings:
    """TRL's settings in our words."""
    theirs = case["settings"]
    return PPOSettings(
        updates=case["updates"],
        episodes=8,
        epochs=case["epochs"],
        minibatches=1,
        max_new_tokens=theirs["response_length"],
        temperature=theirs["temperature"] + 1e-7,  # as TRL divides
        gamma=theirs["gamma"],
        lam=theirs["lam"],
        clip=theirs["cliprange"],
        value_clip=theirs["cliprange_value"],
        value_coef=theirs["vf_coef"],
        whiten_rewards=theirs["whiten_rewards"],
        missing_eos_penalty=theirs["missing_eos_penalty"],
        compat="n_plus",
    )


def trainer_of(case: Mapping[str, Any], folder: Path) -> Recorded:
    kind, theirs, ppo = case["kind"], case["settings"], settings_of(case)
    policy = policy_of(kind)
    trainer = Recorded(
        policy,
        TrainSettings(
            max_steps=ppo.steps,
            batch_size=8,
            lr=theirs["learning_rate"],
            lr_schedule="constant",
            adam_eps=theirs["adam_epsilon"],
            adam_beta2=theirs["adam_beta2"],
            max_grad_norm=0.0,  # TRL's loop never clips the gradient
            log_steps=1,
        ),
        critic=critic_of(kind),
        reference=FrozenCopy(reference_of(kind)),
        reward=reward_of(kind),
        rows=[{"prompt_ids": prompt} for prompt in case["rollouts"][0]["prompts"]],
        ppo=ppo,
        kl_controller=FixedKL(theirs["kl_coef"]),
        pad_id=PAD,
        stop_ids=(EOS,),
        folder=folder,
    )
    trainer.buffers, trainer.outputs = [], []
    return trainer


def what_trl_drew(case: Mapping[str, Any]) -> Any:
    """In the sampler's place: the tokens that TRL drew for each prompt, update by update."""
    rollouts = iter(case["rollouts"])

    def draw(policy: nn.Module, prompt_BP: Tensor, **given: Any) -> Drawn:
        rollout = next(rollouts)
        place = by_prompt(rollout)
        width = max(map(len, rollout["responses"]))
        response_BR = torch.full((len(prompt_BP), width), PAD)
        mask_BR = torch.zeros((len(prompt_BP), width), dtype=torch.bool)
        for row, (ids, kept) in enumerate(
            zip(prompt_BP, given["prompt_mask_BP"].bool(), strict=True)
        ):
            answer = rollout["responses"][place[tuple(ids[kept].tolist())]]
            response_BR[row, : len(answer)] = torch.tensor(answer)
            mask_BR[row, : len(answer)] = True
        return Drawn(
            response_BR=response_BR,
            mask_BR=mask_BR,
            logp_BR=torch.zeros(mask_BR.shape),
            ended_B=(response_BR == EOS).any(dim=1),
            choice_BSLK=None,
        )

    return draw


@cache
def trained(name: str, folder: Path) -> Recorded:
    case = CASES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.rollout_phase, "draw", what_trl_drew(case))
        trainer = trainer_of(case, folder)
        trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl_ppo")


def shaped_of(case: Mapping[str, Any], buffer: RolloutBuffer) -> Shaped:
    return shape(
        buffer.score_B,
        (buffer.response_BR == EOS).any(dim=1),
        old_logp_BR=buffer.old_logp_BR,
        ref_logp_BR=buffer.ref_logp_BR,
        value_BR=buffer.value_BR,
        mask_BR=buffer.mask_BR,
        ppo=settings_of(case),
        kl_coef=case["settings"]["kl_coef"],
        scale=None,
    )


def rows_beside(
    found_BR: Tensor, stored: Sequence[Sequence[float]], order: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Our rows and TRL's of the same prompts; beyond TRL's, ours has to be 0."""
    for row, place in enumerate(order):
        theirs = torch.zeros(found_BR.shape[1], dtype=torch.float64)
        theirs[: len(stored[place])] = torch.tensor(stored[place], dtype=torch.float64)
        yield found_BR[row].double(), theirs


def test_the_vectors_say_where_they_are_from() -> None:
    source = STORED["source"]
    assert (source["package"], source["version"]) == ("trl", "1.12.0")
    assert len(source["wheel_sha256"]) == 64


@pytest.mark.parametrize("name", SAME)
def test_everything_from_tokens_to_advantages_is_trls(name: str, folder: Path) -> None:
    case, trainer = CASES[name], trained(name, folder / name)
    assert len(trainer.buffers) == case["updates"]
    for buffer, rollout in zip(trainer.buffers, case["rollouts"], strict=True):
        place = by_prompt(rollout)
        prompts = zip(buffer.prompt_BP, buffer.prompt_mask_BP.bool(), strict=True)
        order = [place[tuple(ids[kept].tolist())] for ids, kept in prompts]
        shaped = shaped_of(case, buffer)
        torch.testing.assert_close(
            shaped.score_B.double(),
            torch.tensor(rollout["scores"], dtype=torch.float64)[order],
            rtol=0,
            atol=TOLERANCE,
        )
        for field, found_BR in {
            "logprobs": buffer.old_logp_BR,
            "ref_logprobs": buffer.ref_logp_BR,
            "values": buffer.value_BR,
            "rewards": shaped.reward_BR,
            "advantages": buffer.advantage_BR,
            "returns": buffer.return_BR,
        }.items():
            for ours, theirs in rows_beside(found_BR, rollout[field], order):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE, msg=field)


@pytest.mark.parametrize("name", SAME)
def test_both_losses_and_clips_are_trls_in_every_epoch(name: str, folder: Path) -> None:
    case, trainer = CASES[name], trained(name, folder / name)
    for key, field in {
        "policy/loss": "policy_loss",
        "value/loss": "value_loss",
        "policy/clip_fraction": "clip_fraction",
        "value/clip_fraction": "value_clip_fraction",
    }.items():
        sums = [output.metrics[key] for output in trainer.outputs]
        ours = [float(total) / float(count) for total, count in sums]
        theirs = [epoch[0] for rollout in case["rollouts"] for epoch in rollout[field]]
        assert ours == pytest.approx(theirs, rel=0, abs=TOLERANCE), key


@pytest.mark.parametrize("name", SAME)
def test_the_stepped_weights_of_policy_and_critic_are_trls(name: str, folder: Path) -> None:
    case, trainer = CASES[name], trained(name, folder / name)
    assert trainer.optimizer_steps == case["optimizer_steps"]
    theirs = stepped(case, trainer.model)
    assert furthest(ActorCritic(policy_of(case["kind"]), critic_of(case["kind"])), theirs) > 5e-3
    assert furthest(trainer.model, theirs) <= TOLERANCE


def test_trl_averages_micro_batches_and_we_average_the_step(folder: Path) -> None:
    """The one difference of an update: TRL's step has the mean of the micro-batches' own means.

    With our losses averaged its way the weights are TRL's; averaged over the step they are not.
    """
    name = "llama_two_micro_batches"
    case, trainer = CASES[name], trained(name, folder / name)
    assert case["optimizer_steps"] == trainer.optimizer_steps == 1
    theirs = stepped(case, trainer.model)
    assert furthest(trainer.model, theirs) > 1e-3

    buffer, ppo = trainer.buffers[0], settings_of(case)
    prompts = zip(buffer.prompt_BP, buffer.prompt_mask_BP.bool(), strict=True)
    row_of = {tuple(ids[kept].tolist()): row for row, (ids, kept) in enumerate(prompts)}
    model = ActorCritic(policy_of("llama"), critic_of("llama"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
    )
    for micro_batch in case["micro_batches"]:
        batch = buffer.rows([row_of[tuple(prompt)] for prompt in micro_batch])
        logits, value_BR = model(
            batch["input_ids"], batch["attention_mask"], batch["mask_BR"].shape[1]
        )
        values = float(batch["mask_BR"].sum() / batch["value_mask_BR"].sum())
        output = episode_loss(logits, value_BR, batch=batch, ppo=ppo, weights=Weights(value=values))
        (output.loss / len(case["micro_batches"])).backward()
    optimizer.step()
    assert furthest(model, theirs) <= TOLERANCE


def test_an_update_makes_the_optimizer_steps_that_were_asked_for_and_trls_did_not() -> None:
    """2 updates of 4 epochs over 8 episodes in micro-batches of 1, by the number of minibatches.

    TRL 1.12 makes one step an epoch whatever that number is; where an update's prompts are the last
    of a pass over the data, it steps after every micro-batch instead.
    """
    counts = STORED["trl_optimizer_steps"]
    for minibatches in (1, 2, 4):
        ppo = PPOSettings(updates=2, episodes=8, epochs=4, minibatches=minibatches)
        assert ppo.steps == 8 * minibatches
        assert counts["counted"][str(minibatches)] == 8
        assert counts["counted_where_each_update_ends_the_data"][str(minibatches)] == 64
